"""The order of reading ahead: which unit goes into which buffer, what is there, what is in use.

No thread, file or clock in here. A stream asks what to read next and tells what was read (`stream`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


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
        self._there: deque[Reading] = deque()  # oldest first
        self._held: deque[int] = deque()  # buffers

    @property
    def num_there(self) -> int:
        """Units that were read and not taken yet; the next one is the first of them."""
        return len(self._there)

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
        self._there.append(self.reading)
        self.reading = None

    def failed(self) -> None:
        """What was begun could not be read; `begin` will give it again."""
        assert self.reading is not None
        self._free.appendleft(self.reading.buffer)
        self._next_read, self.reading = self.reading.unit, None

    def take(self) -> int:
        """The buffer of the next unit, which must be there."""
        buffer = self._there.popleft().buffer
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
        while self._there and self._there[0].unit != 0:
            self._free.append(self._there.popleft().buffer)
        self.next_unit = 0
        if self._there:
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
        unread = self.next_unit + len(self._there) + (self.reading is not None)
        rest = begun + self._bytes_from[unread] if unread <= count else 0
        coming = 0 if self._there else begun or sizes[self.next_unit]
        return Outlook(coming / bytes_per_s, room / bytes_per_s, rest / bytes_per_s)
