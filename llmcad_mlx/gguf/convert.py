"""A GGUF file becomes a bundle: an mlx-lm folder with checksums, its weights written a few rows at a time."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.constants import Keys
from mlx.utils import tree_flatten

from llmcad_mlx.files import new_folder
from llmcad_mlx.files.bundle import BundleWriter
from llmcad_mlx.files.safetensors import TensorSpec
from llmcad_mlx.gguf.groups import (
    Bytes,
    NotFiniteError,
    check_groups,
    group_rows,
    has_values,
    kept_bits,
    require_finite,
    values,
)
from llmcad_mlx.gguf.model import CONFIGURED, FamilyModel, read_family
from llmcad_mlx.gguf.reader import GgufHeader, GgufTensor, read_gguf_header, read_rows
from llmcad_mlx.gguf.tokenizer import read_tokenizer
from llmcad_mlx.progress import Advance, Progress

BITS = (2, 3, 4, 5, 6, 8, 16)
_DENSE = 16
DEFAULT_BITS = 4
CHUNK_VALUES = 1 << 22  # 16 MB as float32

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A GGUF tensor and what is written of it: a matrix's codes, scales and biases, or a vector.

    bits: of its groups; None: dense float16. heads_to_unpair: how many heads' rows must be put back in order.
    offset: taken from each value of a vector.
    """

    source: GgufTensor
    specs: tuple[TensorSpec, ...]
    bits: int | None
    heads_to_unpair: int
    offset: float


def convert_gguf(
    source: Path,
    dest: Path,
    bits: int | None = None,
    group_size: int = 32,
    *,
    progress: Progress | None = None,
    sampling: Mapping[str, float] | None = None,
) -> None:
    """Write the model in `source` to the bundle `dest`: weights in MLX groups, tokenizer, chat template.

    The folder appears complete or not at all; what was made of what is told as a note. `bits` is one of 2, 3, 4,
    5, 6, 8, 16 (float16); None: each matrix keeps its precision, see `groups.kept_bits`, or gets 4 where none in
    the file is quantised. `group_size` is one of 32, 64, 128; with 32, blocks of 4, 5 and 8 bits keep their codes
    (see `groups`). `dest` must be new or empty. `sampling`: what generation_config.json recommends, where the file
    recommends nothing.

    Raises UsageError for an option or a destination that cannot be used, ModelError for a file that is not a
    GGUF model of a supported family or is damaged, DiskError when it does not fit the disk.
    """
    check_groups(bits, group_size, BITS)
    header = read_gguf_header(source)
    model = read_family(header)
    tokenizer = read_tokenizer(header)
    plan = plan_weights(header, model, bits, group_size)
    progress = progress or Progress()
    progress.note(_summary(plan))
    if tokenizer.assumed is not None:
        progress.note(
            f"{source}: does not name its pre-tokenizer (tokenizer.ggml.pre); {tokenizer.assumed!r} is assumed, "
            "and if that is wrong, so is the text: prefer a newer file"
        )
    specs = [spec for tensor in plan for spec in tensor.specs]
    with new_folder(dest, sum(spec.num_bytes for spec in specs)) as folder:
        num_bytes = sum(tensor.source.num_bytes for tensor in plan)
        stage = progress.stage(f"converting {source.name}", num_bytes)
        with stage as advance, BundleWriter(folder, specs) as writer:
            for tensor in plan:
                _write_tensor(writer, header, tensor, group_size, advance)
            writer.finish(source.name)
        tokenizer.save(folder)
        config = {**model.config, **tokenizer.ids, "torch_dtype": "float16", **_quantization(plan, group_size)}
        generation = {**tokenizer.ids, **_sampling(header, sampling or {})}
        for name, content in (("generation_config.json", generation), ("config.json", config)):
            text = json.dumps(content, indent=2, sort_keys=True)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def plan_weights(header: GgufHeader, model: FamilyModel, bits: int | None, group_size: int) -> list[PlannedTensor]:
    """Every tensor of the model, each layer's together, so that one is complete before the next begins.

    Raises ModelError naming a tensor that is missing, unexpected, of the wrong shape or type, or whose rows
    do not divide into groups.
    """
    shapes = _model_shapes(model)
    sources = {name: model.gguf_name(name) for name in shapes}
    unknown = header.tensors.keys() - {*sources.values(), *CONFIGURED}
    if unknown:
        raise header.refused(f"tensor {min(unknown)!r} has no place in {model.config['model_type']}")
    found = {name: header.tensors[source] for name, source in sources.items() if source in header.tensors}
    missing = [name for name in shapes if name not in found]
    if missing:
        raise header.refused(f"{len(missing)} tensors are missing, the first for {missing[0]}")
    if bits is None and not any(kept_bits(tensor.kind) for tensor in found.values()):
        bits = DEFAULT_BITS
    plan = []
    for name, tensor in found.items():
        if tensor.shape != shapes[name]:
            raise header.refused(f"tensor {tensor.name!r} is {tensor.shape}, expected {shapes[name]}")
        own_bits = None if len(tensor.shape) == 1 or bits == _DENSE else bits or kept_bits(tensor.kind)
        specs = _specs(header, tensor, name, own_bits, group_size)
        offset = model.family.norm_offset if name.endswith("norm.weight") else 0.0
        plan.append(PlannedTensor(tensor, specs, own_bits, model.heads_to_unpair(name), offset))
    return plan


def _model_shapes(model: FamilyModel) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of mlx-lm's own model for this configuration. Nothing is allocated: MLX is lazy."""
    module = importlib.import_module(f"mlx_lm.models.{model.config['model_type']}")
    instance = module.Model(module.ModelArgs.from_dict(model.config))
    parameters: dict[str, mx.array] = dict(tree_flatten(instance.parameters()))
    shapes = {name: tuple(array.shape) for name, array in parameters.items()}
    if model.config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight", None)  # some models drop it only when they meet the weights
    return shapes


