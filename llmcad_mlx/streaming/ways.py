"""How streamed weights are best read on this machine: measured once, kept for the disk, used by later loads.

What is measured must come from the disk. Cached pages are let go of on Linux; macOS copies them even where a read
is direct, and has no way to drop them, so there only ranges count that the page cache does not hold.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from llmcad_mlx.files import home_folder, read_object, write_text
from llmcad_mlx.files.safetensors import WeightIndex
from llmcad_mlx.memory import MemoryPlan, ReadRate
from llmcad_mlx.streaming.storage import BLOCK_BYTES, DEFAULT_WAY, FileStorage, ReadWay, address_of
from llmcad_mlx.streaming.stream import Read, Unit, WeightStream

WAYS = tuple(
    ReadWay(direct, num_readers, piece_bytes << 20)
    for direct, sizes in ((True, (4, 16)), (False, (1, 4)))
    for num_readers in (1, 2, 4)
    for piece_bytes in sizes
)
"""What is tried."""

_CACHE_SHARE = 0.75  # of the memory that is left over; other files want some, too
_REGION_BYTES = 32 << 20  # read as one unit; about a layer of a small model
_NUM_BUFFERS = 3  # as a plan has them
_ROUNDS = 3  # disks are busy with other things for a moment; the middle one counts
_AS_FAST = 0.9  # of the fastest way; less is a difference that measurements show
_MOSTLY_READ = 0.02  # of a range may be cached: file systems keep some metadata pages, neighbours read ahead
_SLOW_PIECE_S = 0.05  # emulated: stopping waits for the pieces that are being read
_VERSION = 1


@dataclass(frozen=True, slots=True)
class WayRate:
    """How fast `way` reads: alone, and while a thread of Python never rests, as drafting does. `sampled_bytes`:
    how much was read for a figure; `from_disk`: the page cache held nothing of it."""

    way: ReadWay
    bytes_per_s: float
    beside_python_bytes_per_s: float
    sampled_bytes: int
    from_disk: bool


# -- which way ---------------------------------------------------------------------------------------------


def known_way(file: Path) -> ReadWay:
    """What was found best for the disk that `file` is on, else `DEFAULT_WAY`."""
    kept: Any = _kept().get(_disk(file))
    with suppress(TypeError, KeyError, AttributeError):
        way = ReadWay(**kept["way"])
        if way in WAYS:
            return way
    return DEFAULT_WAY


def keep_way(file: Path, found: WayRate) -> None:
    """Let later loads of models on the disk of `file` read so. Raises OSError."""
    content = {"version": _VERSION, "disks": {**_kept(), _disk(file): asdict(found)}}
    write_text(_kept_file(), json.dumps(content, indent=1) + "\n")


def short_pieces(way: ReadWay, bytes_per_s: float) -> ReadWay:
    """The way for emulated storage: closing a stream does not wait long for pieces that are being read."""
    most = int(bytes_per_s * _SLOW_PIECE_S)
    return replace(way, piece_bytes=min(way.piece_bytes, max(most - most % BLOCK_BYTES, BLOCK_BYTES)))


def fits_page_cache(plan: MemoryPlan) -> bool:
    """Whether the system can keep in its page cache what a pass reads, beside all that is planned."""
    process = psutil.Process().memory_info().rss
    most = min([psutil.virtual_memory().available + process, *_cgroup_limits()])
    return plan.streamed_bytes <= (most - plan.total_bytes) * _CACHE_SHARE


def _cgroup_limits() -> Iterator[int]:
    """Of memory, on Linux, for the groups that this process is in."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = Path("/sys/fs/cgroup") / controllers
                folder = root / path.lstrip("/")
                for group in (folder, *folder.parents):
                    for name in ("memory.max", "memory.limit_in_bytes"):
                        with suppress(OSError, ValueError):
                            yield int((group / name).read_text())
                    if group == root:
                        break


def _kept_file() -> Path:
    return home_folder() / "reading.json"


def _kept() -> dict[str, Any]:
    """What is kept, by disk."""
    content = read_object(_kept_file())
    disks = content.get("disks") if content.get("version") == _VERSION else None
    return disks if isinstance(disks, dict) else {}


def _disk(file: Path) -> str:
    """The number of the disk, by which a way is kept; another one just has the default again."""
    try:
        return str(os.stat(file).st_dev)
    except OSError:
        return ""


# -- measuring ---------------------------------------------------------------------------------------------


def reads_of(weights: WeightIndex) -> list[Read]:
    """All tensors' bytes of a model folder, a range for each file."""
    ends: dict[Path, tuple[int, int]] = {}
    for extent in weights.values():
        start, end = ends.get(extent.file, (extent.offset, 0))
        ends[extent.file] = min(start, extent.offset), max(end, extent.offset + extent.num_bytes)
    return [Read(file, start, end - start, 0) for file, (start, end) in ends.items()]


def num_turns(ways: Sequence[ReadWay] = WAYS) -> int:
    """How often `measure_ways` calls `advance`."""
    return len(ways) * 2 * _ROUNDS


def measure_ways(
    reads: Sequence[Read],
    seconds: float = 15.0,
    ways: Sequence[ReadWay] = WAYS,
    advance: Callable[[int], None] = lambda turns: None,
) -> list[WayRate]:
    """Read some of `reads` in each of `ways`, in turns, alone and beside a busy Python thread.

    seconds: for everything, about. advance: called with 1 after each of `num_turns` turns. Raises StorageError for
    a file that cannot be read.
    """
    sampler, turn_s = _Sampler(reads), seconds / num_turns(ways)
    found: dict[tuple[ReadWay, bool], list[_Sample]] = {(way, busy): [] for way in ways for busy in (False, True)}
    for _ in range(_ROUNDS):
        for (way, busy), samples in found.items():
            with busy_python() if busy else nullcontext():
                samples.append(sampler.read(way, turn_s))
            advance(1)
    return [_rate(way, found[way, False], found[way, True]) for way in ways]


