"""Where weights are read from: files, files that seem slower than they are, and (in tests) files that fail."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from llmcad_mlx.errors import StorageError
from llmcad_mlx.files import check_open_files

_BURST_S = 0.02
_PIECE_BYTES = 1 << 20


class Storage(Protocol):
    """Bytes of files. The reading thread and the computing thread use it at the same time."""

    def read_into(self, file: Path, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes at `offset`. Raises StorageError naming the file."""

    def check(self) -> None:
        """Raise StorageError when a file is not what it was when it was opened. Called once a pass."""

    def close(self) -> None:
        """Let go of the files."""


class FileStorage:
    """Real files, opened when they are first read."""

    def __init__(self, drop_cache: bool = False) -> None:
        """drop_cache: do not leave what was read in the page cache (Linux), to measure the disk itself."""
        self._files: dict[Path, tuple[int, tuple[int, ...]]] = {}
        self._lock = threading.Lock()
        self._drop_cache = drop_cache and hasattr(os, "posix_fadvise")

    def read_into(self, file: Path, offset: int, out: memoryview) -> None:
        try:
            with self._lock:
                if file not in self._files:
                    handle = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                    self._files[file] = handle, _identity(os.fstat(handle))
                handle = self._files[file][0]
            done = 0
            while done < len(out):
                count = os.preadv(handle, [out[done:]], offset + done)
                if count == 0:
                    raise StorageError(f"{file}: was cut off while it was in use; fetch the model again")
                done += count
            if self._drop_cache:
                os.posix_fadvise(handle, offset, len(out), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            check_open_files(error, file)
            raise StorageError(f"{file}: cannot be read ({error.strerror or error}); check the disk") from error

    def check(self) -> None:
        for file, (_, identity) in list(self._files.items()):
            try:
                now = _identity(os.stat(file))
            except OSError:
                raise StorageError(f"{file}: was deleted while it was in use; load the model again") from None
            if now != identity:
                raise StorageError(f"{file}: was changed while it was in use; load the model again")

    def close(self) -> None:
        with self._lock:
            for handle, _ in self._files.values():
                os.close(handle)
            self._files.clear()

    def __del__(self) -> None:
        self.close()  # after a load that failed there is nobody else to do it


class ThrottledStorage:
    """Another storage at `bytes_per_s` at most, both threads together: a token bucket of 20 ms."""

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
        piece = max(1, min(_PIECE_BYTES, int(self._rate * _BURST_S)))
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
