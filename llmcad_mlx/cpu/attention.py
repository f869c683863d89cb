"""Attention, normalisation and activation for Linux CPUs, with the guarantees of `cpu.kernels`.

Every sum runs in *position* order, wherever the keys lie in the cache: a row's result depends on which
tokens it sees, not on slots, on dead branches between them or on the rows it is computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from llmcad_mlx.cpu.compiling import kernel
from llmcad_mlx.cpu.kernels import (
    _F32,
    _F32V,
    _I32,
    _I32V,
    _I64,
    LANES,
    _fma,
    _load,
    _Loop,
    _splat,
    _store,
    _sum_lanes,
    _void,
    call_vector,
    pack_rows,
    tile_packed,
)

# Cephes' expf: 2^n times a polynomial in the rest; relative error below 2e-7.
_EXP_POLYNOMIAL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip
_LOG2_E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP_MIN = -87.0

# Below these sizes one thread is done before a second one has woken up.
_FEW_BLOCKS = 2048  # vectors of an activation
_FEW_SCORES = 1 << 18  # multiplications of an attention


def _constant(value: float) -> Any:
    return ir.Constant(_F32V, [value] * LANES)


def _exp(builder: Any, x: Any) -> Any:
    """exp of 16 lanes; lanes below -87 give exp(-87)."""
    x = call_vector(builder, "maxnum", x, _constant(_EXP_MIN))
    x = call_vector(builder, "minnum", x, _constant(-_EXP_MIN))
    n = call_vector(builder, "floor", _fma(builder, x, _constant(_LOG2_E), _constant(0.5)))
    r = _fma(builder, n, _constant(-_LN2_HIGH), x)
    r = _fma(builder, n, _constant(-_LN2_LOW), r)
    y = _constant(_EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        y = _fma(builder, y, r, _constant(coefficient))
    y = builder.fadd(_fma(builder, y, builder.fmul(r, r), r), _constant(1.0))
    exponent = builder.add(builder.fptosi(n, _I32V), ir.Constant(_I32V, [127] * LANES))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(_I32V, [23] * LANES)), _F32V)
    return builder.fmul(y, power)


@intrinsic
def _exp_shifted(typing, at, blocks, shift):  # type: ignore[no-untyped-def]
    """In place: 16 * blocks floats at `at` become exp(x - shift)."""

    def emit(builder, at, blocks, shift):  # type: ignore[no-untyped-def]
        shifts = _splat(builder, shift)
        loop = _Loop(builder, _I64(0), blocks, [])
        offset = builder.mul(loop.index, _I64(64))
        x = builder.fsub(_load(builder, at, offset, _F32V, 4), shifts)
        _store(builder, _exp(builder, x), at, offset)
        loop.close([])

    return types.void(types.intp, types.intp, types.float32), _void(emit)


@intrinsic
def _silu_times(typing, gate, up, blocks):  # type: ignore[no-untyped-def]
    """In place at `gate`: silu(gate) * up over 16 * blocks floats."""

    def emit(builder, gate, up, blocks):  # type: ignore[no-untyped-def]
        loop = _Loop(builder, _I64(0), blocks, [])
        offset = builder.mul(loop.index, _I64(64))
        x = _load(builder, gate, offset, _F32V, 4)
        e = _exp(builder, builder.fsub(_constant(0.0), x))
        y = builder.fdiv(x, builder.fadd(e, _constant(1.0)))
        _store(builder, builder.fmul(y, _load(builder, up, offset, _F32V, 4)), gate, offset)
        loop.close([])

    return types.void(types.intp, types.intp, types.intp), _void(emit)


def _summing(add: Callable[[Any, Any, Any], Any]) -> Any:
    """An intrinsic over 16 * blocks floats at `at`; add(builder, x, total): the total with vector x."""

    @intrinsic
    def summed(typing, at, blocks):  # type: ignore[no-untyped-def]
        signature = types.float32(types.intp, types.intp)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            at, blocks = args
            loop = _Loop(builder, _I64(0), blocks, [_constant(0.0)])
            x = _load(builder, at, builder.mul(loop.index, _I64(64)), _F32V, 4)
            (total,) = loop.close([add(builder, x, loop.values[0])])
            # By the same tree as the sums of a product.
            return builder.extract_element(_sum_lanes(builder, [total] * 4), _I32(0))

        return signature, codegen

    return summed


_sum_squares = _summing(lambda builder, x, total: _fma(builder, x, x, total))
_sum = _summing(lambda builder, x, total: builder.fadd(total, x))


@intrinsic(prefer_literal=True)
def _values_tile(typing, p, p_step, v, v_step, count, out, out_step, vectors, mr):  # type: ignore[no-untyped-def]
    """out[m] += sum over j of p[m, j] * v[j], in order of j; `vectors` * 16 floats per row."""
    num_vectors, num_rows = vectors.literal_value, mr.literal_value

    def emit(builder, p, p_step, v, v_step, count, out, out_step, _vectors, _mr):  # type: ignore[no-untyped-def]
        places = [
            builder.add(builder.mul(out_step, _I64(m)), _I64(64 * i))
            for m in range(num_rows)
            for i in range(num_vectors)
        ]
        start = [_load(builder, out, place, _F32V, 4) for place in places]
        loop = _Loop(builder, _I64(0), count, start)
        acc = list(loop.values)
        row = builder.mul(loop.index, v_step)
        values = [_load(builder, v, builder.add(row, _I64(64 * i)), _F32V, 4) for i in range(num_vectors)]
        for m in range(num_rows):
            p_at = builder.add(builder.mul(p_step, _I64(m)), builder.mul(loop.index, _I64(4)))
            weight = _splat(builder, _load(builder, p, p_at, _F32, 4))
            for i in range(num_vectors):
                at = m * num_vectors + i
                acc[at] = _fma(builder, weight, values[i], acc[at])
        for place, value in zip(places, loop.close(acc), strict=True):
            _store(builder, value, out, place)

    return types.void(*[types.intp] * 7, vectors, mr), _void(emit)


@kernel(inline="always")
def _values_rows(p, p_step, v, v_step, count, out, out_step, dim, rows):  # type: ignore[no-untyped-def]
    """`_values_tile` for any row count and any head dimension that is a multiple of 32."""
    for first in range(0, dim, 64):
        v_at, m = v + 4 * first, 0
        while m < rows:
            p_at, out_at = p + m * p_step, out + 4 * first + m * out_step
            if dim - first < 64:
                _values_tile(p_at, p_step, v_at, v_step, count, out_at, out_step, 2, 1)
                m += 1
            elif rows - m >= 6:
                _values_tile(p_at, p_step, v_at, v_step, count, out_at, out_step, 4, 6)
                m += 6
            elif rows - m >= 2:
                _values_tile(p_at, p_step, v_at, v_step, count, out_at, out_step, 4, 2)
                m += 2
            else:
                _values_tile(p_at, p_step, v_at, v_step, count, out_at, out_step, 4, 1)
                m += 1


@kernel()
def _score_run(q, keys, slot, count, out, out_step, rows):  # type: ignore[no-untyped-def]
    """out[m, j] = q[m] . keys[slot + j]; writes up to 3 floats more per row. keys (capacity, dim)."""
    dim = keys.shape[1]
    base, step = keys.ctypes.data, keys.strides[0]
    for j in range(0, count, 4):
        at = base + (slot + j) * step
        tile_packed(keys, keys, at, step, at, at, 0, 0, q, dim // 32, out + 4 * j, out_step, rows)


@kernel()
def rms_norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """Rows of out = x * rsqrt(mean(x^2) + eps) * weight; the last dimension is a multiple of 16."""
    dim = x.shape[1]
    for m in range(x.shape[0]):
        mean = _sum_squares(x.ctypes.data + m * x.strides[0], dim // 16) / np.float32(dim)
        scale = np.float32(1.0) / np.sqrt(mean + np.float32(eps))
        for i in range(dim):
            out[m, i] = x[m, i] * scale * weight[i]


@kernel(parallel=True)
def silu_times(gate, up, threads):  # type: ignore[no-untyped-def]
    """gate = silu(gate) * up, both (M, N) contiguous with N a multiple of 16."""
    blocks = gate.size // 16
    if blocks < _FEW_BLOCKS:
        _silu_times(gate.ctypes.data, up.ctypes.data, blocks)
        return
    for thread in nb.prange(threads):
        first, last = thread * blocks // threads, (thread + 1) * blocks // threads
        _silu_times(gate.ctypes.data + 64 * first, up.ctypes.data + 64 * first, last - first)


@kernel(inline="always")
def _softmax(scores, m, lowest, seen):  # type: ignore[no-untyped-def]
    """In place: row m of scores becomes the softmax over [lowest, seen), and 0 outside."""
    at, width = scores.ctypes.data + m * scores.strides[0], scores.shape[1]
    top = scores[m, lowest]
    for j in range(lowest, seen):
        top = max(top, scores[m, j])
    for j in range(lowest):
        scores[m, j] = np.float32(0.0)
    # From the block of `lowest` on, so that a score's lane depends on its position alone.
    block = lowest // 16
    end = (seen + 15) // 16
    _exp_shifted(at + 64 * block, end - block, top)
    for j in range(block * 16, lowest):
        scores[m, j] = np.float32(0.0)
    for j in range(seen, width):
        scores[m, j] = np.float32(0.0)
    total = _sum(at + 64 * block, end - block)
    for j in range(lowest, seen):
        scores[m, j] = scores[m, j] / total


@kernel(inline="always")
def _values_of_tree(scores, values, plan, first, out, out_step):  # type: ignore[no-untyped-def]
    """out[m] += scores[m] @ values: those in `runs`, then the row's own. values (capacity, dim)."""
    count, dim = scores.shape[0], values.shape[1]
    at, step = scores.ctypes.data, scores.strides[0]
    v, v_step = values.ctypes.data, values.strides[0]
    runs, own, own_ends, done = plan.runs, plan.own, plan.own_ends, 0
    for r in range(runs.shape[0]):
        _values_rows(at + 4 * done, step, v + runs[r, 0] * v_step, v_step, runs[r, 1], out, out_step, dim, count)
        done += runs[r, 1]
    for m in range(count):
        row = first + m
        begin = own_ends[row - 1] if row > 0 else 0
        place = plan.positions[row] + 1 - (own_ends[row] - begin)
        for j in range(begin, own_ends[row]):
            p = at + m * step + 4 * (place + j - begin)
            _values_rows(p, step, v + own[j] * v_step, v_step, 1, out + m * out_step, out_step, dim, 1)