def _summary(plan: Sequence[PlannedTensor]) -> str:
    """What is made of what, most bytes first: "71 % Q8_0 in 8 bits, 29 % Q5_0 in 5 bits"."""
    shares: Counter[str] = Counter()
    for tensor in plan:
        if len(tensor.source.shape) > 1:
            form = "float16" if tensor.bits is None else f"{tensor.bits} bits"
            shares[f"{tensor.source.kind.name} in {form}"] += tensor.source.rows * tensor.source.columns
    total = shares.total()
    return "weights: " + ", ".join(f"{count / total:.0%} {made}" for made, count in shares.most_common())


def _sampling(header: GgufHeader, otherwise: Mapping[str, float]) -> dict[str, object]:
    """The sampling that the file recommends, as entries of generation_config.json; `otherwise` where none."""
    keys, found = Keys.General, dict[str, object]()
    for name, key in (
        ("temperature", keys.SAMPLING_TEMP), ("top_p", keys.SAMPLING_TOP_P), ("min_p", keys.SAMPLING_MIN_P),
        ("repetition_penalty", keys.SAMPLING_PENALTY_REPEAT),
    ):  # fmt: skip
        if header.has(key):
            found[name] = header.number(key)
    if header.has(keys.SAMPLING_TOP_K):
        found["top_k"] = header.integer(keys.SAMPLING_TOP_K)
    found = found or {**otherwise}
    return found | {"do_sample": found.get("temperature") != 0.0} if found else found


def _quantization(plan: Sequence[PlannedTensor], group_size: int) -> dict[str, Any]:
    """The config's entries: the bits of most weights, and by path those of the others."""
    matrices = [tensor for tensor in plan if tensor.bits is not None]
    if not matrices:
        return {}
    sizes: Counter[int] = Counter()
    for tensor in matrices:
        sizes[tensor.bits or 0] += tensor.source.rows * tensor.source.columns
    ((most, _),) = sizes.most_common(1)
    others = {
        tensor.specs[0].name.removesuffix(".weight"): {"group_size": group_size, "bits": tensor.bits}
        for tensor in matrices
        if tensor.bits != most
    }
    quantization = {"group_size": group_size, "bits": most, "mode": "affine", **others}
    return {"quantization": quantization, "quantization_config": quantization}


def _specs(
    header: GgufHeader, tensor: GgufTensor, name: str, bits: int | None, group_size: int
) -> tuple[TensorSpec, ...]:
    if not has_values(tensor.kind):
        raise header.refused(f"tensor {tensor.name!r} has type {tensor.kind.name}, which is not supported")
    if bits is None:
        return (TensorSpec(name, "F16", tensor.shape),)
    if tensor.columns % group_size:
        raise header.refused(
            f"tensor {tensor.name!r} has rows of {tensor.columns}, "
            f"which do not divide into groups of {group_size}; choose another --group-size"
        )
    stem = name.removesuffix(".weight")
    groups = (tensor.rows, tensor.columns // group_size)
    return (
        TensorSpec(name, "U32", (tensor.rows, tensor.columns * bits // 32)),
        TensorSpec(f"{stem}.scales", "F16", groups),
        TensorSpec(f"{stem}.biases", "F16", groups),
    )


def _write_tensor(
    writer: BundleWriter, header: GgufHeader, tensor: PlannedTensor, group_size: int, advance: Advance
) -> None:
    """`advance` counts the bytes of the source. Raises ModelError for values that are not finite, OSError."""
    try:
        for first, raw in _chunks(header, tensor):
            for spec, part in zip(tensor.specs, _parts(tensor, raw, group_size), strict=True):
                writer.write_bytes(spec.name, first * part[0].nbytes, np.ascontiguousarray(part).tobytes())
            advance(raw.nbytes)
    except NotFiniteError:
        name = tensor.source.name
        raise header.refused(f"tensor {name!r} holds NaN, or values float16 cannot hold") from None


def _chunks(header: GgufHeader, planned: PlannedTensor) -> Iterator[tuple[int, Bytes]]:
    """Raw rows in their final order with the index of the first. Rows move only within a head."""
    tensor = planned.source
    step = max(1, CHUNK_VALUES // tensor.columns)
    unpair = planned.heads_to_unpair and len(tensor.shape) > 1
    if unpair:
        head_rows = tensor.rows // planned.heads_to_unpair
        step = max(1, step // head_rows) * head_rows
    for first in range(0, tensor.rows, step):
        count = min(step, tensor.rows - first)
        raw = read_rows(header.path, tensor, first, count)
        yield first, _unpaired(raw, count // head_rows) if unpair else raw


def _parts(planned: PlannedTensor, raw: Bytes, group_size: int) -> tuple[npt.NDArray[Any], ...]:
    """What is written of raw rows, for each of `planned.specs`. Raises NotFiniteError."""
    tensor = planned.source
    if planned.bits is not None:
        return group_rows(raw, tensor.kind, planned.bits, group_size)
    with np.errstate(over="ignore"):  # becomes infinite and is refused
        dense = (values(raw, tensor.kind) - np.float32(planned.offset)).astype(np.float16)
    require_finite(dense)
    if len(tensor.shape) > 1:  # its rows were put in order as they were read
        return (dense,)
    vector = dense.reshape(-1)
    return (_unpaired(vector, planned.heads_to_unpair) if planned.heads_to_unpair else vector,)


def _unpaired(rows: npt.NDArray[Scalar], num_heads: int) -> npt.NDArray[Scalar]:
    """Undo `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py: neighbours (2 i, 2 i + 1) to halves."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
