"""Matrix multiplication for Linux CPUs that reads MLX's packed weights in place.

MLX's CPU wheel multiplies one activation row after the other and unpacks every weight again for each
of them. Here a weight is unpacked once and used for all rows. Results are *batch-invariant*: every
(row, column) pair owns one 16-lane accumulator that walks the input dimension in order, so a row's
value does not depend on how many rows come with it, on blocking or on threads. That is what keeps
plain and tree decoding equal bit for bit.

The inner tiles are written as explicit LLVM vector code (numba intrinsics) because an auto-vectoriser
may choose another summation order for each loop shape. Vectors are 16 lanes wide everywhere; LLVM
splits them where registers are narrower, without changing the order of sums.

The dtype of a view tells how weights (N, K) are stored: ``uint32`` (N, K/8) are 4-bit groups packed as
`mx.quantize` does, ``int32`` (N, 5K/32) 5-bit, ``int8`` (N, 6K/8) 6-bit, ``uint8`` 8-bit ones; ``float32``,
``int16`` (half precision bits) and ``uint16`` (bfloat16 bits) are dense. Scales and biases (N, K/group) are of the
last three and widened exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from llmcad_mlx.cpu.compiling import kernel

LANES = 16
FEW_ROWS = 20  # up to here `matmul_few` is faster, although each tile of 6 rows unpacks the weights anew
K_BLOCK = 32  # chunks of a block of weights unpacked together
TILE_COLUMNS, TILE_ROWS = 4, 6  # products accumulated in registers
N_BLOCK = 8  # weight rows of that block: with K_BLOCK, 32 KB that stay in the first-level cache

_F32 = ir.FloatType()
_F32V = ir.VectorType(_F32, LANES)
_I8 = ir.IntType(8)
_I8V = ir.VectorType(_I8, LANES)
_I16 = ir.IntType(16)
_I16V = ir.VectorType(_I16, LANES)
_I32 = ir.IntType(32)
_I32V = ir.VectorType(_I32, LANES)
_I64 = ir.IntType(64)


def _load(builder: Any, address: Any, offset: Any, kind: Any, align: int) -> Any:
    pointer = builder.inttoptr(builder.add(address, offset), kind.as_pointer())
    value = builder.load(pointer)
    value.align = align
    return value


def _store(builder: Any, value: Any, address: Any, offset: Any, align: int = 4) -> None:
    pointer = builder.inttoptr(builder.add(address, offset), value.type.as_pointer())
    builder.store(value, pointer).align = align


def call_vector(builder: Any, name: str, *args: Any) -> Any:
    """LLVM's ``name`` of vectors of 16 floats."""
    kind = ir.FunctionType(_F32V, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v16f32"), args)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_vector(builder, "fma", a, b, c)


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at `address`; harmless where nothing is mapped."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, _I8.as_pointer()), _I32(0), _I32(3), _I32(1)])


def _splat(builder: Any, scalar: Any) -> Any:
    vector = builder.insert_element(ir.Constant(_F32V, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(vector, ir.Constant(_F32V, ir.Undefined), ir.Constant(_I32V, [0] * LANES))


def _widen(builder: Any, value: Any, dtype: Any) -> Any:
    """Exact widening of float32, half bits (int16) or bfloat16 bits (uint16) to float32."""
    vector = isinstance(value.type, ir.VectorType)
    if dtype == types.float32:
        return value
    if dtype == types.int16:
        half = ir.VectorType(ir.HalfType(), LANES) if vector else ir.HalfType()
        return builder.fpext(builder.bitcast(value, half), _F32V if vector else _F32)
    wide = builder.zext(value, _I32V if vector else _I32)
    shift = ir.Constant(_I32V, [16] * LANES) if vector else _I32(16)
    return builder.bitcast(builder.shl(wide, shift), _F32V if vector else _F32)


_SCALAR_OF = {types.float32: _F32, types.int16: _I16, types.uint16: _I16}
_VECTOR_OF = {types.float32: _F32V, types.int16: _I16V, types.uint16: _I16V}


def _bytes_per_chunk(weight: Any) -> int:
    return 4 * _BITS[weight] if weight in _BITS else 128 if weight == types.float32 else 64


_BITS = {types.uint32: 4, types.int32: 5, types.int8: 6, types.uint8: 8}  # of what is stored in groups


def _unpack(builder: Any, weight: Any, scale: Any, w_at: Any, s_at: Any, b_at: Any) -> tuple[Any, Any]:
    """One chunk of a weight row as two float32 vectors, in the order of `pack_rows`: of 4 bits the even elements,
    then the odd ones (low and high nibbles); of others the first half, then the second."""
    zero = _I64(0)
    if weight not in _BITS:
        kind = _VECTOR_OF[weight]
        size = 64 if weight == types.float32 else 32
        parts = [_load(builder, w_at, _I64(i * size), kind, 2) for i in range(2)]
        return _widen(builder, parts[0], weight), _widen(builder, parts[1], weight)
    if weight == types.uint32:
        packed = _load(builder, w_at, zero, _I8V, 1)
        low = builder.and_(packed, ir.Constant(_I8V, [15] * LANES))
        high = builder.lshr(packed, ir.Constant(_I8V, [4] * LANES))
        parts = [low, high]
    elif weight == types.uint8:
        parts = [_load(builder, w_at, _I64(i * LANES), _I8V, 1) for i in range(2)]
    else:
        parts = [_half_of_stream(builder, _BITS[weight], w_at, half) for half in range(2)]
    factor = _splat(builder, _widen(builder, _load(builder, s_at, zero, _SCALAR_OF[scale], 2), scale))
    shift = _splat(builder, _widen(builder, _load(builder, b_at, zero, _SCALAR_OF[scale], 2), scale))
    # A nibble is a small positive integer: the signed conversion is exact and cheaper than the unsigned.
    wide = [part if part.type == _I32V else builder.zext(part, _I32V) for part in parts]
    values = [builder.sitofp(part, _F32V) for part in wide]
    return _fma(builder, values[0], factor, shift), _fma(builder, values[1], factor, shift)


def _half_of_stream(builder: Any, bits: int, w_at: Any, half: int) -> Any:
    """16 of the 32 codes, each of 5 or 6 bits, that lie one behind the other in a chunk: each is in a pair of
    neighbouring bytes, or in the last byte alone."""
    start = half * (4 * bits - LANES)  # no load reaches beyond the chunk, which may be the last
    first = [(half * LANES + lane) * bits - 8 * start for lane in range(LANES)]
    packed = _load(builder, w_at, _I64(start), _I8V, 1)
    low, high = (
        builder.zext(
            builder.shuffle_vector(packed, ir.Constant(_I8V, ir.Undefined), ir.Constant(_I32V, places)), _I32V
        )
        for places in ([bit // 8 for bit in first], [min(bit // 8 + 1, LANES - 1) for bit in first])
    )
    pair = builder.or_(low, builder.shl(high, ir.Constant(_I32V, [8] * LANES)))
    shifted = builder.lshr(pair, ir.Constant(_I32V, [bit % 8 for bit in first]))
    return builder.and_(shifted, ir.Constant(_I32V, [2**bits - 1] * LANES))


class _Loop:
    """A counted loop that carries vector accumulators in phi nodes (registers, not memory)."""

    def __init__(self, builder: Any, start: Any, stop: Any, carried: list[Any]) -> None:
        self.builder = builder
        entry = builder.block
        self.head = builder.append_basic_block("head")
        self.body = builder.append_basic_block("body")
        self.exit = builder.append_basic_block("exit")
        builder.branch(self.head)
        builder.position_at_end(self.head)
        self.index = builder.phi(_I64)
        self.index.add_incoming(start, entry)
        self.values = [builder.phi(v.type) for v in carried]
        for phi, value in zip(self.values, carried, strict=True):
            phi.add_incoming(value, entry)
        builder.cbranch(builder.icmp_signed("<", self.index, stop), self.body, self.exit)
        builder.position_at_end(self.body)

    def close(self, carried: list[Any]) -> list[Any]:
        latch = self.builder.block
        self.index.add_incoming(self.builder.add(self.index, _I64(1)), latch)
        for phi, value in zip(self.values, carried, strict=True):
            phi.add_incoming(value, latch)
        self.builder.branch(self.head)
        self.builder.position_at_end(self.exit)
        return list(self.values)


def _halve(builder: Any, a: Any, b: Any, width: int) -> Any:
    """Add neighbouring blocks of `width` lanes of `a`, then of `b`, into one vector."""
    lanes = range(LANES)
    low = [i for i in range(2 * LANES) if i // width % 2 == 0]
    picks = [ir.Constant(_I32V, [low[i] + shift for i in lanes]) for shift in (0, width)]
    return builder.fadd(builder.shuffle_vector(a, b, picks[0]), builder.shuffle_vector(a, b, picks[1]))


def _sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """Sum the lanes of four vectors at once: a 4-lane result, each by the same tree of halvings."""
    a, b, c, d = vectors
    ab, cd = _halve(builder, a, b, 8), _halve(builder, c, d, 8)
    quarters = _halve(builder, ab, cd, 4)
    pairs = _halve(builder, quarters, quarters, 2)
    sums = _halve(builder, pairs, pairs, 1)
    first = ir.Constant(ir.VectorType(_I32, 4), [0, 1, 2, 3])
    return builder.shuffle_vector(sums, ir.Constant(_F32V, ir.Undefined), first)


def _multiply(builder: Any, weights: list[Any], x_at: Any, acc: list[Any], num_rows: int) -> None:
    """acc[n][m] += weights[n] . x[m] for both halves of a chunk; x packed as (chunk, half, row, lane)."""
    for half in range(2):
        for m in range(num_rows):
            x = _load(builder, x_at, _I64((half * num_rows + m) * 64), _F32V, 4)
            for n, weight in enumerate(weights):
                acc[n * num_rows + m] = _fma(builder, weight[half], x, acc[n * num_rows + m])


def _void(emit: Callable[..., None]) -> Any:
    """An intrinsic's code generator from emit(builder, *arguments), for one that returns nothing."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit(builder, *args)
        return context.get_dummy_value()

    return codegen


def _by_rows(builder: Any, rows: Any, emit: Callable[[int], None]) -> None:
    """Code for each number of rows that a tile may have, of which `rows` chooses at run time."""
    end = builder.append_basic_block("end")
    switch = builder.switch(rows, end)
    for num_rows in range(1, TILE_ROWS + 1):
        block = builder.append_basic_block(f"rows{num_rows}")
        switch.add_case(num_rows, block)
        builder.position_at_end(block)
        emit(num_rows)
        builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def tile_packed(typing, weight, scales, w, w_step, s, b, s_step, shift, x, chunks, out, out_step, rows):  # type: ignore[no-untyped-def]
    """Multiply 4 packed weight rows with up to 6 activation rows over all chunks; unpack in registers."""

    def emit(builder, _weight, _scales, w, w_step, s, b, s_step, shift, x, chunks, out, out_step, rows):  # type: ignore[no-untyped-def]
        chunk_bytes, scale_bytes = _bytes_per_chunk(weight.dtype), scales.dtype.bitwidth // 8

        def tile(num_rows: int) -> None:
            zeros = [ir.Constant(_F32V, [0.0] * LANES)] * (TILE_COLUMNS * num_rows)
            loop = _Loop(builder, _I64(0), chunks, zeros)
            acc = list(loop.values)
            w_offset = builder.mul(loop.index, _I64(chunk_bytes))
            s_offset = builder.mul(builder.lshr(loop.index, shift), _I64(scale_bytes))
            unpacked = []
            for n in range(TILE_COLUMNS):
                w_at = builder.add(builder.add(w, w_offset), builder.mul(w_step, _I64(n)))
                s_row = builder.add(s_offset, builder.mul(s_step, _I64(n)))
                _prefetch(builder, builder.add(w_at, builder.mul(w_step, _I64(TILE_COLUMNS))))
                s_at, b_at = builder.add(s, s_row), builder.add(b, s_row)
                unpacked.append(_unpack(builder, weight.dtype, scales.dtype, w_at, s_at, b_at))
            x_at = builder.add(x, builder.mul(loop.index, _I64(128 * num_rows)))
            _multiply(builder, unpacked, x_at, acc, num_rows)
            acc = loop.close(acc)
            for m in range(num_rows):
                _store(builder, _sum_lanes(builder, acc[m::num_rows]), out, builder.mul(out_step, _I64(m)))

        _by_rows(builder, rows, tile)

    return types.void(weight, scales, *[types.intp] * 11), _void(emit)


@intrinsic
def _unpack_row(typing, weight, scales, w, s, b, shift, first, chunks, out):  # type: ignore[no-untyped-def]
    """Unpack `chunks` chunks of one weight row, from chunk `first` on, to float32 at `out`."""

    def emit(builder, _weight, _scales, w, s, b, shift, first, chunks, out):  # type: ignore[no-untyped-def]
        loop = _Loop(builder, _I64(0), chunks, [])
        chunk = builder.add(loop.index, first)
        w_at = builder.add(w, builder.mul(chunk, _I64(_bytes_per_chunk(weight.dtype))))
        s_offset = builder.mul(builder.lshr(chunk, shift), _I64(scales.dtype.bitwidth // 8))
        s_at, b_at = builder.add(s, s_offset), builder.add(b, s_offset)
        halves = _unpack(builder, weight.dtype, scales.dtype, w_at, s_at, b_at)
        at = builder.mul(loop.index, _I64(128))
        for half in range(2):
            _store(builder, halves[half], out, builder.add(at, _I64(64 * half)))
        loop.close([])

    return types.void(weight, scales, *[types.intp] * 7), _void(emit)


@intrinsic
def _tile_unpacked(typing, w, w_step, x, chunks, acc, rows):  # type: ignore[no-untyped-def]
    """acc[4][rows][lane] += unpacked weight rows times up to 6 packed activation rows over `chunks` chunks."""

    def emit(builder, w, w_step, x, chunks, acc_at, rows):  # type: ignore[no-untyped-def]
        def tile(num_rows: int) -> None:
            count = TILE_COLUMNS * num_rows
            start = [_load(builder, acc_at, _I64(64 * i), _F32V, 4) for i in range(count)]
            loop = _Loop(builder, _I64(0), chunks, start)
            acc = list(loop.values)
            weights = []
            for n in range(TILE_COLUMNS):
                at = builder.add(builder.add(w, builder.mul(loop.index, _I64(128))), builder.mul(w_step, _I64(n)))
                weights.append([_load(builder, at, _I64(64 * half), _F32V, 4) for half in range(2)])
            x_at = builder.add(x, builder.mul(loop.index, _I64(128 * num_rows)))
            _multiply(builder, weights, x_at, acc, num_rows)
            for i, value in enumerate(loop.close(acc)):
                _store(builder, value, acc_at, _I64(64 * i))

        _by_rows(builder, rows, tile)

    return types.void(*[types.intp] * 6), _void(emit)


@intrinsic
def _store_sums(typing, acc, step, out):  # type: ignore[no-untyped-def]
    """Store the lane sums of four accumulators, `step` bytes apart, as four neighbouring floats."""

    def emit(builder, acc, step, out):  # type: ignore[no-untyped-def]
        vectors = [_load(builder, acc, builder.mul(step, _I64(n)), _F32V, 4) for n in range(4)]
        _store(builder, _sum_lanes(builder, vectors), out, _I64(0))

    return types.void(types.intp, types.intp, types.intp), _void(emit)


@kernel()
def pack_rows(x: np.ndarray, first: int, rows: int, split: bool, out: np.ndarray) -> None:
    """Pack activation rows (M, K) [first, first + rows) as (chunk, half, row, lane) into flat `out`. `split` puts
    the even elements of each chunk in the first half and the odd ones in the second."""
    chunks = x.shape[1] // 32
    for m in range(rows):
        for c in range(chunks):
            at = c * 32 * rows + m * 16
            half = rows * 16
            if split:
                for i in range(16):
                    out[at + i] = x[first + m, c * 32 + 2 * i]
                    out[at + half + i] = x[first + m, c * 32 + 2 * i + 1]
            else:
                for i in range(16):
                    out[at + i] = x[first + m, c * 32 + i]
                    out[at + half + i] = x[first + m, c * 32 + 16 + i]


@kernel()
def _tile_bounds(rows):  # type: ignore[no-untyped-def]
    """Where tiles of at most 6 rows begin and end, as even as possible: (tiles + 1,)."""
    tiles = (rows + 5) // 6
    bounds = np.empty(tiles + 1, np.int64)
    for tile in range(tiles + 1):
        bounds[tile] = tile * rows // tiles
    return bounds


@kernel()
def _few_block(packed, bounds, weight, scales, biases, shift, chunks, block, out):  # type: ignore[no-untyped-def]
    """Columns [4 * block, 4 * block + 4) of out, for all rows."""
    n = min(block * 4, weight.shape[0] - 4)
    w_at = weight.ctypes.data + n * weight.strides[0]
    s_at = scales.ctypes.data + n * scales.strides[0]
    b_at = biases.ctypes.data + n * scales.strides[0]
    for tile in range(len(bounds) - 1):
        first, last = bounds[tile], bounds[tile + 1]
        tile_packed(
            weight, scales, w_at, weight.strides[0], s_at, b_at, scales.strides[0], shift,
            packed.ctypes.data + first * chunks * 128, chunks,
            out.ctypes.data + 4 * n + first * out.strides[0], out.strides[0], last - first,
        )  # fmt: skip


@kernel()
def _pack_all(x, bounds, split):  # type: ignore[no-untyped-def]
    packed = np.empty(x.size, np.float32)
    width = x.shape[1]
    for tile in range(len(bounds) - 1):
        first, last = bounds[tile], bounds[tile + 1]
        pack_rows(x, first, last - first, split, packed[first * width : last * width])
    return packed


@kernel(parallel=True)
def matmul_few(x, weight, scales, biases, shift, split, out):  # type: ignore[no-untyped-def]
    """out (M, N) = x (M, K) @ weight.T for few rows: weights are unpacked in registers, never stored."""
    chunks = x.shape[1] // 32
    bounds = _tile_bounds(x.shape[0])
    packed = _pack_all(x, bounds, split)
    for block in nb.prange((weight.shape[0] + 3) // 4):
        _few_block(packed, bounds, weight, scales, biases, shift, chunks, block, out)


@kernel(parallel=True)
def matmul_few_three(x, first, second, third, out1, out2, out3):  # type: ignore[no-untyped-def]
    """Three `matmul_few` of one input in one parallel region: waking threads costs more than a small product. All
    are (weight, scales, biases, shift, split, bias) of equal `split`; the bias is not added."""
    w1, s1, b1, shift1, split, _ = first
    w2, s2, b2, shift2, _, _ = second
    w3, s3, b3, shift3, _, _ = third
    chunks = x.shape[1] // 32
    bounds = _tile_bounds(x.shape[0])
    packed = _pack_all(x, bounds, split)
    blocks1 = (w1.shape[0] + 3) // 4
    blocks2 = blocks1 + (w2.shape[0] + 3) // 4
    for item in nb.prange(blocks2 + (w3.shape[0] + 3) // 4):
        if item < blocks1:
            _few_block(packed, bounds, w1, s1, b1, shift1, chunks, item, out1)
        elif item < blocks2:
            _few_block(packed, bounds, w2, s2, b2, shift2, chunks, item - blocks1, out2)
        else:
            _few_block(packed, bounds, w3, s3, b3, shift3, chunks, item - blocks2, out3)


@kernel(parallel=True)
def matmul_many(x, weight, scales, biases, shift, split, threads, out):  # type: ignore[no-untyped-def]
    """out (M, N) = x (M, K) @ weight.T for many rows: a block of weights is unpacked once for all rows."""
    rows, chunks, num_out = x.shape[0], x.shape[1] // 32, weight.shape[0]
    bounds = _tile_bounds(rows)
    tiles = len(bounds) - 1
    packed = np.empty(x.size, np.float32)
    for tile in nb.prange(tiles):
        first, last = bounds[tile], bounds[tile + 1]
        pack_rows(x, first, last - first, split, packed[first * chunks * 32 : last * chunks * 32])
    blocks = (num_out + N_BLOCK - 1) // N_BLOCK
    for thread in nb.prange(threads):
        unpacked = np.empty(N_BLOCK * K_BLOCK * 32, np.float32)
        acc = np.empty(rows * N_BLOCK * 16, np.float32)
        for block in range(thread * blocks // threads, (thread + 1) * blocks // threads):
            n = max(0, min(block * N_BLOCK, num_out - N_BLOCK))
            width = min(N_BLOCK, num_out // 4 * 4)
            acc[:] = 0.0
            for start in range(0, chunks, K_BLOCK):
                count = min(K_BLOCK, chunks - start)
                for i in range(width):
                    _unpack_row(
                        weight, scales,
                        weight.ctypes.data + (n + i) * weight.strides[0],
                        scales.ctypes.data + (n + i) * scales.strides[0],
                        biases.ctypes.data + (n + i) * scales.strides[0],
                        shift, start, count, unpacked.ctypes.data + i * K_BLOCK * 128,
                    )  # fmt: skip
                for tile in range(tiles):
                    first, last = bounds[tile], bounds[tile + 1]
                    x_at = packed.ctypes.data + 4 * (first * chunks * 32 + start * 32 * (last - first))
                    for i in range(0, width, 4):
                        _tile_unpacked(
                            unpacked.ctypes.data + i * K_BLOCK * 128, K_BLOCK * 128, x_at, count,
                            acc.ctypes.data + (first * N_BLOCK + i * (last - first)) * 64, last - first,
                        )  # fmt: skip
            for tile in range(tiles):
                first, last = bounds[tile], bounds[tile + 1]
                count = last - first
                for i in range(0, width, 4):
                    for m in range(count):
                        at = acc.ctypes.data + ((first * N_BLOCK) + i * count + m) * 64
                        _store_sums(at, count * 64, out.ctypes.data + (first + m) * out.strides[0] + 4 * (n + i))
