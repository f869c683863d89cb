"""Which weights of a model can be streamed, and how they lie in the buffers they are read into.

Decoder layers are streamed whole, the head in pieces of rows, the embedding by the rows that are looked up. What
lies close together in a file is read at once, in whole blocks where tensors lie so that it can be read directly. A
parameter can be streamed when the file holds it as the model uses it: same name, same shape, untouched by the
model's `sanitize`. Small parameters (norms, biases) stay in memory: together they are a thousandth of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from llmcad_mlx.errors import ModelError
from llmcad_mlx.files.safetensors import DTYPES, TensorExtent
from llmcad_mlx.models.folder import EMBEDDINGS, LINEARS, LoadedModel
from llmcad_mlx.streaming.storage import BLOCK_BYTES
from llmcad_mlx.streaming.stream import Read, Unit

SMALL_BYTES = 8 << 10
_ALIGNMENT = 64  # of a tensor in a buffer: a cache line
_MAX_GAP = 64 << 10  # read on over so many bytes: at 1 to 10 GB/s no slower than to ask for two ranges
_PIECE_ROWS = 64  # a piece of the head has a multiple of so many rows, as the kernels' blocks do
_MIN_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """A parameter of a module and where a file holds it."""

    module: Module
    name: str
    extent: TensorExtent
    stored: mx.Dtype
    wanted: mx.Dtype
    """What the model computes with; converted on each use where it differs from `stored`."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """An embedding or a head: every parameter has one row for each token."""

    module: Module
    parameters: tuple[StoredParameter, ...]

    @property
    def num_rows(self) -> int:
        return int(self.parameters[0].extent.shape[0])

    @property
    def num_bytes(self) -> int:
        return sum(p.extent.num_bytes for p in self.parameters)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a parameter, or rows of it, lies in its unit's buffer."""

    parameter: StoredParameter
    offset: int
    num_bytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlacedUnit(Unit):
    """With the parameters that lie in its buffer then."""

    places: tuple[Placement, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamParts:
    """A model taken apart. `layers[i]` are the parameters of decoder layer i that can be streamed."""

    modules: tuple[Module, ...]
    """The decoder layers."""
    layers: tuple[tuple[StoredParameter, ...], ...]
    embeddings: tuple[Matrix, ...]
    """Looked up by row; the last one is the head too where there is no `head`."""
    head: Matrix | None
    """None where the head is an embedding, or is not a plain matrix and stays in memory."""
    resident: tuple[tuple[Module, str], ...]
    """Everything else: module and parameter name."""
    file_ends: Mapping[Path, int]
    """Where the last tensor of each file ends."""

    @classmethod
    def of(cls, loaded: LoadedModel) -> StreamParts:
        """Take a lazily loaded model apart.

        Raises ModelError for one whose layers' weights are stored in another form than it computes with.
        """
        modules: Any = list(loaded.model.named_modules())  # type: ignore[no-untyped-call]
        decoder = list(loaded.model.layers)
        numbers = {id(layer): number for number, layer in enumerate(decoder)}
        layer_paths = {path: numbers[id(module)] for path, module in modules if id(module) in numbers}
        layers: list[list[StoredParameter]] = [[] for _ in decoder]
        matrices: list[Matrix] = []
        resident: list[tuple[Module, str]] = []
        for path, module in modules:
            own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
            above = accumulate(path.split("."), lambda head, name: f"{head}.{name}")
            number = next((layer_paths[head] for head in above if head in layer_paths), None)
            stored = _stored(loaded, module, path, own, number is not None)
            if number is not None:
                layers[number] += stored.values()
            elif _is_matrix(module, own, stored):
                matrices.append(Matrix(module, tuple(stored.values())))
            else:
                stored = {}
            resident += [(module, name) for name in own if name not in stored]
        embeddings = sorted((m for m in matrices if isinstance(m.module, EMBEDDINGS)), key=lambda m: m.num_rows)
        heads = [m for m in matrices if not isinstance(m.module, EMBEDDINGS)]
        head = max(heads, key=lambda m: m.num_rows, default=None)
        resident += [(p.module, p.name) for m in heads if m is not head for p in m.parameters]
        ends: dict[Path, int] = {}
        for extent in loaded.weights.values():
            ends[extent.file] = max(ends.get(extent.file, 0), extent.offset + extent.num_bytes)
        return cls(tuple(decoder), tuple(map(tuple, layers)), tuple(embeddings), head, tuple(resident), ends)

    @property
    def matrices(self) -> list[Matrix]:
        return [*self.embeddings, *([self.head] if self.head else [])]

    @property
    def head_matrix(self) -> Matrix | None:
        """The matrix that gives the logits, an embedding's where there is no head."""
        return self.matrices[-1] if self.matrices else None

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes on the disk of what can be streamed of each decoder layer."""
        return tuple(sum(p.extent.num_bytes for p in layer) for layer in self.layers)

    def units(self, layers: Sequence[int], head_pieces: int) -> list[PlacedUnit]:
        """What a pass reads, in order: these layers, then the head in at most so many pieces, 0 for none."""
        found = []
        for number in layers:  # in the order of the file, so that reading is sequential
            parameters = sorted(self.layers[number], key=lambda p: (str(p.extent.file), p.extent.offset))
            found.append(self._placed(f"layer {number}", parameters))
        head = self.head_matrix
        if head is None or not head_pieces:
            return found
        size = -(-head.num_rows // (head_pieces * _PIECE_ROWS)) * _PIECE_ROWS
        for first in range(0, head.num_rows, size):
            rows = range(first, min(first + size, head.num_rows))
            found.append(self._placed(f"head rows {rows.start} to {rows.stop}", head.parameters, rows))
        return found

    def _placed(self, name: str, parameters: Sequence[StoredParameter], rows: range | None = None) -> PlacedUnit:
        """Lay parameters out in a buffer, as few ranges of files as possible. rows: only these of each.

        A tensor at a multiple of 64 bytes of its file lies in the buffer as it does in the file, so that whole
        blocks can be read directly; the range begins and ends with them, but where the file ends. Others are read
        as they are.
        """
        reads: list[Read] = []
        places: list[Placement] = []
        end = 0  # of what is wanted of the last read
        for p in parameters:
            first, num_bytes, shape = p.extent.offset, p.extent.num_bytes, p.extent.shape
            if rows is not None:
                row_bytes = num_bytes // shape[0]
                first, num_bytes = first + rows.start * row_bytes, len(rows) * row_bytes
                shape = (len(rows), *shape[1:])
            last = reads[-1] if reads else None
            file, is_aligned = p.extent.file, first % _ALIGNMENT == 0
            if (
                last is not None
                and (last.file, (first - last.offset) % _ALIGNMENT) == (file, 0)
                and 0 <= first - end <= _MAX_GAP
            ):
                reads.pop()
                start, buffer_offset = last.offset, last.buffer_offset
            else:
                start = first - first % BLOCK_BYTES if is_aligned else first
                buffer_offset = _rounded_up(last.buffer_offset + last.num_bytes, BLOCK_BYTES) if last else 0
            end = first + num_bytes
            stop = min(_rounded_up(end, BLOCK_BYTES), self.file_ends[file]) if is_aligned else end
            reads.append(Read(file, start, stop - start, buffer_offset))
            places.append(Placement(p, buffer_offset + first - start, num_bytes, shape))
        return PlacedUnit(name, tuple(reads), places=tuple(places))

    def all_units(self) -> list[PlacedUnit]:
        """What a pass reads with nothing pinned; pieces of the head are no larger than a layer, or a megabyte."""
        head_bytes = self.head_matrix.num_bytes if self.head_matrix else 0
        largest = max(self.layer_bytes, default=0)
        return self.units(range(len(self.layers)), -(-head_bytes // max(largest, _MIN_PIECE_BYTES)))


def _stored(
    loaded: LoadedModel, module: Module, path: str, own: Mapping[str, mx.array], in_layer: bool
) -> dict[str, StoredParameter]:
    """By name, what can be streamed, small ones left out. Raises ModelError for one `in_layer` in another form."""
    found = {}
    for name, value in own.items():
        if value.nbytes <= SMALL_BYTES or value.ndim < 2:
            continue
        full = f"{path}.{name}" if path else name
        extent = loaded.weights.get(full) if full in loaded.unchanged else None
        stored = None if extent is None else DTYPES[extent.dtype].mlx
        if extent is not None and stored is not None and extent.shape == tuple(value.shape):
            found[name] = StoredParameter(module, name, extent, stored, value.dtype)
        elif in_layer and not name.startswith("_"):
            raise ModelError(
                f"{loaded.path}: {full} is stored in another form than the model computes with; "
                "`llmcad-mlx convert` makes a folder that can be streamed"
            )
    return found


def _is_matrix(module: Module, own: Mapping[str, mx.array], stored: Mapping[str, StoredParameter]) -> bool:
    """Whether the module can be had by rows: all its matrices are stored, with equally many."""
    rows = [stored[name].extent.shape[0] if name in stored else -1 for name in own if own[name].ndim >= 2]
    return isinstance(module, EMBEDDINGS | LINEARS) and bool(stored) and -1 not in rows and len(set(rows)) == 1


def _rounded_up(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
