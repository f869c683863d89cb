"""Storages for tests: bytes in memory, and one that goes wrong at chosen reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from llmcad_mlx.errors import StorageError
from llmcad_mlx.streaming.storage import Storage

Fault = Callable[[Storage, Path, int, memoryview], None]
"""Does what `Storage.read_into` should do, only wrongly."""


class MemoryStorage:
    """Files that are byte strings. `checks` counts the calls of `check`."""

    def __init__(self, files: Mapping[Path, bytes]) -> None:
        self.files = files
        self.checks = 0
        self.closed = False

    def read_into(self, file: Path, offset: int, out: memoryview) -> None:
        data = self.files[file][offset : offset + len(out)]
        if len(data) < len(out):
            raise StorageError(f"{file}: was cut off")
        out[:] = data

    def check(self) -> None:
        self.checks += 1

    def close(self) -> None:
        self.closed = True


class FaultyStorage:
    """Another storage, but for the reads in `faults`, which are counted from 1."""

    def __init__(self, inner: Storage, faults: Mapping[int, Fault]) -> None:
        self.inner, self.faults = inner, faults
        self.reads = 0
        self._lock = threading.Lock()

    def read_into(self, file: Path, offset: int, out: memoryview) -> None:
        with self._lock:
            self.reads += 1
            fault = self.faults.get(self.reads)
        if fault is None:
            self.inner.read_into(file, offset, out)
        else:
            fault(self.inner, file, offset, out)

    def check(self) -> None:
        self.inner.check()

    def close(self) -> None:
        self.inner.close()


def read_error(inner: Storage, file: Path, offset: int, out: memoryview) -> None:
    """Nothing can be read."""
    raise StorageError(f"{file}: cannot be read (made up); check the disk")


def short_read(inner: Storage, file: Path, offset: int, out: memoryview) -> None:
    """The file ends half way."""
    half = len(out) // 2
    inner.read_into(file, offset, out[:half])
    raise StorageError(f"{file}: was cut off while it was in use; fetch the model again")


def wrong_bytes(inner: Storage, file: Path, offset: int, out: memoryview) -> None:
    """One bit is another."""
    inner.read_into(file, offset, out)
    out[len(out) // 2] ^= 1


class SlowRead:
    """A read that waits until `go` is set; `begun` tells that it has come to that."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, inner: Storage, file: Path, offset: int, out: memoryview) -> None:
        self.begun.set()
        assert self.go.wait(30)
        inner.read_into(file, offset, out)
