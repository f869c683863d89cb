"""A model with more layers and the same output, for tests and benchmarks: bytes and arithmetic grow, text stays.

python -m convert.inflate SOURCE DEST --size 2GB
python -m convert.inflate SOURCE DEST --layers 100

An added decoder layer is a copy of the one behind it, with zeros in the projections that lead out of its
attention and its MLP (o_proj and down_proj: weights or codes, scales, biases). It adds 0.0 to the residual stream,
so tokens, text and acceptance are exactly the original's. Keys and values are computed and kept as in any other
layer. SOURCE is an mlx-lm folder or a bundle, DEST becomes a bundle. The model knows no more than before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import exit_code_of
from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files import check_destination, new_folder
from llmcad_mlx.files.bundle import BundleWriter, layer_index, plan_layers
from llmcad_mlx.files.safetensors import TensorExtent, TensorSpec, WeightIndex, read_weights
from llmcad_mlx.models.folder import read_config
from llmcad_mlx.progress import Advance, Progress, progress_for
from llmcad_mlx.sizes import parse_size
from llmcad_mlx.store.convert import copy_extent, copy_side_files
from llmcad_mlx.streaming.storage import FileStorage

# What a layer of these does depends on its weights and on `layer_types` alone, never on its number.
FAMILIES = ("llama", "qwen2", "qwen3")

_OUTPUT = re.compile(r"\.(?:o_proj|down_proj)\.(\w+)$")
_ZERO_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor of the inflated model; `zero`: all its values are."""

    spec: TensorSpec
    source: TensorExtent
    zero: bool


def inflate(
    source: Path,
    dest: Path,
    *,
    num_bytes: int | None = None,
    num_layers: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the bundle `dest`: the model of the folder `source` with layers added; returns how many.

    Either `num_bytes`, the weights' size that is reached with the fewest layers, or `num_layers` to add.
    Raises UsageError for numbers that add nothing and a destination that is not free, ModelError for a folder that
    cannot be inflated, DiskError when there is no room.
    """
    check_destination(dest)
    config = read_config(source)
    if config["model_type"] not in FAMILIES:
        raise ModelError(
            f"{source}: {config['model_type']!r} cannot be inflated, its layers may differ by their number; "
            f"use a model of {', '.join(FAMILIES)}"
        )
    index = read_weights(source)
    num_old = int(config["num_hidden_layers"])
    num_added = _num_added(index, num_old, num_bytes, num_layers)
    origin = _origins(num_old, num_added)
    planned = {tensor.spec.name: tensor for tensor in _plan(source, index, origin)}
    total = sum(tensor.spec.num_bytes for tensor in planned.values())
    storage = FileStorage()
    with new_folder(dest, total) as folder, contextlib.closing(storage):
        _write_config(folder, config, origin)
        copy_side_files(source, folder)
        specs = [tensor.spec for tensor in planned.values()]
        stage = (progress or Progress()).stage(f"adding {num_added} layers", total)
        with stage as advance, BundleWriter(folder, specs) as writer:
            for layer in plan_layers(specs):
                for spec in layer.specs:
                    _write_tensor(storage, planned[spec.name], writer, advance)
            writer.finish(f"{source.resolve().name} inflated from {num_old} to {num_old + num_added} layers")
    return num_added


def _num_added(index: WeightIndex, num_old: int, num_bytes: int | None, num_layers: int | None) -> int:
    if (num_bytes is None) == (num_layers is None):
        raise UsageError("give one of --size and --layers")
    if num_layers is not None:
        if num_layers < 1:
            raise UsageError(f"--layers: {num_layers} adds nothing; give the number of layers to add, 1 or more")
        return num_layers
    assert num_bytes is not None
    total = sum(extent.num_bytes for extent in index.values())
    if num_bytes <= total:
        raise UsageError(f"--size: the model has {total / 1e9:.2f} GB already; give more")
    sizes = [sum(e.num_bytes for name, e in index.items() if layer_index(name) == old) for old in range(num_old)]
    count = 1  # layers may differ in size, and how many come before each depends on the count
    while total + sum(sizes[old] for old, is_added in _origins(num_old, count) if is_added) < num_bytes:
        count += 1
    return count


def _origins(num_old: int, num_added: int) -> list[tuple[int, bool]]:
    """For each new layer the old one it comes from and whether it is added; added ones spread evenly."""
    origin: list[tuple[int, bool]] = []
    for old in range(num_old):
        before = (old + 1) * num_added // num_old - old * num_added // num_old
        origin += [(old, True)] * before + [(old, False)]
    return origin


def _plan(source: Path, index: WeightIndex, origin: list[tuple[int, bool]]) -> Iterator[_Planned]:
    by_layer: dict[int, list[TensorExtent]] = {}
    for name, extent in index.items():
        number = layer_index(name)
        if number is None:
            yield _Planned(TensorSpec(name, extent.dtype, extent.shape), extent, False)
        else:
            by_layer.setdefault(number, []).append(extent)
    for number, (old, is_added) in enumerate(origin):
        extents = by_layer.get(old, [])
        num_outputs = 0
        for extent in extents:
            found = _OUTPUT.search(extent.name)
            num_outputs += found is not None and found[1] == "weight"
            name = re.sub(rf"((?:^|\.)(?:layers|h|blocks)\.){old}\.", rf"\g<1>{number}.", extent.name, count=1)
            yield _Planned(TensorSpec(name, extent.dtype, extent.shape), extent, is_added and found is not None)
        if num_outputs != 2:
            raise ModelError(
                f"{source}: layer {old} has no o_proj and down_proj, so no layer without effect is known"
            )


def _write_tensor(storage: FileStorage, planned: _Planned, writer: BundleWriter, advance: Advance) -> None:
    if not planned.zero:
        copy_extent(storage, planned.source, writer, planned.spec.name, advance)
        return
    for start in range(0, planned.spec.num_bytes, _ZERO_BYTES):
        count = min(_ZERO_BYTES, planned.spec.num_bytes - start)
        # Written, not left as a hole: reading them must cost as reading any other.
        writer.write_bytes(planned.spec.name, start, bytes(count))
        advance(count)


def _write_config(folder: Path, config: dict[str, Any], origin: list[tuple[int, bool]]) -> None:
    changed = {**config, "num_hidden_layers": len(origin)}
    if config.get("layer_types") is not None:
        changed["layer_types"] = [config["layer_types"][old] for old, _ in origin]
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            changed[key] = _renumbered(config[key], origin)
    (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def _renumbered(quantization: dict[str, Any], origin: list[tuple[int, bool]]) -> dict[str, Any]:
    """Settings of single modules, "model.layers.3.mlp.down_proj": {…}, go with their layers."""
    changed: dict[str, Any] = {}
    for key, value in quantization.items():
        number = layer_index(f"{key}.")
        if number is None:
            changed[key] = value
        else:
            new = [position for position, (old, _) in enumerate(origin) if old == number]
            changed |= {key.replace(f".{number}.", f".{position}.", 1): value for position in new}
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Add layers without effect to a model: the same text from more bytes and arithmetic."
    )
    parser.add_argument("source", type=Path, help="an mlx-lm folder or a bundle")
    parser.add_argument("dest", type=Path, help="the bundle to make; a new or empty folder")
    parser.add_argument("--size", help="size of the weights to reach, e.g. 2GB")
    parser.add_argument("--layers", type=int, help="number of layers to add")
    given = parser.parse_args()
    num_bytes = None if given.size is None else parse_size(given.size, "--size")
    inflate(given.source, given.dest, num_bytes=num_bytes, num_layers=given.layers, progress=progress_for(True))
    print(given.dest)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
