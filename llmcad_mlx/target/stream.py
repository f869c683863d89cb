"""Reads the streamed units of a target, pass after pass, ahead of the thread that computes with them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from llmcad_mlx.errors import StorageError
from llmcad_mlx.target.storage import Storage

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
    """What is brought in at once: a layer, a piece of the head. `sha256`: of its bytes in the order of reading."""

    name: str
    reads: tuple[Read, ...]
    sha256: str | None = None

    @property
    def num_bytes(self) -> int:
        return sum(read.num_bytes for read in self.reads)

    @property
    def buffer_bytes(self) -> int:
        """How large a buffer must be."""
        return max((read.buffer_offset + read.num_bytes for read in self.reads), default=0)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected of a stream, in seconds from now, if nothing is waited for or released.

    `ready`: until the next unit is there. `idle`: until reading pauses for want of a free buffer. `rest`: until
    the last unit of the pass would have been read without a pause.
    """

    ready: float
    idle: float
    rest: float


class WeightStream(Protocol):
    """Units in cyclic order, read ahead into a few buffers.

    buffer = stream.wait()      # the next unit is in this buffer
    …compute with it…
    stream.release()            # the buffer may be filled again
    """

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""

    @property
    def wait_s(self) -> float:
        """Seconds that `wait` has blocked so far."""

    def ready(self) -> bool:
        """Whether `wait` would return, or raise, at once."""

    def outlook(self) -> Outlook:
        """What is expected, by the rate of the last reads; all 0.0 before the first."""

    def wait(self) -> int:
        """Block until the next unit is there; returns the index of its buffer. Raises what reading raised."""

    def release(self) -> None:
        """The oldest unit that `wait` returned and that was not released is done with."""

    def restart(self) -> None:
        """Let the next unit be the first of a pass. Drops what was read ahead unless that is so already."""

    def close(self) -> None:
        """Stop reading."""


class _StoppedError(Exception):
    """The read is not wanted any more."""


class ThreadedStream:
    """A stream with a thread that reads.

    After the last unit of a pass comes the first of the next, so reading goes on between passes until all buffers
    are full. After an error `restart` tries again.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        buffers: Sequence[memoryview],
        storage: Storage,
        clock: Callable[[], float] = time.perf_counter,
        verify: bool = False,
    ) -> None:
        """verify: compare each unit that has a checksum with it. Raises ValueError for buffers that are too few or
        too small."""
        need = max((unit.buffer_bytes for unit in units), default=0)
        if not units or not buffers or any(len(buffer) < need for buffer in buffers):
            raise ValueError(f"{len(buffers)} buffers cannot stream {len(units)} units of up to {need} bytes")
        self._units, self._buffers, self._storage = units, buffers, storage
        self._clock, self._verify = clock, verify
        self.bytes_read = 0
        self.wait_s = 0.0
        self._changed = threading.Condition()
        self._next_read = 0  # unit to be read next
        self._next_wait = 0  # unit that wait returns next
        self._free = deque(range(len(buffers)))
        self._there: deque[int] = deque()  # buffers with units that were read, oldest first
        self._held: deque[int] = deque()  # buffers that wait has given out
        self._error: BaseException | None = None
        self._bytes_after = list(accumulate((unit.num_bytes for unit in reversed(units)), initial=0))[::-1]
        self._reading: int | None = None  # the unit that is being read
        self._unit_read = 0  # bytes of it that are there
        self._rate = 0.0  # bytes per second of the last reads
        self._generation = 0
        self._closed = False
        self._thread = threading.Thread(target=self._read_on, name="weight reader", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        with self._changed:
            return bool(self._there) or self._error is not None or self._closed

    def outlook(self) -> Outlook:
        with self._changed:
            if not self._rate or self._closed or self._error is not None:
                return Outlook(0.0, 0.0, 0.0)
            count = len(self._units)
            begun, first = 0, self._next_read
            if self._reading is not None:
                begun, first = self._units[first].num_bytes - self._unit_read, (first + 1) % count
            room = begun + sum(self._units[(first + i) % count].num_bytes for i in range(len(self._free)))
            # What was read ahead may belong to the next pass already.
            unread = self._next_wait + len(self._there) + (self._reading is not None)
            rest = begun + self._bytes_after[unread] if unread <= count else 0
            return Outlook(
                0.0 if self._there else (begun or self._units[self._next_wait].num_bytes) / self._rate,
                room / self._rate,
                rest / self._rate,
            )

    def wait(self) -> int:
        with self._changed:
            if not self._there and self._error is None and not self._closed:
                started = self._clock()
                try:
                    while not self._there and self._error is None and not self._closed:
                        self._changed.wait()
                finally:
                    self.wait_s += self._clock() - started
            if self._there:
                buffer = self._there.popleft()
                self._held.append(buffer)
                self._next_wait = (self._next_wait + 1) % len(self._units)
                return buffer
            raise self._error or RuntimeError("the stream is closed")

    def release(self) -> None:
        with self._changed:
            if self._held:
                self._free.append(self._held.popleft())
                self._changed.notify_all()

    def restart(self) -> None:
        with self._changed:
            if self._next_wait == 0 and not self._held and self._error is None:
                return
            self._generation += 1
            self._error = self._reading = None
            self._there.clear()
            self._held.clear()
            self._next_read = self._next_wait = 0
            self._free = deque(range(len(self._buffers)))
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._generation += 1
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _read_on(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._free or self._error is not None):
                    self._changed.wait()
                if self._closed:
                    return
                number, buffer, generation = self._next_read, self._free.popleft(), self._generation
                self._reading, self._unit_read = number, 0
            error: BaseException | None = None
            started = self._clock()
            try:
                self._read(number, buffer, generation)
            except _StoppedError:
                continue
            except BaseException as raised:  # handed to the thread that waits
                error = raised
            rate = self._units[number].num_bytes / max(self._clock() - started, 1e-9)
            with self._changed:
                if generation != self._generation:
                    continue
                self._reading = None
                if error is None:
                    self._rate += (rate - self._rate) * (_RATE_WEIGHT if self._rate else 1.0)
                    self._there.append(buffer)
                    self._next_read = (number + 1) % len(self._units)
                else:
                    self._error = error
                self._changed.notify_all()

    def _read(self, number: int, buffer: int, generation: int) -> None:
        unit = self._units[number]
        digest = hashlib.sha256() if self._verify and unit.sha256 is not None else None
        if number == 0:
            self._storage.check()
        for read in unit.reads:
            for start in range(0, read.num_bytes, _PIECE_BYTES):
                if generation != self._generation:
                    raise _StoppedError
                size = min(_PIECE_BYTES, read.num_bytes - start)
                place = read.buffer_offset + start
                part = self._buffers[buffer][place : place + size]
                self._storage.read_into(read.file, read.offset + start, part)
                self.bytes_read += size
                self._unit_read += size
                if digest is not None:
                    digest.update(part)
        if digest is not None and digest.hexdigest() != unit.sha256:
            raise StorageError(
                f"{unit.reads[0].file}: the bytes of {unit.name} are not what they were; fetch the model again"
            )