def _rate(way: ReadWay, alone: Sequence[_Sample], beside: Sequence[_Sample]) -> WayRate:
    return WayRate(
        way,
        median(sample.bytes_per_s for sample in alone),
        median(sample.bytes_per_s for sample in beside),
        sum(sample.num_bytes for sample in (*alone, *beside)),
        all(sample.from_disk for sample in (*alone, *beside)),
    )


def best_way(rates: Sequence[WayRate]) -> WayRate:
    """The fastest beside drafting. Of ways that are about as fast: direct, for it spares processor and memory;
    then with few readers and large pieces, which need the interpreter's lock less often."""
    most = max(rate.beside_python_bytes_per_s for rate in rates)
    fast = [rate for rate in rates if rate.beside_python_bytes_per_s >= _AS_FAST * most]
    return min(fast, key=lambda rate: (not rate.way.direct, rate.way.num_readers, -rate.way.piece_bytes))


def measure_read_rate(reads: Sequence[Read], num_bytes: int = 256 << 20, seconds: float = 2.0) -> ReadRate:
    """Read some of `reads`, up to `num_bytes` or about so many seconds, as loads do. Raises StorageError for a
    file that cannot be read."""
    sampler, way = _Sampler(reads), known_way(reads[0].file)
    first = sampler.read(way, 0.0)  # wakes the disk, and tells how much can be read
    sample = sampler.read(way, seconds, num_bytes) if len(reads) > 1 or first.num_bytes < num_bytes else first
    return ReadRate(sample.bytes_per_s, sampled_bytes=sample.num_bytes, from_disk=sample.from_disk)


@contextmanager
def busy_python() -> Iterator[None]:
    """A thread that wants the interpreter's lock all the time."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin, name="busy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class _Sample:
    num_bytes: int
    bytes_per_s: float
    from_disk: bool


class _Sampler:
    """Reads parts of `reads` that come from the disk, other ones each time as long as there are enough."""

    def __init__(self, reads: Sequence[Read]) -> None:
        parts = (part for read in reads for part in _in_blocks(read).cut(_REGION_BYTES))
        self._units = deque(Unit("sample", (replace(part, buffer_offset=0),)) for part in parts)
        self._buffers = _aligned_buffers(max(unit.num_bytes for unit in self._units), _NUM_BUFFERS)
        self._bytes_per_s = 0.0  # lately

    def read(self, way: ReadWay, seconds: float, most_bytes: int | None = None) -> _Sample:
        """About as much as can be read in that time, some regions at least."""
        wanted = max(int(seconds * self._bytes_per_s), 2 * _REGION_BYTES)
        units = self._next(min(wanted, most_bytes or wanted))
        from_disk = all(_from_disk(read) for unit in units for read in unit.reads)
        num_bytes = sum(unit.num_bytes for unit in units)
        started = time.perf_counter()
        with closing(WeightStream(units, self._buffers, FileStorage(way.direct), way)) as stream:
            for number in range(len(units)):
                stream.wait()
                if number + _NUM_BUFFERS < len(units):  # nothing is read beyond the last one
                    stream.release()
            self._bytes_per_s = num_bytes / max(time.perf_counter() - started, 1e-9)
        return _Sample(num_bytes, self._bytes_per_s, from_disk)

    def _next(self, num_bytes: int) -> list[Unit]:
        """Units of so many bytes together, of those that the page cache does not hold if there are any."""
        units: list[Unit] = []
        held: list[Unit] = []
        for _ in range(len(self._units)):
            unit = self._units.popleft()
            self._units.append(unit)
            _forget(unit)
            (units if _from_disk(unit.reads[0]) else held).append(unit)
            if sum(unit.num_bytes for unit in units) >= num_bytes:
                break
        return units or held


def _in_blocks(read: Read) -> Read:
    """The whole blocks of a range, which can be read directly; the range where there are none."""
    start = -(-read.offset // BLOCK_BYTES) * BLOCK_BYTES
    size = (read.offset + read.num_bytes - start) // BLOCK_BYTES * BLOCK_BYTES
    return Read(read.file, start, size, 0) if size > 0 else read


def _aligned_buffers(num_bytes: int, count: int) -> list[memoryview]:
    buffers = []
    for _ in range(count):
        whole = memoryview(bytearray(num_bytes + BLOCK_BYTES))
        start = -address_of(whole) % BLOCK_BYTES
        buffers.append(whole[start : start + num_bytes])
    return buffers


def _forget(unit: Unit) -> None:
    """Ask the page cache to let go of a unit, where it can be asked (Linux)."""
    if hasattr(os, "posix_fadvise"):
        for read in unit.reads:
            with suppress(OSError), read.file.open("rb") as file:
                os.posix_fadvise(file.fileno(), read.offset, read.num_bytes, os.POSIX_FADV_DONTNEED)


def _from_disk(read: Read) -> bool:
    """Whether the page cache holds next to nothing of a range. False where the system does not tell."""
    with suppress(OSError, ValueError, AttributeError):
        return cached_share(read) < _MOSTLY_READ
    return False


def cached_share(read: Read) -> float:
    """How much of a range lies in the page cache, by `mincore`. Raises OSError, AttributeError without it.

    Never tried on macOS, whose manual describes the same call.
    """
    start = read.offset - read.offset % mmap.ALLOCATIONGRANULARITY
    length = read.offset + read.num_bytes - start
    with read.file.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
    try:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(view.ctypes.data)
        if libc.mincore(address, ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        del view  # a mapping that is in use cannot be closed
        return float(np.mean(pages & 1))
    finally:
        mapped.close()
