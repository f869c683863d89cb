"""`bench --kernels`: one 4-bit matrix multiplication by rows, MLX's kernels and, on a Linux CPU, ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.quantized import QuantizedLinear

from llmcad_mlx.cpu import cpu_kernels_wanted, prepare_for_device
from llmcad_mlx.measure.output import NOTHING, Origin, Report, Table, number

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


def time_kernels(
    rows: Sequence[int] = ROWS, repeat: int = 3, shape: tuple[int, int] = (OUT_FEATURES, IN_FEATURES)
) -> list[KernelTime]:
    """Time all kernels there are, interleaved: `repeat` times all row counts, each kernel in turn.

    shape: (output, input) features of the weight. All in float32 on the default device.
    """
    rng = np.random.default_rng(0)
    weight = mx.array(rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(shape[1])))
    packed = mx.quantize(weight, GROUP_SIZE, BITS)
    dense = mx.dequantize(*packed, GROUP_SIZE, BITS)
    mx.eval(dense)
    kernels = _kernels(packed, dense)
    inputs = {count: mx.array(rng.standard_normal((count, shape[1]), dtype=np.float32)) for count in rows}
    seconds: dict[tuple[str, int], list[float]] = {}
    for name, matmul in kernels.items():  # warm up; ours also loads a compiled kernel for each kind of row count
        for count in rows if name == OURS else rows[:1]:
            mx.eval(matmul(inputs[count]))
    for _ in range(repeat):
        for count in rows:
            for name, matmul in kernels.items():
                if name != MLX_DENSE or count in DENSE_ROWS:
                    seconds.setdefault((name, count), []).append(_seconds(matmul, inputs[count]))
    exact = np.asarray(dense, np.float64)
    return [
        KernelTime(name, count, 1e3 * median(times), _error(kernels[name], inputs[count], exact))
        for (name, count), times in seconds.items()
    ]


def _kernels(packed: tuple[mx.array, mx.array, mx.array], dense: mx.array) -> dict[str, Matmul]:
    """The kernels by name. Ours is a layer as models use it, with its way from MLX to numpy and back.

    packed: as `mx.quantize` gives them; dense (N, K): the same weight in float32.
    """

    def quantized(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, *packed, transpose=True, group_size=GROUP_SIZE, bits=BITS)

    kernels: dict[str, Matmul] = {MLX_QUANTIZED: quantized, MLX_DENSE: lambda x: x @ dense.T}
    if cpu_kernels_wanted():
        num_out, num_in = dense.shape
        layer = QuantizedLinear(num_in, num_out, False, GROUP_SIZE, BITS)
        layer.weight, layer.scales, layer.biases = packed
        prepare_for_device(layer)
        kernels[OURS] = layer
    return kernels


def _seconds(matmul: Matmul, x: mx.array) -> float:
    started = time.perf_counter()
    mx.eval(matmul(x))
    return time.perf_counter() - started


def _error(matmul: Matmul, x: mx.array, weight: npt.NDArray[np.float64]) -> float:
    reference = np.asarray(x, np.float64) @ weight.T
    return float(np.abs(np.asarray(matmul(x)) - reference).max() / np.abs(reference).max())


def kernel_report(times: Sequence[KernelTime]) -> Report:
    """A table of all kernels, and every time in the document."""
    origin = Origin()
    notes = [
        f"A {OUT_FEATURES}×{IN_FEATURES} matrix, 4 bits in groups of {GROUP_SIZE}, float32 activations, on "
        f"{origin.device}. Errors are relative to the largest value of the product in float64."
    ]
    if not cpu_kernels_wanted():
        notes.append("Our kernels are for Linux CPUs only; on this device models run on MLX's own.")
    document = {
        "device": origin.device,
        "machine": asdict(origin.machine),
        "notes": notes,
        "times": [asdict(entry) for entry in times],
    }
    return Report("kernels", [_table(times)], notes, document)


def _table(times: Sequence[KernelTime]) -> Table:
    """Milliseconds and the ratio to one row, a line per row count; the last line has the largest errors."""
    names = list(dict.fromkeys(entry.kernel for entry in times))
    found = {(entry.kernel, entry.rows): entry.ms for entry in times}
    header, last = ["rows"], ["largest error"]
    for name in names:
        header += [f"{name}, ms", "× 1 row"]
        last += [f"{max(entry.error for entry in times if entry.kernel == name):.0e}", NOTHING]
    rows = []
    for count in dict.fromkeys(entry.rows for entry in times):
        row = [str(count)]
        for name in names:
            ms, one = found.get((name, count)), found.get((name, 1))
            row += [number(ms), number(ms / one if ms is not None and one else None)]
        rows.append(tuple(row))
    return Table("float32 times one 4-bit matrix", tuple(header), (*rows, tuple(last)))
