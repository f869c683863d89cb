"""How streamed modules get their weights: in the order of the pass, or one at a time for checks at load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from llmcad_mlx.errors import ModelError
from llmcad_mlx.streaming.storage import Storage
from llmcad_mlx.streaming.stream import Unit, WeightStream
from llmcad_mlx.streaming.weights import Matrix

_LAST_WEIGHT = 0.25  # of the last unit's computing time, against those before

Background = Callable[[float], bool]
"""Does one step of other work, of about so many seconds at most; False when there is none."""


class OnDemandFeed:
    """Reads each unit when it is asked for, into the first buffer. Any order."""

    def __init__(self, units: Sequence[Unit], buffer: memoryview, storage: Storage) -> None:
        self._units = units
        self._buffer = buffer
        self._storage = storage

    def take(self, unit: int) -> int:
        """Read `unit`; returns the index of the buffer that holds it."""
        for read in self._units[unit].reads:
            end = read.buffer_offset + read.num_bytes
            self._storage.read_into(read.file, read.offset, self._buffer[read.buffer_offset : end])
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
        self._learn()
        while self._background is not None and not self.stream.ready():
            if not self._background(self.free_seconds()):
                break
        buffer = self.stream.wait()
        self._taken_at = self._clock()
        return buffer

    def _learn(self) -> None:
        """Computing with the last unit took until now."""
        if self._taken_at is not None:
            seconds = self._clock() - self._taken_at
            self._unit_s += (seconds - self._unit_s) * (_LAST_WEIGHT if self._unit_s else 1.0)

    def give_back(self) -> None:
        """The unit that was taken first is no longer needed."""
        self.stream.release()

    def close(self) -> None:
        """Stop reading."""
        self.stream.close()


class RowReader:
    """Reads rows of an embedding from the files."""

    def __init__(self, matrix: Matrix, storage: Storage, feed: SequentialFeed | None = None) -> None:
        """feed: what the bytes read are counted on."""
        self._matrix = matrix
        self._storage = storage
        self.feed = feed

    def rows(self, indices: Sequence[int]) -> dict[str, mx.array]:
        """The rows `indices` of every parameter, by name."""
        found = {}
        for p in self._matrix.parameters:
            row_bytes = p.extent.num_bytes // self._matrix.num_rows
            data = bytearray(row_bytes * len(indices))
            for place, index in enumerate(indices):
                part = memoryview(data)[place * row_bytes : (place + 1) * row_bytes]
                self._storage.read_into(p.extent.file, p.extent.offset + index * row_bytes, part)
            array = mx.array(np.frombuffer(data, np.uint8)).view(p.stored)
            found[p.name] = array.reshape(len(indices), *p.extent.shape[1:]).astype(p.wanted)
            if self.feed is not None:
                self.feed.row_bytes += len(data)
        return found
