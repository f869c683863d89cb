"""How fast a target's weights can be read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmcad_mlx.target.storage import FileStorage, Storage
from llmcad_mlx.target.stream import Read

_SAMPLE_BYTES = 256 << 20
_SAMPLE_S = 2.0
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ReadRate:
    """`sampled_bytes`: how much was read to find out, 0 where the rate was given. `from_disk`: the page cache was
    emptied of the sample first."""

    bytes_per_s: float
    emulated: bool = False
    sampled_bytes: int = 0
    from_disk: bool = True


def measure_read_rate(reads: Sequence[Read]) -> ReadRate:
    """Read some of `reads`, up to 256 MB or 2 s. Raises StorageError for a file that cannot be read.

    Where the system lets go of cached pages on demand (Linux), the sample is read twice, and the second time
    counts. Elsewhere what the page cache holds comes from memory, and the disk may be slower.
    """
    can_drop = hasattr(os, "posix_fadvise")
    storage = FileStorage(drop_cache=can_drop)
    try:
        sample, rate = timed_read(reads, storage)
        if can_drop:
            sample, rate = timed_read(sample, storage)
    finally:
        storage.close()
    return ReadRate(rate, sampled_bytes=sum(read.num_bytes for read in sample), from_disk=can_drop)


def timed_read(
    reads: Sequence[Read], storage: Storage, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[Read], float]:
    """Read pieces of `reads` in order until there are enough; returns what was read, and bytes per second."""
    buffer, sample = memoryview(bytearray(_PIECE_BYTES)), []
    num_bytes, started = 0, clock()
    seconds = 0.0
    for piece in _pieces(reads):
        if num_bytes >= _SAMPLE_BYTES or seconds >= _SAMPLE_S:
            break
        storage.read_into(piece.file, piece.offset, buffer[: piece.num_bytes])
        sample.append(piece)
        num_bytes += piece.num_bytes
        seconds = clock() - started
    return sample, num_bytes / max(seconds, 1e-9)


def _pieces(reads: Sequence[Read]) -> Iterator[Read]:
    for read in reads:
        for start in range(0, read.num_bytes, _PIECE_BYTES):
            yield Read(read.file, read.offset + start, min(_PIECE_BYTES, read.num_bytes - start), 0)
