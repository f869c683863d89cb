"""Reads the streamed units of a target, pass after pass, ahead of the thread that computes with them.

`ReadAhead` decides what is read when, and into which buffer, without thread, file or clock; `WeightStream` has the
threads that do it. Tests have a stream on a simulated clock.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

from llmcad_mlx.errors import StorageError
from llmcad_mlx.streaming.storage import BLOCK_BYTES, DEFAULT_WAY, ReadWay, Storage


@dataclass(slots=True, eq=False)
class Reading:
    """Unit `unit` on its way into buffer `buffer`, or there."""

    unit: int
    buffer: int
    bytes_left: int
    num_begun: int = 0
    """Pieces."""
    num_landed: int = 0
    is_there: bool = False
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Piece `number` of a unit."""

    reading: Reading
    number: int


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
    """Units in cyclic order, piece after piece, each unit into the buffer that has been free for longest.

    Pieces may be on their way at the same time, those of the next unit with the last ones of the unit before. A
    buffer is free, then being read into, then there until `take`, then held until `release`.
    """

    def __init__(self, piece_bytes: Sequence[Sequence[int]], num_buffers: int) -> None:
        """piece_bytes: of each unit's pieces."""
        self._piece_bytes = piece_bytes
        self._unit_bytes = [sum(pieces) for pieces in piece_bytes]
        # [k]: bytes of the units from k on
        self._bytes_from = list(accumulate(reversed(self._unit_bytes), initial=0))[::-1]
        self.next_unit = 0
        """What `take` gives out next."""
        self.coming: deque[Reading] = deque()
        """Units that were begun and not taken yet, the next one first."""
        self._next_read = 0
        self._free = deque(range(num_buffers))
        self._held: deque[int] = deque()  # buffers

    @property
    def is_ready(self) -> bool:
        """Whether there is something to take."""
        return bool(self.coming) and self.coming[0].is_there

    def begin(self) -> Piece | None:
        """What to read now, besides what is on its way; None while no buffer is free."""
        last = self.coming[-1] if self.coming else None
        if last is None or last.num_begun == len(self._piece_bytes[last.unit]):
            if not self._free:
                return None
            last = Reading(self._next_read, self._free.popleft(), self._unit_bytes[self._next_read])
            self.coming.append(last)
            self._next_read = (self._next_read + 1) % len(self._unit_bytes)
        last.num_begun += 1
        return Piece(last, last.num_begun - 1)

    def landed(self, piece: Piece) -> bool:
        """`piece` is on its way no more, read or not. Whether it was the last of a unit that is still wanted: then
        `arrived` or `failed` has to follow."""
        reading, sizes = piece.reading, self._piece_bytes[piece.reading.unit]
        reading.num_landed += 1
        reading.bytes_left -= sizes[piece.number]
        if reading.is_dropped:
            if reading.num_landed == reading.num_begun:
                self._free.append(reading.buffer)
            return False
        return reading.num_landed == len(sizes)

    def arrived(self, reading: Reading) -> None:
        """All of a unit is read, and right."""
        reading.is_there = not reading.is_dropped

    def failed(self, reading: Reading) -> bool:
        """A unit could not be read; what comes from it on is dropped, and `begin` will give it again. False for
        one that was dropped before."""
        if reading.is_dropped:
            return False
        while not reading.is_dropped:
            self._drop(self.coming.pop())
        self._next_read = reading.unit
        return True

    def take(self) -> int:
        """The buffer of the next unit, which must be there."""
        assert self.is_ready
        buffer = self.coming.popleft().buffer
        self._held.append(buffer)
        self.next_unit = (self.next_unit + 1) % len(self._unit_bytes)
        return buffer

    def release(self) -> None:
        """The buffer that has been held for longest is free again."""
        if self._held:
            self._free.append(self._held.popleft())

    def restart(self) -> None:
        """Let the first unit come next, and nothing be held.

        What was begun for the next pass stays; the rest of this one is dropped, even while it is being read.
        """
        self._free.extend(self._held)
        self._held.clear()
        while self.coming and self.coming[0].unit != 0:
            self._drop(self.coming.popleft())
        self.next_unit = 0
        if not self.coming:
            self._next_read = 0

    def _drop(self, reading: Reading) -> None:
        """Its buffer is free as soon as nothing is on its way there."""
        reading.is_dropped = True
        if reading.num_landed == reading.num_begun:
            self._free.append(reading.buffer)

    def outlook(self, bytes_per_s: float, bytes_arrived: float) -> Outlook:
        """bytes_arrived: of the pieces on their way."""
        count, sizes = len(self._unit_bytes), self._unit_bytes
        lefts = [reading.bytes_left for reading in self.coming]
        begun = max(sum(lefts) - bytes_arrived, 0)
        room = begun + sum(sizes[(self._next_read + i) % count] for i in range(len(self._free)))
        # What was read ahead may belong to the next pass already.
        unread = min(self.next_unit + len(lefts), count)
        own = sum(lefts[: count - self.next_unit])
        rest = max(own - bytes_arrived, 0) + self._bytes_from[unread]
        coming = 0 if self.is_ready else max(lefts[0] - bytes_arrived, 0) if lefts else sizes[self.next_unit]
        return Outlook(coming / bytes_per_s, room / bytes_per_s, rest / bytes_per_s)


