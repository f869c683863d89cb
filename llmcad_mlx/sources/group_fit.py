"""Weights to MLX's affine groups, `w = scale * code + bias`, with the smallest squared error a short search finds.

`mx.quantize` spans each group from its smallest to its largest weight. Here scale and bias are fitted to the
codes by least squares, from two starting spans, and the better one is kept. On Qwen2.5-Coder-0.5B that lowers
the error of 4-bit groups from 9.2 to 7.3 % of the weights' size (`convert/quantisation_error.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

SPAN_SHARES = (1.0, 0.9)
NUM_REFITS = 2

Halves = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows of one quantised matrix.

    codes: (rows, columns * bits / 32) uint32; scales, biases: (rows, columns / group_size) float16.
    """

    codes: npt.NDArray[np.uint32]
    scales: Halves
    biases: Halves


@dataclass(frozen=True, slots=True)
class _Fit:
    """codes: (rows, groups, group_size); scale, bias, error: (rows, groups, 1). All float32."""

    codes: mx.array
    scale: mx.array
    bias: mx.array
    error: mx.array


class NotFiniteError(ValueError):
    """Weights hold NaN, infinity, or values that float16 cannot hold."""


def fit_groups(weights: npt.NDArray[np.float32], bits: int, group_size: int) -> Groups:
    """Quantise (rows, columns) float32. Raises NotFiniteError."""
    require_finite(weights)
    rows = weights.shape[0]
    groups = mx.array(weights).reshape(rows, -1, group_size)
    best = _fit(groups, SPAN_SHARES[0], 2**bits - 1)
    for share in SPAN_SHARES[1:]:
        other = _fit(groups, share, 2**bits - 1)
        better = other.error < best.error
        best = _Fit(
            codes=mx.where(better, other.codes, best.codes),
            scale=mx.where(better, other.scale, best.scale),
            bias=mx.where(better, other.bias, best.bias),
            error=mx.minimum(other.error, best.error),
        )
    codes = np.array(best.codes.astype(mx.uint8)).reshape(rows, -1)
    scales, biases = (np.array(part.astype(mx.float16))[..., 0] for part in (best.scale, best.bias))
    require_finite(scales)
    require_finite(biases)
    return Groups(packed_codes(codes, bits), scales, biases)


def packed_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """(rows, columns) codes to MLX's packing: one stream of bits, lowest first: (rows, columns * bits / 32)."""
    packed: npt.NDArray[np.uint8]
    if bits == 4:
        packed = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    else:
        stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        packed = np.packbits(stream.reshape(codes.shape[0], -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4").astype(np.uint32, copy=False)


def require_finite(array: npt.NDArray[Any]) -> None:
    """Raise NotFiniteError when the array holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise NotFiniteError


def _fit(groups: mx.array, share: float, top: int) -> _Fit:
    """Start from `share` of each group's span; codes and least squares in turn; float16 numbers at the end."""
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2 * share
    scale, bias = 2 * half / top, middle - half
    for _ in range(NUM_REFITS):
        scale, bias = _least_squares(groups, _nearest(groups, scale, bias, top), scale, bias)
    scale, bias = (part.astype(mx.float16).astype(mx.float32) for part in (scale, bias))
    codes = _nearest(groups, scale, bias, top)
    error = mx.square(groups - (codes * scale + bias)).sum(axis=-1, keepdims=True)
    return _Fit(codes, scale, bias, error)


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
