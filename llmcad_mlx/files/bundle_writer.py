"""Writes a bundle: weight files in which every layer is one run of bytes, and `llmcad.json` with checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from llmcad_mlx import __version__
from llmcad_mlx.files.bundle import Bundle, BundleLayer, BundleTensor, write_manifest
from llmcad_mlx.files.safetensors import SafetensorsWriter, TensorSpec

MAX_FILE_BYTES = 5 << 30
SMALL_BYTES = 64 << 10
"""Norms and biases stay in memory when a layer is streamed, so they lie behind what is read again and again."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """A layer's name and its tensors in the order in which they will lie in the file."""

    name: str
    specs: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)


def layer_index(tensor: str) -> int | None:
    """The decoder layer a tensor belongs to by its name, None for all others."""
    found = _LAYER.search(tensor)
    return int(found[1]) if found else None


def plan_layers(specs: Iterable[TensorSpec]) -> list[LayerPlan]:
    """Tensors by layer, in the order they are computed with: embedding, layers, rest (the last norm), head.

    Within a layer the widest items come first, which aligns all of them, and small tensors come last.
    """
    groups: dict[tuple[int, int, str], list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(_group(spec.name), []).append(spec)
    return [
        LayerPlan(name, tuple(sorted(group, key=lambda spec: (-spec.item_bytes, spec.num_bytes <= SMALL_BYTES))))
        for (_, _, name), group in sorted(groups.items())
    ]


def _group(tensor: str) -> tuple[int, int, str]:
    """Sorts into the order of `plan_layers`; the last item is the group's name."""
    number = layer_index(tensor)
    if number is not None:
        return (1, number, f"layer {number}")
    module = tensor.rpartition(".")[0].rpartition(".")[2] or tensor
    if module in ("lm_head", "output", "embed_out", "head"):
        return (3, 0, "head")
    if "embed" in module or module in ("wte", "wpe"):
        return (0, 0, "embedding")
    return (2, 0, "rest")


class BundleWriter:
    """The weights of a bundle, written into an existing folder in any order; checksums are made on the way.

    ```
    with BundleWriter(folder, specs) as writer:
        writer.write_bytes(name, 0, data)  # and so on, until every byte was written once
        writer.finish(source)
    ```
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec]) -> None:
        """Weights beyond 5 GB go into further files with an index; a layer is never split."""
        self._folder = folder
        self._layers = plan_layers(specs)
        self._layer_of = {spec.name: layer for layer in self._layers for spec in layer.specs}
        self._missing = {layer.name: layer.num_bytes for layer in self._layers}
        self._finished: dict[str, BundleLayer] = {}
        self._files: dict[str, SafetensorsWriter] = {}  # by layer
        shards = _shards(self._layers)
        with ExitStack() as opened:
            for number, shard in enumerate(shards, 1):
                name = f"model-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model"
                tensors = [spec for layer in shard for spec in layer.specs]
                file = opened.enter_context(SafetensorsWriter(folder / f"{name}.safetensors", tensors))
                self._files.update((layer.name, file) for layer in shard)
            self._open = opened.pop_all()

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def write_bytes(self, name: str, start: int, data: bytes | memoryview) -> None:
        """As `SafetensorsWriter.write_bytes`."""
        layer = self._layer_of[name]
        self._files[layer.name].write_bytes(name, start, data)
        self._missing[layer.name] -= len(data)
        if self._missing[layer.name] == 0 and data:
            self._finished[layer.name] = self._checked(layer)

    def finish(self, source: str) -> None:
        """Write `llmcad.json` and wait until all is on the disk. `source`: what the weights were made from.

        Raises ValueError when bytes are missing, OSError when the disk is full.
        """
        for layer in self._layers:
            if self._missing[layer.name]:
                raise ValueError(f"{layer.name}: {self._missing[layer.name]} bytes were not written")
            if layer.name not in self._finished:  # nothing but empty tensors
                self._finished[layer.name] = self._checked(layer)
        files = list(dict.fromkeys(self._files.values()))
        for file in files:
            file.sync()
        if len(files) > 1:
            self._write_index()
        layers = tuple(self._finished[layer.name] for layer in self._layers)
        version = f"llmcad-mlx {__version__}"
        write_manifest(Bundle(self._folder, layers, None, {}, source, version))

    def _checked(self, layer: LayerPlan) -> BundleLayer:
        """Checksums of a layer, from the file: its tensors may have been written in turns."""
        file = self._files[layer.name]
        whole = hashlib.sha256()
        tensors = []
        for spec in layer.specs:
            extent, own = file.extent(spec), hashlib.sha256()
            for start in range(0, extent.num_bytes, _BLOCK_BYTES):
                block = file.read_bytes(extent.offset + start, min(_BLOCK_BYTES, extent.num_bytes - start))
                own.update(block)
                whole.update(block)
            tensors.append(BundleTensor(extent, own.hexdigest()))
        return BundleLayer(layer.name, tuple(tensors), whole.hexdigest())

    def _write_index(self) -> None:
        weight_map = {
            spec.name: self._files[layer.name].path.name for layer in self._layers for spec in layer.specs
        }
        total = sum(layer.num_bytes for layer in self._layers)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _shards(layers: Iterable[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers by file."""
    shards: list[list[LayerPlan]] = []
    room = 0
    for layer in layers:
        if not shards or layer.num_bytes > room:
            shards.append([])
            room = MAX_FILE_BYTES
        shards[-1].append(layer)
        room -= layer.num_bytes
    return shards
