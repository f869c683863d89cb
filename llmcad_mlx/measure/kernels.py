"""Times of one 4-bit matrix multiplication by rows: MLX's kernels and, on a Linux CPU, ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.quantized import QuantizedLinear

from llmcad_mlx.cpu import cpu_kernels_wanted, prepare_for_device
from llmcad_mlx.measure.tables import NOTHING, Table, number

ROWS = (1, 2, 4, 6, 8, 12, 16, 32, 64, 128)
DENSE_ROWS = (1, 4, 16)  # the reference BLAS behind it is slow
OUT_FEATURES, IN_FEATURES = 8192, 2048
GROUP_SIZE, BITS = 64, 4
MLX_QUANTIZED, MLX_DENSE, OURS = "MLX 4-bit", "MLX dense", "ours 4-bit"

Matmul = Callable[[mx.array], mx.array]


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel at one row count: median milliseconds, and the largest error as a share of the largest value
    of the product in float64."""

    kernel: str
    rows: int
    ms: float
    error: float


@dataclass(frozen=True, slots=True)
class _Matrix:
    weight: mx.array
    """(N, K/8) uint32, packed as `mx.quantize` does."""
    scales: mx.array
    biases: mx.array

    def exact(self) -> npt.NDArray[np.float64]:
        """The dequantised weight (N, K), without rounding."""
        packed = np.asarray(self.weight)
        codes = (packed[:, :, None] >> np.arange(0, 32, BITS, dtype=np.uint32)) & (2**BITS - 1)
        codes = codes.reshape(packed.shape[0], -1).astype(np.float64)
        scales, biases = (
            np.repeat(np.asarray(a, np.float64), GROUP_SIZE, axis=1) for a in (self.scales, self.biases)
        )
        return np.asarray(codes * scales + biases)


def time_kernels(
    rows: Sequence[int] = ROWS, repeat: int = 3, shape: tuple[int, int] = (OUT_FEATURES, IN_FEATURES)
) -> list[KernelTime]:
    """Time all kernels there are, interleaved: `repeat` times all row counts, each kernel in turn.

    shape: (output, input) features of the weight. All in float32 on the default device.
    """
    rng = np.random.default_rng(0)
    weight = mx.array(rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(shape[1])))
    matrix = _Matrix(*mx.quantize(weight, GROUP_SIZE, BITS))
    kernels = _kernels(matrix)
    inputs = {count: mx.array(rng.standard_normal((count, shape[1]), dtype=np.float32)) for count in rows}
    seconds: dict[tuple[str, int], list[float]] = {}
    for name, matmul in kernels.items():  # warm up; ours also loads a compiled kernel for each kind of row count
        for count in rows if name == OURS else rows[:1]:
            mx.eval(matmul(inputs[count]))
    for _ in range(repeat):
        for count in rows:
            for name, matmul in kernels.items():
                if name == MLX_DENSE and count not in DENSE_ROWS:
                    continue
                seconds.setdefault((name, count), []).append(_seconds(matmul, inputs[count]))
    exact = matrix.exact()
    return [
        KernelTime(name, count, 1e3 * median(times), _error(kernels[name], inputs[count], exact))
        for (name, count), times in seconds.items()
    ]


def _kernels(matrix: _Matrix) -> dict[str, Matmul]:
    """The kernels by name. Ours is a layer as models use it, with its way from MLX to numpy and back."""

    def quantized(x: mx.array) -> mx.array:
        return mx.quantized_matmul(
            x, matrix.weight, matrix.scales, matrix.biases, True, group_size=GROUP_SIZE, bits=BITS
        )

    dense = mx.dequantize(matrix.weight, matrix.scales, matrix.biases, GROUP_SIZE, BITS).T
    mx.eval(dense)
    kernels: dict[str, Matmul] = {MLX_QUANTIZED: quantized, MLX_DENSE: lambda x: x @ dense}
    if cpu_kernels_wanted():
        num_in, num_out = dense.shape
        layer = QuantizedLinear(num_in, num_out, False, GROUP_SIZE, BITS)
        layer.weight, layer.scales, layer.biases = matrix.weight, matrix.scales, matrix.biases
        prepare_for_device(layer)
        kernels[OURS] = layer
    return kernels


def _seconds(matmul: Matmul, x: mx.array) -> float:
    started = time.perf_counter()
    mx.eval(matmul(x))
    return time.perf_counter() - started


def _error(matmul: Matmul, x: mx.array, exact: npt.NDArray[np.float64]) -> float:
    reference = np.asarray(x, np.float64) @ exact.T
    return float(np.abs(np.asarray(matmul(x)) - reference).max() / np.abs(reference).max())


def kernel_table(times: Sequence[KernelTime]) -> Table:
    """Milliseconds and the ratio to one row, a line per row count; the last line has the largest errors."""
    names = list(dict.fromkeys(entry.kernel for entry in times))
    found = {(entry.kernel, entry.rows): entry.ms for entry in times}
    header = ["rows"]
    for name in names:
        header += [f"{name}, ms", "× 1 row"]
    rows = []
    for count in dict.fromkeys(entry.rows for entry in times):
        row = [str(count)]
        for name in names:
            ms, one = found.get((name, count)), found.get((name, 1))
            row += [number(ms), number(ms / one if ms is not None and one else None)]
        rows.append(tuple(row))
    last = ["largest error"]
    for name in names:
        last += [f"{max(entry.error for entry in times if entry.kernel == name):.0e}", NOTHING]
    rows.append(tuple(last))
    return Table("float32 times one 4-bit matrix", tuple(header), tuple(rows))


def kernel_notes(device: str) -> list[str]:
    """What a reader of the table must know."""
    notes = [
        f"A {OUT_FEATURES}×{IN_FEATURES} matrix, 4 bits in groups of {GROUP_SIZE}, float32 activations, on "
        f"{device}. Errors are relative to the largest value of the product in float64."
    ]
    if not cpu_kernels_wanted():
        notes.append("Our kernels are for Linux CPUs only; on this device models run on MLX's own.")
    return notes
