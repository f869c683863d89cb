"""The weights of a GGUF file written as an mlx-lm model's safetensors, a few rows at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from llmcad_mlx.errors import ModelError
from llmcad_mlx.files.bundle_writer import BundleWriter
from llmcad_mlx.files.safetensors import TensorSpec
from llmcad_mlx.gguf.dimensions import HEAD, OUTER_NAMES
from llmcad_mlx.gguf.groups import Groups, NotFiniteError, group_rows, has_values, require_finite, values
from llmcad_mlx.gguf.model import FamilyModel
from llmcad_mlx.gguf.reader import GgufHeader, GgufTensor, read_rows

CHUNK_VALUES = 1 << 22  # 16 MB as float32

Scalar = TypeVar("Scalar", bound=np.generic)
OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A GGUF tensor and where it goes: `name` is mlx-lm's; a quantised one has codes, scales and biases.

    `offset` is taken from each value of a vector.
    """

    source: GgufTensor
    name: str
    quantised: bool
    heads_to_unpair: int
    offset: float
    specs: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)


def plan_weights(header: GgufHeader, model: FamilyModel, bits: int, group_size: int) -> list[PlannedTensor]:
    """Every tensor of the model in the order it is computed: embedding, layers, norm, head.

    Raises ModelError naming a tensor that is missing, unexpected, of the wrong shape or type, or whose rows
    do not divide into groups.
    """
    shapes = _model_shapes(model)
    by_name: dict[str, GgufTensor] = {}
    for tensor in header.tensors.values():
        try:
            name = model.mlx_name(tensor.name)
        except KeyError:
            name = tensor.name
        if name is None:
            continue
        if name not in shapes:
            raise ModelError(f"{header.path}: tensor {tensor.name!r} has no place in {model.config['model_type']}")
        if tensor.shape != shapes[name]:
            raise ModelError(f"{header.path}: tensor {tensor.name!r} is {tensor.shape}, expected {shapes[name]}")
        by_name[name] = tensor
    missing = [name for name in shapes if name not in by_name]
    if missing:
        raise ModelError(f"{header.path}: {len(missing)} tensors are missing, the first for {missing[0]}")
    return [_planned(header, model, name, by_name[name], bits, group_size) for name in _in_order(shapes)]


def write_weights(
    header: GgufHeader, plan: list[PlannedTensor], folder: Path, bits: int, group_size: int, on_bytes: OnBytes
) -> None:
    """Write `plan` into `folder` as the weights of a bundle.

    `on_bytes` is called with the number of source bytes done since the last call.
    Raises ModelError for values that are not finite, OSError when the disk is full.
    """
    with BundleWriter(folder, (spec for tensor in plan for spec in tensor.specs)) as writer:
        for tensor in plan:
            _write_tensor(header, tensor, writer, bits, group_size, on_bytes)
        writer.finish(header.path.name)


def _model_shapes(model: FamilyModel) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of mlx-lm's own model for this configuration. Nothing is allocated: MLX is lazy."""
    module = importlib.import_module(f"mlx_lm.models.{model.config['model_type']}")
    instance = module.Model(module.ModelArgs.from_dict(model.config))
    parameters: dict[str, mx.array] = dict(tree_flatten(instance.parameters()))
    shapes = {name: tuple(array.shape) for name, array in parameters.items()}
    if model.config["tie_word_embeddings"]:
        shapes.pop(OUTER_NAMES[HEAD], None)  # some models drop it only when they meet the weights
    return shapes


def _in_order(names: dict[str, tuple[int, ...]]) -> list[str]:
    """Layers by number, each layer's tensors together, so that a layer is complete before the next begins."""

    def place(name: str) -> tuple[int, int]:
        parts = name.split(".")
        if "layers" in parts:
            return (1, int(parts[parts.index("layers") + 1]))
        return (0 if "embed" in name else 2, 0)

    return sorted(names, key=place)


def _planned(
    header: GgufHeader, model: FamilyModel, name: str, tensor: GgufTensor, bits: int, group_size: int
) -> PlannedTensor:
    if not has_values(tensor.kind):
        raise ModelError(
            f"{header.path}: tensor {tensor.name!r} has type {tensor.kind.name}, which is not supported"
        )
    heads, offset = model.heads_to_unpair(tensor.name), model.offset_of(tensor.name)
    if len(tensor.shape) == 1:
        return PlannedTensor(tensor, name, False, heads, offset, (TensorSpec(name, "F16", tensor.shape),))
    if tensor.columns % group_size:
        raise ModelError(
            f"{header.path}: tensor {tensor.name!r} has rows of {tensor.columns}, "
            f"which do not divide into groups of {group_size}; choose another --group-size"
        )
    stem = name.removesuffix(".weight")
    groups = (tensor.rows, tensor.columns // group_size)
    specs = (
        TensorSpec(name, "U32", (tensor.rows, tensor.columns * bits // 32)),
        TensorSpec(f"{stem}.scales", "F16", groups),
        TensorSpec(f"{stem}.biases", "F16", groups),
    )
    return PlannedTensor(tensor, name, True, heads, offset, specs)


def _write_tensor(
    header: GgufHeader,
    planned: PlannedTensor,
    writer: BundleWriter,
    bits: int,
    group_size: int,
    on_bytes: OnBytes,
) -> None:
    tensor = planned.source
    what = f"{header.path}: tensor {tensor.name!r}"
    try:
        for first, raw in _chunks(header, planned):
            if planned.quantised:
                _write_groups(planned, writer, first, group_rows(raw, tensor.kind, bits, group_size))
            else:
                _write_vector(planned, writer, raw)
            on_bytes(raw.nbytes)
    except NotFiniteError:
        raise ModelError(f"{what} holds NaN, or values float16 cannot hold") from None


def _write_groups(planned: PlannedTensor, writer: BundleWriter, first: int, groups: Groups) -> None:
    parts: tuple[npt.NDArray[Any], ...] = (groups.codes, groups.scales, groups.biases)
    for spec, part in zip(planned.specs, parts, strict=True):
        writer.write_bytes(spec.name, first * part[0].nbytes, np.ascontiguousarray(part).tobytes())


def _write_vector(planned: PlannedTensor, writer: BundleWriter, raw: npt.NDArray[np.uint8]) -> None:
    with np.errstate(over="ignore"):  # becomes infinite and is refused
        vector = values(raw, planned.source.kind).reshape(-1)
        vector = (vector - np.float32(planned.offset)).astype(np.float16)
    require_finite(vector)
    if planned.heads_to_unpair:
        vector = _unpaired(vector, planned.heads_to_unpair)
    writer.write_bytes(planned.name, 0, vector.tobytes())


def _chunks(header: GgufHeader, planned: PlannedTensor) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Raw rows in their final order with the index of the first. Rows move only within a head."""
    tensor = planned.source
    step = max(1, CHUNK_VALUES // tensor.columns)
    if planned.heads_to_unpair:
        head_rows = max(1, tensor.rows // planned.heads_to_unpair)
        step = max(1, step // head_rows) * head_rows
    for first in range(0, tensor.rows, step):
        count = min(step, tensor.rows - first)
        raw = read_rows(header.path, tensor, first, count)
        if planned.heads_to_unpair and planned.quantised:
            raw = _unpaired(raw, count // head_rows)
        yield first, raw


def _unpaired(rows: npt.NDArray[Scalar], num_heads: int) -> npt.NDArray[Scalar]:
    """Undo `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py: neighbours (2 i, 2 i + 1) to halves."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
