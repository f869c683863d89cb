"""Which weights of a model can be streamed: those of its decoder layers, its embedding and its head.

A parameter can be streamed when the file holds it as the model uses it: same name, same shape, untouched by the
model's `sanitize`. Small parameters (norms, biases) stay in memory: together they are a thousandth of a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear

from llmcad_mlx.errors import ModelError
from llmcad_mlx.files.safetensors import DTYPES, TensorExtent, WeightIndex

SMALL_BYTES = 8 << 10


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """A parameter of a module and where a file holds it."""

    module: Module
    name: str
    extent: TensorExtent
    wanted: mx.Dtype
    """What the model computes with."""

    @property
    def stored(self) -> mx.Dtype:
        """What the file holds."""
        stored = DTYPES[self.extent.dtype].mlx
        assert stored is not None
        return stored


@dataclass(frozen=True, slots=True)
class Matrix:
    """An embedding or a head: every parameter has one row for each token."""

    module: Module
    parameters: tuple[StoredParameter, ...]

    @property
    def num_rows(self) -> int:
        return int(self.parameters[0].extent.shape[0])

    @property
    def row_bytes(self) -> int:
        return sum(p.extent.num_bytes // self.num_rows for p in self.parameters)

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * self.num_rows


@dataclass(frozen=True, slots=True)
class StreamParts:
    """A model taken apart. `layers[i]` are the parameters of decoder layer i that can be streamed."""

    modules: tuple[Module, ...]
    """The decoder layers."""
    layers: tuple[tuple[StoredParameter, ...], ...]
    embeddings: tuple[Matrix, ...]
    """Looked up by row; the last one is the head too where `tied`."""
    head: Matrix | None
    """None where the head is an embedding, or is not a plain matrix and stays in memory."""
    tied: bool
    resident: tuple[tuple[Module, str], ...]
    """Everything else: module and parameter name."""

    @classmethod
    def of(cls, model: Module, index: WeightIndex, unchanged: Collection[str], folder: object) -> StreamParts:
        """Take `model`, loaded lazily, apart.

        unchanged: names of tensors that `sanitize` has passed through. Raises ModelError for a model whose layers'
        weights are stored in another form than it computes with.
        """
        split = _Split(index, unchanged)
        modules: Any = list(model.named_modules())  # type: ignore[no-untyped-call]
        decoder = {id(layer): number for number, layer in enumerate(model.layers)}
        prefixes = {decoder[id(m)]: f"{path}." for path, m in modules if id(m) in decoder}
        layers: list[list[StoredParameter]] = [[] for _ in decoder]
        matrices: list[Matrix] = []
        resident: list[tuple[Module, str]] = []
        by_prefix = sorted(prefixes.items(), key=lambda item: item[1])
        for path, module in modules:
            layer = next((number for number, prefix in by_prefix if f"{path}.".startswith(prefix)), None)
            own = [(name, value) for name, value in module.items() if isinstance(value, mx.array)]
            found = [split.stored(module, path, name, value) for name, value in own]
            if layer is None:
                matrix = _matrix(module, [p for p in found if p is not None], len(own))
                if matrix is not None:
                    matrices.append(matrix)
                    resident += [(module, n) for n, v in own if v.ndim < 2]
                else:
                    resident += [(module, name) for name, _ in own]
                continue
            for (name, value), parameter in zip(own, found, strict=True):
                if parameter is not None:
                    layers[layer].append(parameter)
                elif value.ndim >= 2 and value.nbytes > SMALL_BYTES and not name.startswith("_"):
                    raise ModelError(
                        f"{folder}: {path}.{name} is stored in another form than the model computes with; "
                        "`llmcad-mlx convert` makes a folder that can be streamed"
                    )
                else:
                    resident.append((module, name))
        embeddings = [m for m in matrices if isinstance(m.module, Embedding | QuantizedEmbedding)]
        heads = [m for m in matrices if isinstance(m.module, Linear | QuantizedLinear)]
        embeddings.sort(key=lambda matrix: matrix.num_rows)
        head = max(heads, key=lambda matrix: matrix.num_rows, default=None)
        for other in heads:
            if other is not head:
                resident += [(p.module, p.name) for p in other.parameters]
        tied = head is None and bool(embeddings)
        return cls(tuple(model.layers), tuple(map(tuple, layers)), tuple(embeddings), head, tied, tuple(resident))

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes on the disk of what can be streamed of each decoder layer."""
        return tuple(sum(p.extent.num_bytes for p in layer) for layer in self.layers)

    @property
    def head_matrix(self) -> Matrix | None:
        """The matrix that gives the logits, an embedding's where they are tied."""
        return self.embeddings[-1] if self.tied else self.head


class _Split:
    def __init__(self, index: WeightIndex, unchanged: Collection[str]) -> None:
        self._index = index
        self._unchanged = unchanged

    def stored(self, module: Module, path: str, name: str, value: mx.array) -> StoredParameter | None:
        """The parameter's place in the files, or None where it is small or stored in another form."""
        full = f"{path}.{name}" if path else name
        if value.nbytes <= SMALL_BYTES or value.ndim < 2 or full not in self._unchanged or full not in self._index:
            return None
        extent = self._index[full]
        if extent.shape != tuple(value.shape) or DTYPES[extent.dtype].mlx is None:
            return None
        return StoredParameter(module, name, extent, value.dtype)


def _matrix(module: Any, parameters: Sequence[StoredParameter], num_own: int) -> Matrix | None:
    """The module as a matrix that can be had by rows, or None."""
    if not isinstance(module, Embedding | QuantizedEmbedding | Linear | QuantizedLinear) or not parameters:
        return None
    rows = parameters[0].extent.shape[0]
    two_dimensional = sum(1 for _ in _matrices(module))
    if len(parameters) != two_dimensional or any(p.extent.shape[0] != rows for p in parameters):
        return None
    return Matrix(module, tuple(parameters))


def _matrices(module: Module) -> Iterator[mx.array]:
    return (value for value in module.values() if isinstance(value, mx.array) and value.ndim >= 2)
