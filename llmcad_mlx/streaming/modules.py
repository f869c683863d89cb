"""Modules of an mlx-lm model whose weights are in memory only while they compute, and the feeds that bring them.

The model's own code stays as it is: an adaptation fetches the module's weights before the call, evaluates what
depends on them, and gives the memory back. So any mlx-lm architecture streams, its decoder layers whole, its head
in pieces of rows, its embedding by the rows that are looked up.

Weights lie in reused buffers. Each tensor is a view into one, made once and bound to the module's parameter
before every call; nothing is copied and nothing allocated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from llmcad_mlx.errors import ModelError
from llmcad_mlx.models.adapt import Adaptation
from llmcad_mlx.streaming.storage import Storage
from llmcad_mlx.streaming.stream import Unit, WeightStream
from llmcad_mlx.streaming.weights import Matrix, Placement

_LAST_WEIGHT = 0.25  # of the last unit's computing time, against those before

Background = Callable[[float], bool]
"""Does one step of other work, of about so many seconds at most; False when there is none."""


@dataclass(frozen=True, slots=True)
class OnDemandFeed:
    """Reads each unit when it is asked for, into the only buffer. Any order."""

    units: Sequence[Unit]
    buffer: memoryview
    storage: Storage

    def take(self, unit: int) -> int:
        """Read `unit`; returns the index of the buffer that holds it."""
        for read in self.units[unit].reads:
            end = read.buffer_offset + read.num_bytes
            self.storage.read_into(read.file, read.offset, self.buffer[read.buffer_offset : end])
        return 0

    def give_back(self) -> None:
        """Nothing reads ahead."""


class SequentialFeed:
    """Takes units from a stream in the order in which a pass uses them; works on something else meanwhile."""

    def __init__(
        self, stream: WeightStream, num_units: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.stream = stream
        self._num_units = num_units
        self._clock = clock
        self._background: Background | None = None
        self._taken_at: float | None = None
        self._unit_s = 0.0  # computing with one unit, lately
        self.row_bytes = 0
        """Bytes of rows that were looked up."""

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, looked-up rows included."""
        return self.stream.bytes_read + self.row_bytes

    @contextmanager
    def working(self, background: Background | None) -> Iterator[None]:
        """Call `background` as long as a unit is not there yet and it finds something to do.

        Wherever the last pass of the block ends, the next one's first units are read from then on.
        """
        self._background = background
        try:
            yield
        finally:
            self._background = self._taken_at = None
        if self.stream.next_unit != 0:  # a prompt's pass needs no head
            self.stream.restart()

    def free_seconds(self) -> float:
        """How long something else may be done before this pass takes longer.

        Where reading the rest takes longer than computing with it, time is free as long as reading goes on: until
        all buffers are full but for the time it takes to empty one. Otherwise only until the next unit is there.
        """
        outlook = self.stream.outlook()
        if not self._unit_s:
            return outlook.ready
        slack = outlook.rest - self._unit_s * (self._num_units - self.stream.next_unit)
        return max(outlook.ready, min(slack, outlook.idle - self._unit_s), 0.0)

    def take(self, unit: int) -> int:
        """Wait until `unit`, the next in order, is in memory; returns the index of the buffer that holds it.

        Raises ModelError for a model that takes its layers in another order, and what reading raised.
        """
        if unit == 0:
            # The last pass may have been broken off anywhere; a read that failed since is tried again.
            self.stream.restart()
        elif unit != self.stream.next_unit:
            raise ModelError(
                f"this model uses its layers in another order than they are listed (unit {unit} where "
                f"{self.stream.next_unit} was due), so it cannot be streamed; give it memory for all its weights"
            )
        if self._taken_at is not None:  # computing with the last unit took until now
            seconds = self._clock() - self._taken_at
            self._unit_s += (seconds - self._unit_s) * (_LAST_WEIGHT if self._unit_s else 1.0)
        while self._background is not None and not self.stream.ready():
            if not self._background(self.free_seconds()):
                break
        buffer = self.stream.wait()
        self._taken_at = self._clock()
        return buffer

    def give_back(self) -> None:
        """The unit that was taken first is no longer needed."""
        self.stream.release()


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads rows of an embedding from the files. `feed` counts the bytes."""

    matrix: Matrix
    storage: Storage
    feed: SequentialFeed | None = None

    def rows(self, indices: Sequence[int]) -> dict[str, mx.array]:
        """The rows `indices` of every parameter, by name."""
        found = {}
        for p in self.matrix.parameters:
            row_bytes = p.extent.num_bytes // self.matrix.num_rows
            data = bytearray(row_bytes * len(indices))
            for place, index in enumerate(indices):
                part = memoryview(data)[place * row_bytes : (place + 1) * row_bytes]
                self.storage.read_into(p.extent.file, p.extent.offset + index * row_bytes, part)
            array = mx.array(np.frombuffer(data, np.uint8)).view(p.stored)
            found[p.name] = array.reshape(len(indices), *p.extent.shape[1:]).astype(p.wanted)
            if self.feed is not None:
                self.feed.row_bytes += len(data)
        return found


WeightFeed = OnDemandFeed | SequentialFeed

Views = dict[Hashable, list[mx.array]]
"""By buffer and layout, the tensors that lie in it."""


@dataclass(slots=True)
class StreamedUnit:
    """What is brought in at once: a decoder layer, or a piece of the head."""

    number: int
    placements: Sequence[Placement]
    buffers: Sequence[mx.array]
    """uint8, the stream's buffers."""
    feed: WeightFeed
    views: Views
    """Made so far. Units that lie alike in the buffers share them: a deep model has tens of thousands."""

    _layout: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self._layout = tuple((place.offset, place.shape, place.parameter.stored) for place in self.placements)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The unit's weights are bound to their modules while the block runs, and garbage afterwards."""
        index = self.feed.take(self.number)
        try:
            self.bind(index)
            yield
        finally:
            self.feed.give_back()

    def bind(self, index: int) -> None:
        """Let the modules' parameters be views into buffer `index`, whatever it holds."""
        key = index, self._layout
        if key not in self.views:
            parts = ((self.buffers[index][p.offset : p.offset + p.num_bytes], p) for p in self.placements)
            views = [part.view(place.parameter.stored).reshape(place.shape) for part, place in parts]
            mx.eval(views)
            self.views[key] = views
        for place, view in zip(self.placements, self.views[key], strict=True):
            p = place.parameter  # not cached as converted: a copy would be resident memory
            p.module[p.name] = view if p.stored == p.wanted else view.astype(p.wanted)


