"""A GGUF file's rotary scaling as mlx-lm's `rope_scaling`.

Llama 3 files carry no scaling fields: a tensor divides each frequency instead. mlx-lm computes the same
numbers from four parameters, so those are found again by trying the published ones. Phi 3 files carry two
such tensors, which config.json takes as they are.
Formulas: `Llama3RoPE`, `YarnRoPE` and `SuScaledRoPE` in mlx-lm's `rope_utils.py`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.gguf_dimensions import Dimensions
from llmcad_mlx.sources.gguf_groups import values
from llmcad_mlx.sources.gguf_header import GgufHeader, read_rows
from llmcad_mlx.sources.gguf_metadata import Metadata, shortest_float32
from llmcad_mlx.sources.gguf_names import CONFIGURED, LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS

LLAMA3_CONTEXT = 8192
LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.3; Llama 3.2
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0

ORIGINAL_CONTEXT = ".rope.scaling.original_context_length"
# What llama.cpp multiplies YaRN's attention with; mlx-lm computes only the published factor.
_YARN_PLAIN = {
    ".rope.scaling.attn_factor": 1.0,
    ".rope.scaling.yarn_attn_factor": 1.0,
    ".rope.scaling.yarn_ext_factor": 1.0,
    ".rope.scaling.yarn_log_multiplier": 0.0,
}


def read_rope_scaling(
    header: GgufHeader, metadata: Metadata, sizes: Dimensions, kinds: tuple[str, ...]
) -> dict[str, object] | None:
    """mlx-lm's `rope_scaling` record for the file, None when positions are not scaled.

    `kinds` are those the family's model can compute, of "llama3", "linear", "yarn" and "longrope".
    Raises ModelError for another kind, and for numbers that mlx-lm's formulas do not give.
    """
    found = [name for name in sorted(CONFIGURED) if name in header.tensors]
    if found == [ROPE_FACTORS] and "llama3" in kinds:
        return _llama3(header, metadata, sizes)
    if found == sorted((LONG_FACTORS, SHORT_FACTORS)) and "longrope" in kinds:
        return _longrope(header, metadata, sizes)
    if found:
        raise ModelError(f"{header.path}: {metadata.prefix} with {' and '.join(found)} is not supported")
    return _scaled(header, metadata, kinds)


def _scaled(header: GgufHeader, metadata: Metadata, kinds: tuple[str, ...]) -> dict[str, object] | None:
    kind = metadata.text(".rope.scaling.type", "linear")  # llama.cpp's default too
    factor = metadata.number(".rope.scaling.factor", 0.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if factor <= 0 or kind not in kinds or kind not in ("linear", "yarn"):
        known = " and ".join(name for name in ("linear", "yarn") if name in kinds) or "none"
        raise ModelError(
            f"{header.path}: {metadata.prefix} with rotary scaling {kind[:40]!r} by {factor:g} "
            f"is not supported ({known} is)"
        )
    return {"type": "linear", "factor": factor} if kind == "linear" else _yarn(metadata, factor)


def _yarn(metadata: Metadata, factor: float) -> dict[str, object]:
    for key, plain in _YARN_PLAIN.items():
        if metadata.number(key, plain) != plain:
            raise metadata.wrong(key, metadata.number(key))
    context = metadata.positive(ORIGINAL_CONTEXT)
    scaling: dict[str, object] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": context,
    }
    for name in ("beta_fast", "beta_slow"):
        if metadata.has(f".rope.scaling.yarn_{name}"):
            scaling[name] = metadata.above_zero(f".rope.scaling.yarn_{name}")
    return scaling


def _llama3(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> dict[str, object]:
    divisors = _factors(header, ROPE_FACTORS, sizes)
    base = metadata.above_zero(".rope.freq_base", 10000.0)
    for factor in LLAMA3_FACTORS:
        if np.allclose(llama3_divisors(sizes.head_dim, base, factor), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": LLAMA3_CONTEXT,
            }
    raise ModelError(f"{header.path}: the frequencies in {ROPE_FACTORS} are not those of a known Llama 3 model")


def llama3_divisors(head_dim: int, base: float, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3 divides each of its head_dim / 2 frequencies by: (head_dim / 2,) float64."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    return 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1))


def _longrope(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> dict[str, object]:
    """mlx-lm computes the factor on queries and keys from the two context lengths, so the file's must agree."""
    context, original = metadata.positive(".context_length"), metadata.positive(ORIGINAL_CONTEXT)
    scale = context / original
    expected = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0
    if not math.isclose(metadata.number(".rope.scaling.attn_factor", expected), expected, rel_tol=1e-4):
        raise metadata.wrong(".rope.scaling.attn_factor", metadata.number(".rope.scaling.attn_factor"))
    long, short = (_factors(header, name, sizes) for name in (LONG_FACTORS, SHORT_FACTORS))
    return {
        "type": "longrope",
        "long_factor": [shortest_float32(float(number)) for number in long],
        "short_factor": [shortest_float32(float(number)) for number in short],
    }


def _factors(header: GgufHeader, name: str, sizes: Dimensions) -> npt.NDArray[np.float32]:
    """One positive number for each rotated pair: (rotated / 2,) float32."""
    tensor = header.tensors[name]
    if tensor.shape != (sizes.rotated // 2,):
        raise ModelError(
            f"{header.path}: tensor {name!r} is {tensor.shape}, expected {(sizes.rotated // 2,)} as for its heads"
        )
    try:
        factors = values(read_rows(header.path, tensor, 0, 1), tensor.kind).reshape(-1)
    except NotImplementedError:
        raise ModelError(f"{header.path}: tensor {name!r} has type {tensor.kind.name}, not supported") from None
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(f"{header.path}: tensor {name!r} holds numbers that cannot divide a frequency")
    return factors
