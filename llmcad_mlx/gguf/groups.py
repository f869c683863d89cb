"""GGUF blocks as MLX's affine groups: `w = scale * code + bias`, codes packed into a stream of uint32.

Blocks that already are codes of 4, 5 or 8 bits in groups of 32 with a scale and an offset (Q4_0, Q4_1, Q4_K, Q5_0,
Q5_1, Q5_K, Q8_0) keep their codes; only a scale of Q4_K and Q5_K, a product of two numbers, is rounded to float16.
Layouts: ggml's `ggml-quants.c` and `gguf.quants`.

Everything else is dequantised and fitted anew, with the smallest squared error a short search finds. `mx.quantize`
spans each group from its smallest to its largest weight. Here scale and bias are fitted to the codes by least
squares, from two starting spans, and the better one is kept. On Qwen2.5-Coder-0.5B that lowers the error of 4-bit
groups from 9.2 to 7.3 % of the weights' size (`python -m convert.quantisation_error`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import Q4_K, dequantize

from llmcad_mlx.errors import UsageError

GROUP_SIZES = (32, 64, 128)
SPAN_SHARES = (1.0, 0.9)
NUM_REFITS = 2

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]


class NotFiniteError(ValueError):
    """Weights hold NaN, infinity, or values that float16 cannot hold."""


class Groups(NamedTuple):
    """codes: (rows, columns * bits / 32) uint32; scales, biases: (rows, columns / group_size) float16."""

    codes: npt.NDArray[np.uint32]
    scales: Halves
    biases: Halves


def check_groups(bits: int | None, group_size: int | None, choices: Sequence[int]) -> None:
    """Raise UsageError for options of a conversion that cannot be: bits beside `choices`, groups MLX has not."""
    for option, value, allowed in (("bits", bits, choices), ("group-size", group_size, GROUP_SIZES)):
        if value is not None and value not in allowed:
            raise UsageError(f"--{option}: {value} is not one of {', '.join(map(str, allowed))}")


def group_rows(raw: Bytes, kind: Kind, bits: int, group_size: int) -> Groups:
    """Raw rows, (rows, bytes per row) uint8, as MLX groups. Raises NotFiniteError, and the error of `values`."""
    keep = _KEEPING.get(kind)
    if keep is not None and (bits, group_size) == (kept_bits(kind), 32):
        groups = keep(raw)
    else:
        groups = _fitted(values(raw, kind), bits, group_size)
    require_finite(groups.scales)
    require_finite(groups.biases)
    return groups


def kept_bits(kind: Kind) -> int | None:
    """Bits of groups that are as precise as blocks of this type; None for floating point.

    Blocks of 2 and 3 bits have a scale for each 16 weights or codes that are unevenly spaced: groups of 4 bits
    come near them. The 16 values of MXFP4 are multiples of a half up to 6, which 5 bits hold exactly.
    """
    name = str(kind.name)
    if name.startswith(("F", "BF")):
        return None
    return _BITS_OF.get(name, 4)


_BITS_OF = {
    "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "MXFP4": 5, "Q6_K": 6, "IQ4_NL": 6, "IQ4_XS": 6, "Q8_0": 8, "Q8_1": 8,
    "Q8_K": 8,
}  # fmt: skip


def has_values(kind: Kind) -> bool:
    """Whether `values` can read this type."""
    try:
        values(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return str(kind.name) != "NVFP4"  # its scales for whole tensors stand beside it in the file


def values(raw: Bytes, kind: Kind) -> npt.NDArray[np.float32]:
    """Dequantise raw rows, (rows, bytes per row) uint8, to (rows, columns) float32. Raises NotImplementedError for
    a type the `gguf` package has no dequantiser for."""
    return raw.view(np.float64).astype(np.float32) if kind == Kind.F64 else dequantize(raw, kind)


def require_finite(array: npt.NDArray[Any]) -> None:
    if not np.isfinite(array).all():
        raise NotFiniteError


def _packed(codes: Bytes, bits: int) -> npt.NDArray[np.uint32]:
    """(rows, columns) codes to MLX's packing: one stream of bits, lowest first: (rows, columns * bits / 32)."""
    packed: Bytes
    if bits == 4:
        packed = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    else:
        stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        packed = np.packbits(stream.reshape(codes.shape[0], -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4").astype(np.uint32, copy=False)


def _fitted(weights: npt.NDArray[np.float32], bits: int, group_size: int) -> Groups:
    require_finite(weights)
    rows = weights.shape[0]
    groups = mx.array(weights).reshape(rows, -1, group_size)
    whole, narrow = (_fit(groups, share, 2**bits - 1) for share in SPAN_SHARES)
    better = narrow[-1] < whole[-1]
    codes, scale, bias = (mx.where(better, new, old) for new, old in zip(narrow[:-1], whole[:-1], strict=True))
    scales, biases = (np.array(part.astype(mx.float16))[..., 0] for part in (scale, bias))
    return Groups(_packed(np.array(codes.astype(mx.uint8)).reshape(rows, -1), bits), scales, biases)


def _fit(groups: mx.array, share: float, top: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Start from `share` of each group's span; codes and least squares in turn; float16 numbers at the end.

    Returns codes (rows, groups, group_size), and scale, bias and squared error (rows, groups, 1), all float32.
    """
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2 * share
    scale, bias = 2 * half / top, middle - half
    for _ in range(NUM_REFITS):
        scale, bias = _least_squares(groups, _nearest(groups, scale, bias, top), scale, bias)
    scale, bias = (part.astype(mx.float16).astype(mx.float32) for part in (scale, bias))
    codes = _nearest(groups, scale, bias, top)
    return codes, scale, bias, mx.square(groups - (codes * scale + bias)).sum(axis=-1, keepdims=True)


def _nearest(groups: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    """The code whose value is nearest to each weight. A constant group has scale 0; any code will do."""
    return mx.clip(mx.round((groups - bias) / mx.where(scale > 0, scale, 1)), 0, top)


def _least_squares(
    groups: mx.array, codes: mx.array, scale: mx.array, bias: mx.array
) -> tuple[mx.array, mx.array]:
    """Scale and bias with the smallest squared error for these codes; the old ones where all are equal."""
    code_mean, mean = codes.mean(axis=-1, keepdims=True), groups.mean(axis=-1, keepdims=True)
    centred = codes - code_mean
    spread = mx.square(centred).sum(axis=-1, keepdims=True)
    fitted = (centred * (groups - mean)).sum(axis=-1, keepdims=True) / mx.where(spread > 0, spread, 1)
    usable = fitted > 0
    return mx.where(usable, fitted, scale), mx.where(usable, mean - fitted * code_mean, bias)


def _from_blocks(raw: Bytes, bits: int, has_offset: bool) -> Groups:
    """Q4_0, Q5_0: d, `w = d * (code - 2^(bits - 1))`; Q4_1, Q5_1: d, m, `w = d * code + m`. Then 4 bytes of the
    codes' highest bits where there are 5, and 16 bytes of the others."""
    begin, highest = (4 if has_offset else 2), (4 if bits == 5 else 0)
    blocks = raw.reshape(raw.shape[0], -1, begin + highest + 16)
    codes, scales = _split_nibbles(blocks[..., begin + highest :]), _halves(blocks[..., 0:2])
    if highest:
        codes |= _fifth_bits(blocks[..., begin : begin + 4]).reshape(codes.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite and is refused
        biases = _halves(blocks[..., 2:4]) if has_offset else scales * np.float16(-(2 ** (bits - 1)))
    return Groups(_packed(codes, bits), scales, biases)


def _from_q8_0(raw: Bytes) -> Groups:
    """d, 32 signed bytes: `w = d * byte`."""
    blocks = raw.reshape(raw.shape[0], -1, 34)
    codes, scales = blocks[..., 2:].reshape(raw.shape[0], -1) ^ np.uint8(128), _halves(blocks[..., 0:2])
    with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite and is refused
        return Groups(_packed(codes, 8), scales, scales * np.float16(-128))


def _from_k(raw: Bytes, bits: int) -> Groups:
    """Q4_K, Q5_K, block of 8 groups: d, dmin, 12 bytes of 6-bit factors, 32 bytes of the codes' highest bits where
    there are 5, 128 bytes of the others. `w = d * sc * code - dmin * m`."""
    num_rows, highest = raw.shape[0], 32 if bits == 5 else 0
    blocks = raw.reshape(num_rows, -1, 144 + highest)
    scale_codes, min_codes = (
        part.reshape(num_rows, -1, 8) for part in Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
    )
    scales = _halves(blocks[..., 0:2]).astype(np.float32)[..., None] * scale_codes
    mins = _halves(blocks[..., 2:4]).astype(np.float32)[..., None] * min_codes
    codes = _split_nibbles(blocks[..., 16 + highest :].reshape(num_rows, -1, 4, 32))
    if highest:  # bit j of byte i belongs to the i-th code of group j
        bits_of = np.unpackbits(blocks[..., 16:48], axis=-1, bitorder="little").reshape(num_rows, -1, 32, 8)
        codes |= bits_of.swapaxes(-1, -2).reshape(codes.shape) << np.uint8(4)
    with np.errstate(over="ignore"):  # becomes infinite and is refused
        halves = (part.reshape(num_rows, -1).astype(np.float16) for part in (scales, -mins))
        return Groups(_packed(codes, bits), *halves)


def _fifth_bits(data: Bytes) -> Bytes:
    """(..., 4) bytes, a bit for each of 32 codes in order, where they belong in these: (..., 32)."""
    return np.unpackbits(data, axis=-1, bitorder="little") << np.uint8(4)


def _halves(pairs: Bytes) -> Halves:
    return np.ascontiguousarray(pairs).view(np.float16)[..., 0]


def _split_nibbles(data: Bytes) -> Bytes:
    """(rows, ..., n) bytes to (rows, columns) codes: of each n bytes all low halves, then all high ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)


_KEEPING: dict[Kind, Callable[[Bytes], Groups]] = {
    Kind.Q4_0: partial(_from_blocks, bits=4, has_offset=False),
    Kind.Q4_1: partial(_from_blocks, bits=4, has_offset=True),
    Kind.Q4_K: partial(_from_k, bits=4),
    Kind.Q5_0: partial(_from_blocks, bits=5, has_offset=False),
    Kind.Q5_1: partial(_from_blocks, bits=5, has_offset=True),
    Kind.Q5_K: partial(_from_k, bits=5),
    Kind.Q8_0: _from_q8_0,
}
