"""Where weights are read from: files, past the page cache or through it, and files that seem slower than they
are."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llmcad_mlx.errors import StorageError
from llmcad_mlx.files import MAX_IO_BYTES, check_open_files
from llmcad_mlx.files.safetensors import DATA_ALIGNMENT

BLOCK_BYTES = DATA_ALIGNMENT
"""A direct read begins and ends at a multiple of this, in the file and in memory: more than any disk's block (512
or 4096 bytes), and a page of Apple silicon."""

_F_NOCACHE = 48  # macOS, sys/fcntl.h
_BURST_S = 0.02


@dataclass(frozen=True, slots=True)
class ReadWay:
    """How streamed weights are read: `direct`, past the page cache, where files and system allow it, or through
    it; by `num_readers` threads, `piece_bytes` at a time."""

    direct: bool
    num_readers: int
    piece_bytes: int


DEFAULT_WAY = ReadWay(True, 4, 16 << 20) if sys.platform == "darwin" else ReadWay(False, 1, 1 << 20)
"""Where nothing was measured. On macOS past the cache, where cached weights push out what is pinned, in large
pieces, which need the interpreter's lock less often. On Linux the processor computes, and more readers take time
from it: with four of 16 MiB a pass of the Qwen pair took 0.94 s, with one of 4 MiB 0.78 s, on two cores. In pieces
of 1 MiB a pass without a draft took 0.36 s, of 4 MiB 0.43 s, under a limit that the page cache counts to (LOG)."""


class Storage(Protocol):
    """Bytes of files. Reading threads and the computing thread use it at the same time."""

    def read_into(self, file: Path, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes at `offset`. Raises StorageError naming the file."""

    def check(self) -> None:
        """Raise StorageError when a file is not what it was when it was opened. Called once a pass."""

    def close(self) -> None:
        """Let go of the files."""


@dataclass(slots=True)
class _OpenFile:
    """`uncached`: a second descriptor for direct reads; None: not opened yet, or there can be none."""

    cached: int
    identity: tuple[int, ...]
    uncached: int | None = None
    can_be_direct: bool = True


class FileStorage:
    """Real files, opened when they are first read.

    Of a direct read the blocks that lie alike in the file and in memory go past the page cache, the rest
    (looked-up rows, a file's last bytes, tensors at odd offsets) through it. Where the system refuses, all does.
    """

    def __init__(self, direct: bool = False) -> None:
        self.direct = direct
        """May be changed at any time, for what is read from then on."""
        self._files: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()

    def read_into(self, file: Path, offset: int, out: memoryview) -> None:
        try:
            opened = self._opened(file)
            first, last = _direct_part(offset, out) if self.direct and opened.can_be_direct else (0, 0)
            if first < last:
                _fill(file, opened.cached, offset, out[:first])
                if not self._fill_directly(file, opened, offset + first, out[first:last]):
                    last = first
            _fill(file, opened.cached, offset + last, out[last:])
        except OSError as error:
            check_open_files(error, file)
            raise StorageError(f"{file}: cannot be read ({error.strerror or error}); check the disk") from error

    def _opened(self, file: Path) -> _OpenFile:
        with self._lock:
            if file not in self._files:
                handle = os.open(file, _open_flags())
                self._files[file] = _OpenFile(handle, _identity(os.fstat(handle)))
            return self._files[file]

    def _fill_directly(self, file: Path, opened: _OpenFile, offset: int, out: memoryview) -> bool:
        """False where this file cannot be read so."""
        try:
            with self._lock:
                if opened.uncached is None:
                    opened.uncached = _open_uncached(file)
            _fill(file, opened.uncached, offset, out)
        except OSError as error:  # file systems without direct reads refuse at one or the other
            if error.errno not in (errno.EINVAL, errno.EMFILE, errno.ENFILE):
                raise
            opened.can_be_direct = False
        return opened.can_be_direct

    def check(self) -> None:
        for file, opened in list(self._files.items()):
            try:
                now = _identity(os.stat(file))
            except OSError:
                raise StorageError(f"{file}: was deleted while it was in use; load the model again") from None
            if now != opened.identity:
                raise StorageError(f"{file}: was changed while it was in use; load the model again")

    def close(self) -> None:
        with self._lock:
            for opened in self._files.values():
                os.close(opened.cached)
                if opened.uncached is not None:
                    os.close(opened.uncached)
            self._files.clear()

    def __del__(self) -> None:
        self.close()  # after a load that failed there is nobody else to do it


def _fill(file: Path, handle: int, offset: int, out: memoryview) -> None:
    """No single read is larger than systems allow. Raises OSError, StorageError for a file that is too short."""
    done = 0
    while done < len(out):
        count = os.preadv(handle, [out[done : done + MAX_IO_BYTES]], offset + done)
        if count == 0:
            raise StorageError(f"{file}: was cut off while it was in use; fetch the model again")
        done += count


def _direct_part(offset: int, out: memoryview) -> tuple[int, int]:
    """From where to where in `out` a read at `offset` of a file can be direct: whole blocks, or nothing (0, 0)."""
    first, last = -offset % BLOCK_BYTES, len(out) - (offset + len(out)) % BLOCK_BYTES
    if first >= last or (address_of(out) - offset) % BLOCK_BYTES:
        return 0, 0
    return first, last


def address_of(memory: memoryview) -> int:
    """Where writable memory lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _open_flags() -> int:
    return os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)


def _open_uncached(file: Path) -> int:
    """A descriptor that reads past the page cache. Raises OSError, EINVAL where the file system has none.

    macOS copies what lies in the cache already, and reads what is not aligned through the cache, but does not
    leave it there (XNU, `cluster_read_direct`).
    """
    direct = getattr(os, "O_DIRECT", None)
    if direct is not None:
        return os.open(file, _open_flags() | direct)
    handle = os.open(file, _open_flags())
    try:
        fcntl.fcntl(handle, _F_NOCACHE, 1)
    except OSError:
        os.close(handle)
        raise
    return handle


class ThrottledStorage:
    """Another storage at `bytes_per_s` at most, all threads together: a token bucket of 20 ms."""

    def __init__(
        self,
        inner: Storage,
        bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._inner = inner
        self._rate = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()  # when everything read so far would have been delivered
        self._lock = threading.Lock()

    def read_into(self, file: Path, offset: int, out: memoryview) -> None:
        piece = max(1, int(self._rate * _BURST_S))
        if piece > BLOCK_BYTES:
            piece -= piece % BLOCK_BYTES  # what could be read directly still can
        for start in range(0, len(out), piece):
            part = out[start : start + piece]
            self._inner.read_into(file, offset + start, part)
            with self._lock:
                now = self._clock()
                self._free_at = max(self._free_at, now - _BURST_S) + len(part) / self._rate
                wait = self._free_at - now
            if wait > 0:
                self._sleep(wait)

    def check(self) -> None:
        self._inner.check()

    def close(self) -> None:
        self._inner.close()


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
