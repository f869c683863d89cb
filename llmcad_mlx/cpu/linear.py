"""Linear layers of an mlx-lm model on the kernels of `cpu_kernels`, in place of MLX's CPU ones.

Only used where the default device is a CPU without Accelerate (Linux). A layer keeps its parameters
and their names; only its class changes, so loading, quantisation and streaming work as before.
Each call crosses from MLX to numpy: the input is evaluated (about 50 µs of thread hand-over), then
read and written through views.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear

from llmcad_mlx.cpu import kernels as kernels
from llmcad_mlx.cpu.install import HostLayer

_CHUNK = 32  # weights the kernels unpack at a time; the input dimension must be a multiple
_SHIFTS = {32: 0, 64: 1, 128: 2}  # group size -> log2(chunks per group)


def host_view(array: mx.array) -> np.ndarray:
    """A read-only C-contiguous numpy view of an MLX array, evaluated if need be.

    float16 comes back as its bits in int16, bfloat16 as its bits in uint16 (what the kernels read).
    """
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    elif array.dtype == mx.float16:
        array = array.view(mx.int16)
    view = np.ascontiguousarray(np.asarray(array))
    view.flags.writeable = False
    return view


@functools.cache
def _num_threads() -> int:
    import numba

    return int(numba.get_num_threads())


def host_matmul(
    x: mx.array, weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, shift: int, split: bool
) -> mx.array:
    """x (..., K) float32 times the transpose of a packed or dense (N, K) weight: (..., N) float32."""
    rows = np.ascontiguousarray(np.asarray(x).reshape(-1, x.shape[-1]))
    out = np.empty((rows.shape[0], weight.shape[0]), np.float32)
    # A block of the other kernel is N_BLOCK outputs wide.
    if rows.shape[0] <= kernels.FEW_ROWS or weight.shape[0] < kernels.N_BLOCK:
        kernels.matmul_few(rows, weight, scales, biases, shift, split, out)
    else:
        kernels.matmul_many(rows, weight, scales, biases, shift, split, _num_threads(), out)
    return mx.array(out).reshape(*x.shape[:-1], out.shape[1])


HostWeights = tuple[np.ndarray, np.ndarray, np.ndarray, int, bool]
"""weight, scales, biases, log2(chunks per group), even and odd elements split."""


class _HostWeights:
    """Numpy views of a layer's parameters, rebuilt when the layer gets new ones (streaming)."""

    __slots__ = ("arrays", "source")

    def __init__(self) -> None:
        self.source: Any = None
        self.arrays: HostWeights | None = None

    def of(self, layer: Any) -> HostWeights:
        weight = layer["weight"]
        if self.arrays is None or self.source is not weight:
            self.source = weight
            if "scales" in layer:
                packed = host_view(weight)
                if layer.bits == 8:
                    packed = packed.view(np.uint8)
                self.arrays = (
                    packed,
                    host_view(layer["scales"]),
                    host_view(layer["biases"]),
                    _SHIFTS[layer.group_size],
                    layer.bits == 4,
                )
            else:
                none = np.zeros((1, 1), np.float32)
                none.flags.writeable = False
                self.arrays = (host_view(weight), none, none, 0, False)
        return self.arrays


def _linear(layer: Any, x: mx.array) -> mx.array:
    out = host_matmul(x.astype(mx.float32), *layer._host.of(layer))
    return out + layer["bias"] if "bias" in layer else out


class HostLinear(HostLayer, Linear):
    def __call__(self, x: mx.array) -> mx.array:
        return _linear(self, x)


class HostQuantizedLinear(HostLayer, QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return _linear(self, x)


class HostEmbedding(HostLayer, Embedding):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return _linear(self, x)


class HostQuantizedEmbedding(HostLayer, QuantizedEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return _linear(self, x)


_HOST_CLASSES: dict[type, type] = {
    Linear: HostLinear,
    QuantizedLinear: HostQuantizedLinear,
    Embedding: HostEmbedding,
    QuantizedEmbedding: HostQuantizedEmbedding,
}


def _supported(layer: Any) -> bool:
    weight = layer["weight"]
    if weight.shape[0] < 4:
        return False
    if "scales" not in layer:
        return weight.shape[1] % _CHUNK == 0 and weight.dtype in (mx.float32, mx.float16, mx.bfloat16)
    columns = weight.shape[1] * 32 // layer.bits
    mode = getattr(layer, "mode", "affine")
    return (
        mode == "affine"
        and layer.bits in (4, 8)
        and layer.group_size in _SHIFTS
        and columns % max(_CHUNK, layer.group_size) == 0
    )


def install_host_kernels(model: Module) -> int:
    """Give the model's linear and embedding layers the host kernels; float32 for everything else.

    Returns how many layers were changed. Layers of other shapes, bits or kinds keep MLX's kernels. Nothing is
    evaluated.
    """
    changed = 0
    for module in [m for _, m in model.named_modules()]:
        host_class = _HOST_CLASSES.get(type(module))
        if host_class is not None and _supported(module):
            module.__class__ = host_class
            module._host = _HostWeights()
            if "bias" in module:
                module["bias"] = module["bias"].astype(mx.float32)
            changed += 1
        else:
            own = {k: v for k, v in module.items() if isinstance(v, mx.array)}
            for name, value in own.items():
                if mx.issubdtype(value.dtype, mx.floating):
                    module[name] = value.astype(mx.float32)
    return changed
