"""Bundles: mlx-lm model folders with `llmcad.json`, which says where each layer lies and what its checksum is.

```
{"format": 2,
 "layers": [{"name": "embedding" | "layer 0" | … | "rest" | "head",
             "tensors": [{"name", "file", "offset", "bytes", "dtype", "shape", "sha256"}, …],
             "bytes": …, "sha256": …}, …],
 "draft": null, "profile": {}, "source": "…", "created_by": "llmcad-mlx 0.1.0"}
```
Tensors are listed in the order in which they lie in their file, so that a layer is one run of bytes, from its
first tensor to the end of its last. `bytes` and `sha256` of a layer are those of this run. `offset` counts from
the start of the file; dtypes are those of safetensors. `source` is what it was made from; nothing reads `draft`
and `profile`.

A layer, and each tensor of it that is larger than SMALL_BYTES, begins at a multiple of 16 KB of its file, so that
it can be read past the page cache (and mapped); zeros fill the gaps. In format 1, which is still read, there are
none. mlx-lm opens both. The Rust library behind the `safetensors` package refuses gaps, and thereby format 2.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcad_mlx import __version__
from llmcad_mlx.errors import ModelError
from llmcad_mlx.files import check_open_files
from llmcad_mlx.files.safetensors import (
    DATA_ALIGNMENT,
    SafetensorsWriter,
    TensorExtent,
    TensorSpec,
    WeightIndex,
    read_weights,
)

FILE = "llmcad.json"
FORMAT = 2
_GAPS = {1: 1, FORMAT: DATA_ALIGNMENT}  # by format, what the bytes between two tensors are fewer than
MAX_FILE_BYTES = 5 << 30
SMALL_BYTES = 64 << 10
"""Tensors up to this size lie behind the others of their layer: 16 KB of alignment would be too much for them."""

_SMALL_ALIGNMENT = 64  # a cache line, as kernels like it

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_SHA256 = re.compile("[0-9a-f]{64}")
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class BundleLayer:
    """A run of tensors, each with the sha256 of its bytes in hexadecimal; `sha256` is that of the whole run."""

    name: str
    tensors: dict[TensorExtent, str]
    sha256: str

    @property
    def file(self) -> Path:
        return next(iter(self.tensors)).file

    @property
    def offset(self) -> int:
        """Where the layer begins in its file."""
        return next(iter(self.tensors)).offset

    @property
    def num_bytes(self) -> int:
        """With the gaps between its tensors."""
        last = next(reversed(self.tensors))
        return last.offset + last.num_bytes - self.offset


@dataclass(frozen=True, slots=True)
class Bundle:
    """What `llmcad.json` says of the weights."""

    layers: tuple[BundleLayer, ...]

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def tensor_sha256(self) -> dict[str, str]:
        """The checksum of every tensor, by name."""
        return {extent.name: sha256 for layer in self.layers for extent, sha256 in layer.tensors.items()}


def read_bundle(folder: Path, index: WeightIndex | None = None) -> Bundle | None:
    """The bundle in `folder`, None when there is no llmcad.json. Reads headers, not weights.

    index: the folder's, where it was made already. Raises ModelError naming the file for one that is truncated,
    altered, or does not belong to the weights beside it.
    """
    file = folder / FILE
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        check_open_files(error, file)
        raise ModelError(f"{file}: cannot be read ({error.strerror or error}); make the bundle again") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{file}: cut off, or not valid JSON; make the bundle again") from None
    version = _checked(file, "the file", content, {"format": int})["format"]
    if version not in _GAPS:
        raise ModelError(
            f"{file}: bundle format {version} is not {FORMAT} or older; install the llmcad-mlx that wrote it, "
            "or make the bundle again"
        )
    listed = _checked(file, "the file", content, {"layers": list})["layers"]
    unlisted = dict(read_weights(folder) if index is None else index)
    bundle = Bundle(tuple(_layer(file, layer, unlisted, _GAPS[version]) for layer in listed))
    for extent in unlisted.values():
        raise ModelError(f"{extent.file}: {extent.name} is not listed in {FILE}; make the bundle again")
    return bundle


def _layer(file: Path, content: Any, unlisted: dict[str, TensorExtent], gap: int) -> BundleLayer:
    """`content` as a layer; its tensors, which must be as the weight files have them, leave `unlisted`. gap: bytes
    that may not lie between two of them."""
    name = content.get("name") if isinstance(content, dict) else None
    where = name if isinstance(name, str) else "a layer"
    entry = _checked(file, where, content, {"name": str, "tensors": list, "sha256": str, "bytes": int})
    tensors: dict[TensorExtent, str] = {}
    for listed in entry["tensors"]:
        _checked(file, f"a tensor of {where}", listed, {"name": str, "file": str, "sha256": str})
        extent = unlisted.pop(listed["name"], None)
        if extent is None or {**listed, **_tensor_entry(extent, listed["sha256"])} != listed:
            raise ModelError(
                f"{file}: {listed['name']} of {where} does not lie in {listed['file']} as it says; "
                "make the bundle again"
            )
        tensors[extent] = listed["sha256"]
    layer = BundleLayer(where, tensors, entry["sha256"])
    end = layer.offset if tensors else 0
    for extent in tensors:
        if extent.file != layer.file or not 0 <= extent.offset - end < gap:
            raise ModelError(f"{file}: {where} is not one run of bytes; make the bundle again")
        end = extent.offset + extent.num_bytes
    if not tensors or entry["bytes"] != layer.num_bytes:
        raise _wrong(file, "bytes", where)
    return layer


def _checked(file: Path, where: str, content: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object of the file; what is missing or of another type is refused by name."""
    if not isinstance(content, dict):
        raise ModelError(f"{file}: {where} is not a JSON object; make the bundle again")
    for key, kind in kinds.items():
        value = content.get(key)
        if type(value) is not kind or (key == "sha256" and not _SHA256.fullmatch(str(value))):
            raise _wrong(file, key, where)
    return content


