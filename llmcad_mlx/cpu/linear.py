"""Linear layers of an mlx-lm model on the kernels of `cpu.kernels`, in place of MLX's CPU ones.

A layer keeps its parameters and their names, so loading, quantisation and streaming work as before. Each call
crosses from MLX to numpy: the input is evaluated (about 50 µs of thread hand-over), then read through a view.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import numba
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear

from llmcad_mlx.cpu import kernels
from llmcad_mlx.models.adapt import Adaptation, adapt, own_class

_CHUNK = 32  # weights the kernels unpack at a time; the input dimension must be a multiple
_STORED_AS = {4: np.uint32, 5: np.int32, 6: np.int8, 8: np.uint8}  # how views tell the kernels the bits
_SHIFTS = {32: 0, 64: 1, 128: 2}  # group size -> log2(chunks per group)


def numpy_view(array: mx.array) -> np.ndarray:
    """A read-only C-contiguous numpy view of an MLX array, evaluated if need be: float16 as its bits in int16,
    bfloat16 as its bits in uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    elif array.dtype == mx.float16:
        array = array.view(mx.int16)
    view = np.ascontiguousarray(np.asarray(array))
    view.flags.writeable = False
    return view


@functools.cache
def num_threads() -> int:
    """Threads that the kernels use."""
    return int(numba.get_num_threads())


Weights = tuple[np.ndarray, np.ndarray, np.ndarray, int, bool]
"""weight, scales, biases, log2(chunks per group), even and odd elements split."""


class WeightViews:
    """Numpy views of a layer's parameters, made again when the layer gets new ones (streaming)."""

    __slots__ = ("_source", "_views")

    def __init__(self) -> None:
        self._source: Any = None
        self._views: Weights | None = None

    def of(self, layer: Any) -> Weights:
        """The views of `layer`, always the same one."""
        weight = layer["weight"]
        if self._views is None or self._source is not weight:
            self._source = weight
            if "scales" in layer:
                packed = numpy_view(weight)
                self._views = (
                    packed.view(_STORED_AS[layer.bits]),
                    numpy_view(layer["scales"]),
                    numpy_view(layer["biases"]),
                    _SHIFTS[layer.group_size],
                    layer.bits == 4,
                )
            else:
                none = np.zeros((1, 1), np.float32)
                none.flags.writeable = False
                self._views = (numpy_view(weight), none, none, 0, False)
        return self._views


class _OnKernels(Adaptation):
    """A layer with a matrix that the kernels multiply with."""

    in_float32 = True

    _cpu_weights: WeightViews

    def _multiply(self, x: mx.array) -> mx.array:
        """x (..., K) times the transpose of the (N, K) matrix, and the bias: (..., N) float32."""
        weight, scales, biases, shift, split = self._cpu_weights.of(self)
        rows = np.ascontiguousarray(np.asarray(x.astype(mx.float32)).reshape(-1, x.shape[-1]))
        out = np.empty((rows.shape[0], weight.shape[0]), np.float32)
        # A block of the other kernel is N_BLOCK outputs wide.
        if rows.shape[0] <= kernels.FEW_ROWS or weight.shape[0] < kernels.N_BLOCK:
            kernels.matmul_few(rows, weight, scales, biases, shift, split, out)
        else:
            kernels.matmul_many(rows, weight, scales, biases, shift, split, num_threads(), out)
        result = mx.array(out).reshape(*x.shape[:-1], out.shape[1])
        return result + self["bias"] if "bias" in self else result

    def forget_weights(self) -> None:
        self._cpu_weights = WeightViews()
        super().forget_weights()


class CpuLinear(_OnKernels):
    """A linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._multiply(x)


class CpuEmbedding(_OnKernels):
    """An embedding, whose matrix may also be the model's head."""

    def __call__(self, ids: mx.array) -> mx.array:
        return super().__call__(ids).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._multiply(x)


def _supported(layer: Any) -> bool:
    weight = layer["weight"]
    if weight.shape[0] < 4:
        return False
    if "scales" not in layer:
        return weight.shape[1] % _CHUNK == 0 and weight.dtype in (mx.float32, mx.float16, mx.bfloat16)
    columns = weight.shape[1] * 32 // layer.bits
    return (
        getattr(layer, "mode", "affine") == "affine"
        and layer.bits in _STORED_AS
        and layer.group_size in _SHIFTS
        and columns % max(_CHUNK, layer.group_size) == 0
    )


def install_cpu_linears(model: Module) -> None:
    """Give the model's linear and embedding layers the CPU kernels where these take them; float32 for everything
    else. Nothing is evaluated."""
    modules: Any = model.modules()
    for module in modules:
        own = own_class(module)
        embeds = own in (Embedding, QuantizedEmbedding)
        if (embeds or own in (Linear, QuantizedLinear)) and _supported(module):
            adapt(module, CpuEmbedding if embeds else CpuLinear, _cpu_weights=WeightViews())
            if "bias" in module:
                module["bias"] = module["bias"].astype(mx.float32)
            continue
        for name, value in list(module.items()):
            if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
                module[name] = value.astype(mx.float32)