_RATE_WEIGHT = 0.1  # of the last piece, against those before


@dataclass(frozen=True, slots=True)
class Read:
    """`num_bytes` at `offset` of `file` go to `buffer_offset` of a buffer."""

    file: Path
    offset: int
    num_bytes: int
    buffer_offset: int

    def cut(self, num_bytes: int) -> list[Read]:
        """Parts of equal size, `num_bytes` at most, that begin at multiples of a block from the beginning on."""
        count = max(-(-self.num_bytes // num_bytes), 1)
        size = max(-(-self.num_bytes // (count * BLOCK_BYTES)), 1) * BLOCK_BYTES
        return [
            Read(self.file, self.offset + start, min(size, self.num_bytes - start), self.buffer_offset + start)
            for start in range(0, self.num_bytes, size)
        ]


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

    def pieces(self, num_bytes: int) -> list[list[Read]]:
        """The reads in pieces of `num_bytes` at most, in order: large ones cut up, small ones put together."""
        pieces: list[list[Read]] = [[]]
        room = num_bytes
        for part in (part for read in self.reads for part in read.cut(num_bytes)):
            if part.num_bytes > room and pieces[-1]:
                pieces.append([])
                room = num_bytes
            pieces[-1].append(part)
            room -= part.num_bytes
        return pieces


class SwitchingOften:
    """While somebody has begun and not ended, a Python thread that waits for the interpreter's lock gets it after
    0.5 ms, not 5. Readers need it after each piece: beside a thread that never rests, one reader of 16 MB pieces
    came to 0.6 of the disk's rate, and now comes to all of it."""

    _SWITCH_S = 5e-4
    _lock = threading.Lock()
    _count: ClassVar[int] = 0  # as the interval itself, of the whole process
    _before: ClassVar[float] = 0.0

    @classmethod
    def begin(cls) -> None:
        with cls._lock:
            if cls._count == 0:
                cls._before = sys.getswitchinterval()
                sys.setswitchinterval(min(cls._before, cls._SWITCH_S))
            cls._count += 1

    @classmethod
    def end(cls) -> None:
        with cls._lock:
            cls._count -= 1
            if cls._count == 0:
                sys.setswitchinterval(cls._before)


class WeightStream:
    """Units in cyclic order, read ahead into a few buffers by a few threads.

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
        way: ReadWay = DEFAULT_WAY,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """buffers: each as large as the largest unit."""
        self._units, self._buffers, self._storage = units, buffers, storage
        self._clock = clock
        self.bytes_read = 0
        self.wait_s = 0.0
        self._pieces = [unit.pieces(way.piece_bytes) for unit in units]
        sizes = [[sum(read.num_bytes for read in piece) for piece in pieces] for pieces in self._pieces]
        self._ahead = ReadAhead(sizes, len(buffers))
        self._piece_bytes = sizes
        self._error: BaseException | None = None
        self._closed = False
        # Of the last reads, older ones weigh less: their rate is what they were together in that time.
        self._recent_bytes = self._recent_s = 0.0
        self._bytes_on_way = 0
        self._since = 0.0  # when something landed last, or reading began again
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # for who waits for a unit
        self._wanted = threading.Condition(lock)  # for readers
        self._threads = [
            threading.Thread(target=self._read_on, name=f"weight reader {number}", daemon=True)
            for number in range(way.num_readers)
        ]
        SwitchingOften.begin()
        for thread in self._threads:
            thread.start()

    @property
    def next_unit(self) -> int:
        return self._ahead.next_unit

    def ready(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        with self._changed:
            return self._ahead.is_ready or self._closed or (self._error is not None and not self._ahead.coming)

    def outlook(self) -> Outlook:
        """What is expected, by the rate of the last reads; all 0.0 before the first."""
        with self._changed:
            if not self._recent_s or self._closed or self._error is not None:
                return Outlook(0.0, 0.0, 0.0)
            rate = self._recent_bytes / self._recent_s
            return self._ahead.outlook(rate, min((self._clock() - self._since) * rate, self._bytes_on_way))

    def wait(self) -> int:
        """Block until the next unit is there; returns the index of its buffer. Raises what reading raised."""
        with self._changed:
            if not self.ready():
                started = self._clock()
                try:
                    self._changed.wait_for(self.ready)
                finally:
                    self.wait_s += self._clock() - started
            if self._ahead.is_ready:
                return self._ahead.take()
            raise self._error or RuntimeError("the stream is closed")

    def release(self) -> None:
        """The oldest unit that `wait` returned and that was not released is done with."""
        with self._changed:
            self._ahead.release()
            self._wanted.notify_all()

    def restart(self) -> None:
        """Let the next unit be the first of a pass, and try again after an error; see `ReadAhead.restart`."""
        with self._changed:
            self._error = None
            self._ahead.restart()
            self._wanted.notify_all()

    def close(self) -> None:
        """Stop reading and let go of the files."""
        with self._changed:
            if not self._closed:
                SwitchingOften.end()
            self._closed = True
            self._changed.notify_all()
            self._wanted.notify_all()
        for thread in self._threads:
            thread.join()
        self._storage.close()

    def _read_on(self) -> None:
        while (piece := self._begin()) is not None:
            error = self._error_of(self._read, piece)
            with self._changed:
                is_whole = self._land(piece)
            if error is None:
                if not is_whole:
                    continue
                error = self._error_of(self._check, piece)
            with self._changed:
                if error is None:
                    self._ahead.arrived(piece.reading)
                elif self._ahead.failed(piece.reading):
                    self._error = error
                self._changed.notify_all()

    def _begin(self) -> Piece | None:
        """Wait until there is a piece to read; None when the stream is closed."""
        with self._changed:
            piece = None
            while not self._closed and (self._error is not None or (piece := self._ahead.begin()) is None):
                self._wanted.wait()
            if self._closed or piece is None:
                return None
            if not self._bytes_on_way:
                self._since = self._clock()
            self._bytes_on_way += self._piece_bytes[piece.reading.unit][piece.number]
            return piece

    def _land(self, piece: Piece) -> bool:
        """Count a piece; whether its unit is whole now."""
        num_bytes, now = self._piece_bytes[piece.reading.unit][piece.number], self._clock()
        self.bytes_read += num_bytes
        self._bytes_on_way -= num_bytes
        self._recent_bytes += num_bytes - _RATE_WEIGHT * self._recent_bytes
        self._recent_s += max(now - self._since, 1e-9) - _RATE_WEIGHT * self._recent_s
        self._since = now
        return self._ahead.landed(piece)

    def _error_of(self, do: Callable[[Piece], None], piece: Piece) -> BaseException | None:
        """What goes wrong is for the thread that waits."""
        try:
            do(piece)
        except BaseException as error:
            return error
        return None

    def _read(self, piece: Piece) -> None:
        reading = piece.reading
        buffer = self._buffers[reading.buffer]
        if reading.unit == piece.number == 0:
            self._storage.check()
        for read in self._pieces[reading.unit][piece.number]:
            if self._closed:
                raise RuntimeError("the stream is closed")
            if reading.is_dropped:
                return
            part = buffer[read.buffer_offset : read.buffer_offset + read.num_bytes]
            self._storage.read_into(read.file, read.offset, part)

    def _check(self, piece: Piece) -> None:
        """Compare the unit that `piece` has completed with its checksum."""
        unit, buffer = self._units[piece.reading.unit], self._buffers[piece.reading.buffer]
        if unit.sha256 is None:
            return
        digest = hashlib.sha256()
        for read in unit.reads:
            digest.update(buffer[read.buffer_offset : read.buffer_offset + read.num_bytes])
        if digest.hexdigest() != unit.sha256:
            raise StorageError(
                f"{unit.reads[0].file}: the bytes of {unit.name} are not what they were; fetch the model again"
            )
