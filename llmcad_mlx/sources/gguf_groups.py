"""GGUF blocks as MLX's affine groups: `w = scale * code + bias`, codes packed eight to a uint32.

Blocks that already are 4-bit codes in groups of 32 with a scale and an offset (Q4_0, Q4_1, Q4_K) keep their
codes; only a Q4_K scale, a product of two numbers, is rounded to float16. Everything else is dequantised and
fitted anew. Layouts: ggml's `ggml-quants.c` and `gguf.quants`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from llmcad_mlx.sources.group_fit import Groups, Halves, fit_groups, packed_codes, require_finite

NATIVE_BITS = 4
NATIVE_GROUP = 32

_NATIVE = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q4_K)

_FLOATS = (GGMLQuantizationType.F16, GGMLQuantizationType.F32, GGMLQuantizationType.F64)
_K = GGMLQuantizationType
_READABLE = frozenset(
    (
        *(_K.BF16, _K.Q4_0, _K.Q4_1, _K.Q5_0, _K.Q5_1, _K.Q8_0),
        *(_K.Q2_K, _K.Q3_K, _K.Q4_K, _K.Q5_K, _K.Q6_K),
        *(_K.IQ4_NL, _K.IQ4_XS, _K.IQ3_S, _K.IQ3_XXS, _K.IQ2_S, _K.IQ2_XS, _K.IQ2_XXS, _K.IQ1_S, _K.IQ1_M),
        *(_K.TQ1_0, _K.TQ2_0, _K.MXFP4),
    )
)
"""Those with a dequantiser in the `gguf` package. Q8_1 and Q8_K have none: no file holds them."""

Bytes = npt.NDArray[np.uint8]


def is_native(kind: GGMLQuantizationType, bits: int, group_size: int) -> bool:
    """Whether blocks of this type keep their codes."""
    return kind in _NATIVE and bits == NATIVE_BITS and group_size == NATIVE_GROUP


def has_values(kind: GGMLQuantizationType) -> bool:
    """Whether `values` can read this type."""
    return kind in _FLOATS or kind in _READABLE


def group_rows(raw: Bytes, kind: GGMLQuantizationType, bits: int, group_size: int) -> Groups:
    """Turn raw rows, (rows, bytes per row) uint8, into MLX groups.

    Raises NotFiniteError, and NotImplementedError as `values` does.
    """
    if not is_native(kind, bits, group_size):
        groups = fit_groups(values(raw, kind), bits, group_size)
    elif kind == GGMLQuantizationType.Q4_K:
        groups = _from_q4_k(raw)
    else:
        groups = _from_q4_0(raw) if kind == GGMLQuantizationType.Q4_0 else _from_q4_1(raw)
    require_finite(groups.scales)
    require_finite(groups.biases)
    return groups


def values(raw: Bytes, kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Dequantise raw rows, (rows, bytes per row) uint8, to (rows, columns) float32.

    Raises NotImplementedError for a type the `gguf` package has no dequantiser for.
    """
    if kind in _FLOATS:
        floats: npt.NDArray[np.float32] = raw.view(kind.name.replace("F", "float")).astype(np.float32)
        return floats
    result: npt.NDArray[np.float32] = dequantize(raw, kind)
    return result


def _from_q4_0(raw: Bytes) -> Groups:
    """Block: d, 16 bytes. `w = d * (code - 8)`."""
    blocks = raw.reshape(raw.shape[0], -1, 18)
    scales = _halves(blocks[..., 0:2])
    with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite and is refused
        biases = scales * np.float16(-8)
    return Groups(packed_codes(_split_nibbles(blocks[..., 2:]), 4), scales, biases)


def _from_q4_1(raw: Bytes) -> Groups:
    """Block: d, m, 16 bytes. `w = d * code + m`."""
    blocks = raw.reshape(raw.shape[0], -1, 20)
    return Groups(
        packed_codes(_split_nibbles(blocks[..., 4:]), 4), _halves(blocks[..., 0:2]), _halves(blocks[..., 2:4])
    )


def _from_q4_k(raw: Bytes) -> Groups:
    """Block of 8 groups: d, dmin, 12 bytes of 6-bit factors, 128 bytes. `w = d * sc * code - dmin * m`."""
    num_rows = raw.shape[0]
    blocks = raw.reshape(num_rows, -1, 144)
    scale_codes, min_codes = _six_bit_factors(blocks[..., 4:16])
    scales = _halves(blocks[..., 0:2]).astype(np.float32)[..., None] * scale_codes
    mins = _halves(blocks[..., 2:4]).astype(np.float32)[..., None] * min_codes
    codes = _split_nibbles(blocks[..., 16:].reshape(num_rows, -1, 4, 32))
    return Groups(
        packed_codes(codes, 4),
        _rounded(scales.reshape(num_rows, -1)),
        _rounded(-mins.reshape(num_rows, -1)),
    )


def _rounded(numbers: npt.NDArray[np.float32]) -> Halves:
    with np.errstate(over="ignore"):  # becomes infinite and is refused
        return numbers.astype(np.float16)


def _six_bit_factors(packed: Bytes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The 8 scale and 8 offset factors of each block from its 12 bytes (`get_scale_min_k4` in ggml)."""
    low, high, mixed = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 63, (mixed & 15) | ((low >> 2) & 48)], axis=-1)
    mins = np.concatenate([high & 63, (mixed >> 4) | ((high >> 2) & 48)], axis=-1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _halves(pairs: Bytes) -> Halves:
    """(..., 2) bytes as (...) float16."""
    return np.ascontiguousarray(pairs).view(np.float16)[..., 0]


def _split_nibbles(data: Bytes) -> Bytes:
    """(rows, ..., n) bytes to (rows, columns) codes: of each n bytes all low halves, then all high ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)