@kernel()
def _attend(q, keys, values, plan, scale, out, item, prefix, longest):  # type: ignore[no-untyped-def]
    """One head of one tile of up to 6 rows."""
    positions, runs, own_ends, causal = plan.positions, plan.runs, plan.own_ends, plan.causal
    rows, heads, dim = q.shape
    group = heads // keys.shape[0]
    tiles = (rows + 5) // 6
    head, tile = item // tiles, item % tiles
    first, last = tile * rows // tiles, (tile + 1) * rows // tiles
    count = last - first
    keys_of, values_of = keys[head // group], values[head // group]
    packed = np.empty(count * dim, np.float32)
    pack_rows(q[:, head], first, count, False, packed)
    for i in range(packed.size):
        packed[i] *= scale
    width = (longest + 31) // 16 * 16
    scores = np.empty((count, width), np.float32)
    at, step = scores.ctypes.data, scores.strides[0]
    q_at = packed.ctypes.data
    most = positions[last - 1] + 1  # what the last row sees
    if causal:
        _score_run(q_at, keys_of, 0, most, at, step, count)
    else:
        done = 0
        for r in range(runs.shape[0]):
            _score_run(q_at, keys_of, runs[r, 0], runs[r, 1], at + 4 * done, step, count)
            done += runs[r, 1]
    single = np.empty(dim, np.float32)
    for m in range(count):
        row = first + m
        seen = positions[row] + 1
        if not causal:
            begin = own_ends[row - 1] if row > 0 else 0
            hidden = seen - prefix - (own_ends[row] - begin)
            for c in range(dim // 16):
                for i in range(16):
                    single[c * 16 + i] = packed[(c * count + m) * 16 + i]
            for j in range(begin, own_ends[row]):
                place = prefix + hidden + j - begin
                _score_run(single.ctypes.data, keys_of, plan.own[j], 1, at + m * step + 4 * place, step, 1)
        lowest = plan.first_visible[row]
        if not causal and lowest >= prefix:
            lowest = seen - (own_ends[row] - (own_ends[row - 1] if row > 0 else 0))
        _softmax(scores, m, lowest, seen)
        for i in range(dim):
            out[row, head, i] = np.float32(0.0)
    out_at = out.ctypes.data + first * out.strides[0] + head * out.strides[1]
    if causal:
        v_at, v_step = values_of.ctypes.data, values_of.strides[0]
        _values_rows(at, step, v_at, v_step, most, out_at, out.strides[0], dim, count)
    else:
        _values_of_tree(scores, values_of, plan, first, out_at, out.strides[0])


@kernel(parallel=True)
def attention(q, keys, values, plan, scale, out):  # type: ignore[no-untyped-def]
    """Attention of M rows over the committed sequence and their own slots.

    q, out (M, heads, dim); keys, values (kv_heads, capacity, dim) float32, dim a multiple of 32, three
    slots of spare capacity. plan: an `AttentionPlan` for the rows.
    """
    rows, heads, dim = q.shape
    prefix = 0
    for r in range(plan.runs.shape[0]):
        prefix += plan.runs[r, 1]
    longest = prefix + 16
    for m in range(rows):
        longest = max(longest, plan.positions[m] + 1 + 16)
    items = heads * ((rows + 5) // 6)
    if items * longest * dim < _FEW_SCORES:
        for item in range(items):
            _attend(q, keys, values, plan, scale, out, item, prefix, longest)
        return
    for item in nb.prange(items):
        _attend(q, keys, values, plan, scale, out, item, prefix, longest)
