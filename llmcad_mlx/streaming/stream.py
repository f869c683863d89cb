"""Reads the streamed units of a target, pass after pass, ahead of the thread that computes with them.

`ReadAhead` decides what is read when, and into which buffer, without thread, file or clock; `WeightStream` has the
thread that does it. Tests have a stream on a simulated clock.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from llmcad_mlx.errors import StorageError
from llmcad_mlx.streaming.storage import Storage


@dataclass(frozen=True, slots=True)
class Reading:
    """Unit `unit` on its way into buffer `buffer`."""

    unit: int
    buffer: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected of a stream, in seconds from now, if nothing is waited for or released.

    `ready`: until the next unit is there. `idle`: until reading pauses for want of a free buffer. `rest`: until
    the last unit of the pass would have been read without a pause.
    """

    ready: float
    idle: float
    rest: float


class ReadAhead:
    """Units in cyclic order, one read after the other, each into the buffer that has been free for longest.

    A buffer is free, then being read into, then there until `take`, then held until `release`.
    """

    def __init__(self, unit_bytes: Sequence[int], num_buffers: int) -> None:
        self._unit_bytes = unit_bytes
        # [k]: bytes of the units from k on
        self._bytes_from = list(accumulate(reversed(unit_bytes), initial=0))[::-1]
        self.next_unit = 0
        """What `take` gives out next."""
        self.reading: Reading | None = None
        self._next_read = 0
        self._free = deque(range(num_buffers))
        self.there: deque[Reading] = deque()
        """Units that were read and not taken yet, the next one first."""
        self._held: deque[int] = deque()  # buffers

    def begin(self) -> Reading | None:
        """What to read now; None while no buffer is free. What was begun before must have arrived."""
        if not self._free:
            return None
        self.reading = Reading(self._next_read, self._free.popleft())
        self._next_read = (self._next_read + 1) % len(self._unit_bytes)
        return self.reading

    def arrived(self) -> None:
        """What was begun is read."""
        assert self.reading is not None
        self.there.append(self.reading)
        self.reading = None

    def failed(self) -> None:
        """What was begun could not be read; `begin` will give it again."""
        assert self.reading is not None
        self._free.appendleft(self.reading.buffer)
        self._next_read, self.reading = self.reading.unit, None

    def take(self) -> int:
        """The buffer of the next unit, which must be there."""
        buffer = self.there.popleft().buffer
        self._held.append(buffer)
        self.next_unit = (self.next_unit + 1) % len(self._unit_bytes)
        return buffer

    def release(self) -> None:
        """The buffer that has been held for longest is free again."""
        if self._held:
            self._free.append(self._held.popleft())

    def restart(self) -> None:
        """Let the first unit come next, and nothing be held.

        What was read ahead for the next pass stays; the rest of this one is dropped, even while it is being read.
        """
        self._free.extend(self._held)
        self._held.clear()
        while self.there and self.there[0].unit != 0:
            self._free.append(self.there.popleft().buffer)
        self.next_unit = 0
        if self.there:
            return
        if self.reading is not None and self.reading.unit != 0:
            self._free.append(self.reading.buffer)
            self.reading = None
        if self.reading is None:
            self._next_read = 0

    def outlook(self, bytes_per_s: float, bytes_arrived: int) -> Outlook:
        """bytes_arrived: of the unit that is being read."""
        count, sizes = len(self._unit_bytes), self._unit_bytes
        begun = 0 if self.reading is None else sizes[self.reading.unit] - bytes_arrived
        room = begun + sum(sizes[(self._next_read + i) % count] for i in range(len(self._free)))
        # What was read ahead may belong to the next pass already.
        unread = self.next_unit + len(self.there) + (self.reading is not None)
        rest = begun + self._bytes_from[unread] if unread <= count else 0
        coming = 0 if self.there else begun or sizes[self.next_unit]
        return Outlook(coming / bytes_per_s, room / bytes_per_s, rest / bytes_per_s)


_RATE_WEIGHT = 0.25  # of the last unit's rate, against those before
_PIECE_BYTES = 4 << 20  # read at a time, so that closing and starting again do not wait for a whole layer


@dataclass(frozen=True, slots=True)
class Read:
    """`num_bytes` at `offset` of `file` go to `buffer_offset` of a buffer."""

    file: Path
    offset: int
    num_bytes: int
    buffer_offset: int


@dataclass(frozen=True, slots=True)
class Unit:
    """What is brought in at once: a layer, a piece of the head.

    `sha256`: of its bytes in the order of reading, with which every read is compared; None: nothing is.
    """

    name: str
    reads: tuple[Read, ...]
    sha256: str | None = None

    @property
    def num_bytes(self) -> int:
        return sum(read.num_bytes for read in self.reads)