def _wrong(file: Path, key: str, where: str) -> ModelError:
    return ModelError(f"{file}: {key!r} of {where} is missing or wrong; make the bundle again")


def verify_bundle(folder: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> Bundle | None:
    """Read every byte of the weights and compare it with the checksums; None when there are none.

    advance: called with the bytes read since the last call. Raises ModelError naming file and layer for bytes that
    were altered, and what `read_bundle` raises.
    """
    bundle = read_bundle(folder)
    for layer in () if bundle is None else bundle.layers:
        digest, left = hashlib.sha256(), layer.num_bytes
        try:
            with layer.file.open("rb", buffering=0) as stream:
                stream.seek(layer.offset)
                while left:
                    block = stream.read(min(_BLOCK_BYTES, left))
                    if not block:
                        remedy = "fetch or convert the model again"
                        raise ModelError(f"{layer.file}: {layer.name} is cut off; {remedy}")
                    digest.update(block)
                    left -= len(block)
                    advance(len(block))
        except OSError as error:
            check_open_files(error, layer.file)
            raise ModelError(f"{layer.file}: cannot be read ({error.strerror or error}); check the disk") from None
        if digest.hexdigest() != layer.sha256:
            raise ModelError(
                f"{layer.file}: {layer.name} was altered (its sha256 is not the one in {FILE}); "
                "fetch or convert the model again"
            )
    return bundle


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """`specs` in the order in which they will lie in the file; `starts`: where, from the layer's beginning."""

    name: str
    specs: tuple[TensorSpec, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, name: str, group: Iterable[TensorSpec]) -> LayerPlan:
        """Small tensors come last, of them those that are never streamed (norms, biases)."""
        specs = sorted(group, key=lambda spec: (spec.num_bytes <= SMALL_BYTES, len(spec.shape) < 2))
        starts, end = [], 0
        for spec in specs:
            end = _rounded_up(end, DATA_ALIGNMENT if spec.num_bytes > SMALL_BYTES else _SMALL_ALIGNMENT)
            starts.append(end)
            end += spec.num_bytes
        return cls(name, tuple(specs), tuple(starts))

    @property
    def num_bytes(self) -> int:
        """In the file, up to where the next layer may begin."""
        return _rounded_up(self.starts[-1] + self.specs[-1].num_bytes, DATA_ALIGNMENT)


def _rounded_up(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment


def layer_index(tensor: str) -> int | None:
    """The decoder layer a tensor belongs to by its name, None for all others."""
    found = _LAYER.search(tensor)
    return int(found[1]) if found else None


def plan_layers(specs: Iterable[TensorSpec]) -> list[LayerPlan]:
    """Tensors by layer, in the order they are computed with: embedding, layers, rest (the last norm), head."""
    groups: dict[tuple[int, int, str], list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(_group(spec.name), []).append(spec)
    return [LayerPlan.of(name, group) for (_, _, name), group in sorted(groups.items())]


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
        self._missing = {layer.name: sum(spec.num_bytes for spec in layer.specs) for layer in self._layers}
        self._finished: dict[str, dict[str, Any]] = {}  # as llmcad.json has them
        self._files: dict[str, SafetensorsWriter] = {}  # by layer
        shards: list[list[LayerPlan]] = []
        room = 0
        for layer in self._layers:
            if not shards or layer.num_bytes > room:
                shards.append([])
                room = MAX_FILE_BYTES
            shards[-1].append(layer)
            room -= layer.num_bytes
        with ExitStack() as opened:
            for number, shard in enumerate(shards, 1):
                name = f"model-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model"
                file = opened.enter_context(_open_shard(folder / f"{name}.safetensors", shard))
                self._files.update((layer.name, file) for layer in shard)
            self._open = opened.pop_all()

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def write_bytes(self, name: str, start: int, data: bytes | memoryview) -> None:
        layer = self._layer_of[name]
        self._files[layer.name].write_bytes(name, start, data)
        self._missing[layer.name] -= len(data)
        if self._missing[layer.name] == 0 and data:
            self._finished[layer.name] = self._layer_entry(layer)

    def finish(self, source: str) -> None:
        """Write `llmcad.json` and wait until all is on the disk. `source`: what the weights were made from.

        Raises ValueError when bytes are missing, OSError when the disk is full.
        """
        for layer in self._layers:
            if self._missing[layer.name]:
                raise ValueError(f"{layer.name}: {self._missing[layer.name]} bytes were not written")
            if layer.name not in self._finished:  # nothing but empty tensors
                self._finished[layer.name] = self._layer_entry(layer)
        files = set(self._files.values())
        for file in files:
            file.sync()
        if len(files) > 1:
            total = sum(spec.num_bytes for layer in self._layers for spec in layer.specs)
            weight_map = {name: self._files[layer.name].path.name for name, layer in self._layer_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self._write_json("model.safetensors.index.json", index)
        layers = [self._finished[layer.name] for layer in self._layers]
        content = {"format": FORMAT, "layers": layers, "draft": None, "profile": {}, "source": source}
        self._write_json(FILE, {**content, "created_by": f"llmcad-mlx {__version__}"})

    def _layer_entry(self, layer: LayerPlan) -> dict[str, Any]:
        """With checksums from the file: its tensors may have been written in turns."""
        file = self._files[layer.name]
        whole = hashlib.sha256()
        tensors: list[dict[str, Any]] = []
        first = end = file.extents[layer.specs[0].name].offset
        for spec in layer.specs:
            extent, own = file.extents[spec.name], hashlib.sha256()
            whole.update(bytes(extent.offset - end))
            end = extent.offset + extent.num_bytes
            for start in range(extent.offset, end, _BLOCK_BYTES):
                block = file.read_bytes(start, min(_BLOCK_BYTES, end - start))
                own.update(block)
                whole.update(block)
            tensors.append(_tensor_entry(extent, own.hexdigest()))
        return {"name": layer.name, "tensors": tensors, "bytes": end - first, "sha256": whole.hexdigest()}

    def _write_json(self, name: str, content: object) -> None:
        (self._folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _open_shard(path: Path, layers: Iterable[LayerPlan]) -> SafetensorsWriter:
    specs: list[TensorSpec] = []
    starts: list[int] = []
    first = 0
    for layer in layers:
        specs += layer.specs
        starts += [first + start for start in layer.starts]
        first += layer.num_bytes
    return SafetensorsWriter(path, specs, starts=starts)


def _tensor_entry(extent: TensorExtent, sha256: str) -> dict[str, Any]:
    return {
        "name": extent.name,
        "file": extent.file.name,
        "offset": extent.offset,
        "bytes": extent.num_bytes,
        "dtype": extent.dtype,
        "shape": list(extent.shape),
        "sha256": sha256,
    }