class Streamed(Adaptation):
    """A module whose weights are in memory only while it computes."""


class StreamedLayer(Streamed):
    """A decoder layer."""

    _unit: StreamedUnit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._unit.loaded():
            out = super().__call__(*args, **kwargs)
            # Everything that depends on the weights, the layer's keys and values included.
            states = [value.state for value in (*args, *kwargs.values()) if hasattr(value, "state")]
            leaves: Any = tree_flatten([out, states])
            mx.eval([array for _, array in leaves if isinstance(array, mx.array)])
        return out


def _by_pieces(module: Any, call: Any, x: mx.array) -> mx.array:
    """Outputs (…, rows) float32 of a matrix that comes in pieces of rows: each output depends on one row only."""
    mx.eval(x)
    bias = module.get("bias")
    num_rows = sum(piece.placements[0].shape[0] for piece in module._pieces)
    # Written in place: collecting the pieces would take the logits' memory twice.
    whole = mx.zeros((*x.shape[:-1], num_rows), mx.float32)
    mx.eval(whole)
    out: Any = np.asarray(whole)
    first = 0
    for piece in module._pieces:
        with piece.loaded():
            rows = module["weight"].shape[0]
            if bias is not None:
                module["bias"] = bias[first : first + rows]
            try:
                out[..., first : first + rows] = np.asarray(call(x).astype(mx.float32))
            finally:
                if bias is not None:
                    module["bias"] = bias
        first += rows
    return whole


class StreamedHead(Streamed):
    """A linear layer whose rows come in pieces."""

    _pieces: Sequence[StreamedUnit]

    def __call__(self, x: mx.array) -> mx.array:
        return _by_pieces(self, super().__call__, x)


class StreamedEmbedding(Streamed):
    """An embedding whose rows are looked up one by one; as a head, its rows come in pieces."""

    _rows: RowReader
    _pieces: Sequence[StreamedUnit]

    def __call__(self, ids: mx.array) -> mx.array:
        unique, inverse = np.unique(np.asarray(ids), return_inverse=True)
        for name, rows in self._rows.rows(unique.tolist()).items():
            self[name] = rows
        out = super().__call__(mx.array(inverse.reshape(ids.shape).astype(np.int32)))
        mx.eval(out)
        return out

    def as_linear(self, x: mx.array) -> mx.array:
        return _by_pieces(self, super().as_linear, x)  # type: ignore[misc]