class _StoppedError(Exception):
    """The read is not wanted any more."""


class WeightStream:
    """Units in cyclic order, read ahead into a few buffers by a thread.

        buffer = stream.wait()      # the next unit is in this buffer
        …compute with it…
        stream.release()            # the buffer may be filled again

    After the last unit of a pass comes the first of the next, so reading goes on between passes until all buffers
    are full. `bytes_read` counts what was read so far, `wait_s` the seconds that `wait` has blocked.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        buffers: Sequence[memoryview],
        storage: Storage,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """buffers: each as large as the largest unit."""
        self._units, self._buffers, self._storage = units, buffers, storage
        self._clock = clock
        self.bytes_read = 0
        self.wait_s = 0.0
        self._changed = threading.Condition()
        self._ahead = ReadAhead([unit.num_bytes for unit in units], len(buffers))
        self._error: BaseException | None = None
        self._unit_read = 0  # bytes of the unit that is being read
        self._rate = 0.0  # bytes per second of the last reads
        self._generation = 0
        self._closed = False
        self._thread = threading.Thread(target=self._read_on, name="weight reader", daemon=True)
        self._thread.start()

    @property
    def next_unit(self) -> int:
        return self._ahead.next_unit

    def ready(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        with self._changed:
            return bool(self._ahead.there) or self._error is not None or self._closed

    def outlook(self) -> Outlook:
        """What is expected, by the rate of the last reads; all 0.0 before the first."""
        with self._changed:
            if not self._rate or self._closed or self._error is not None:
                return Outlook(0.0, 0.0, 0.0)
            return self._ahead.outlook(self._rate, self._unit_read)

    def wait(self) -> int:
        """Block until the next unit is there; returns the index of its buffer. Raises what reading raised."""
        with self._changed:
            if not self.ready():
                started = self._clock()
                try:
                    self._changed.wait_for(self.ready)
                finally:
                    self.wait_s += self._clock() - started
            if self._ahead.there:
                return self._ahead.take()
            raise self._error or RuntimeError("the stream is closed")

    def release(self) -> None:
        """The oldest unit that `wait` returned and that was not released is done with."""
        with self._changed:
            self._ahead.release()
            self._changed.notify_all()

    def restart(self) -> None:
        """Let the next unit be the first of a pass, and try again after an error; see `ReadAhead.restart`."""
        with self._changed:
            reading, self._error = self._ahead.reading, None
            self._ahead.restart()
            if self._ahead.reading is not reading:
                self._generation += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading and let go of the files."""
        with self._changed:
            self._closed = True
            self._generation += 1
            self._changed.notify_all()
        self._thread.join()
        self._storage.close()

    def _read_on(self) -> None:
        while True:
            with self._changed:
                reading = None
                while not self._closed and (self._error is not None or (reading := self._ahead.begin()) is None):
                    self._changed.wait()
                if self._closed or reading is None:
                    return
                self._unit_read, generation = 0, self._generation
            error: BaseException | None = None
            started = self._clock()
            try:
                self._read(reading, generation)
            except _StoppedError:
                continue
            except BaseException as raised:  # handed to the thread that waits
                error = raised
            rate = self._units[reading.unit].num_bytes / max(self._clock() - started, 1e-9)
            with self._changed:
                if generation != self._generation:
                    continue
                if error is None:
                    self._rate += (rate - self._rate) * (_RATE_WEIGHT if self._rate else 1.0)
                    self._ahead.arrived()
                else:
                    self._error = error
                    self._ahead.failed()
                self._changed.notify_all()

    def _read(self, reading: Reading, generation: int) -> None:
        unit, buffer = self._units[reading.unit], self._buffers[reading.buffer]
        digest = None if unit.sha256 is None else hashlib.sha256()
        if reading.unit == 0:
            self._storage.check()
        for read in unit.reads:
            for start in range(0, read.num_bytes, _PIECE_BYTES):
                if generation != self._generation:
                    raise _StoppedError
                size = min(_PIECE_BYTES, read.num_bytes - start)
                place = read.buffer_offset + start
                part = buffer[place : place + size]
                self._storage.read_into(read.file, read.offset + start, part)
                self.bytes_read += size
                self._unit_read += size
                if digest is not None:
                    digest.update(part)
        if digest is not None and digest.hexdigest() != unit.sha256:
            raise StorageError(
                f"{unit.reads[0].file}: the bytes of {unit.name} are not what they were; fetch the model again"
            )
