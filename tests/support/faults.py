"""What goes wrong at a chosen moment: a storage of bytes in memory at some reads, a call that is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmcad_mlx.errors import StorageError

Fault = Callable[[Path, memoryview], None]
"""Called when a read has filled its buffer: to raise, to wait, or to change what was read."""


class MemoryStorage:
    """Files that are byte strings, and faults of some reads, which are counted from 1."""

    def __init__(self, files: Mapping[Path, bytes], faults: Mapping[int, Fault] | None = None) -> None:
        self.files, self.faults = files, faults or {}
        self.reads = self.checks = 0
        self.closed = False
        self._lock = threading.Lock()

    def read_into(self, file: Path, offset: int, out: memoryview) -> None:
        with self._lock:
            self.reads += 1
            fault = self.faults.get(self.reads)
        out[:] = self.files[file][offset : offset + len(out)]
        if fault is not None:
            fault(file, out)

    def check(self) -> None:
        self.checks += 1

    def close(self) -> None:
        self.closed = True


def read_error(file: Path, out: memoryview) -> None:
    raise StorageError(f"{file}: cannot be read (made up); check the disk")


def wrong_bytes(file: Path, out: memoryview) -> None:
    """One bit is another."""
    out[len(out) // 2] ^= 1


class SlowRead:
    """A read that waits until `go` is set; `begun` tells that it has come to that."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, file: Path, out: memoryview) -> None:
        self.begun.set()
        assert self.go.wait(30)


class Interrupting:
    """Counts the calls of the methods it is put around and interrupts the n-th, before or after its work."""

    def __init__(self, call: int, after: bool) -> None:
        self.left, self.after = call, after

    def around(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise KeyboardInterrupt
            result = inner(*args, **kwargs)
            if self.left == 0:
                raise KeyboardInterrupt
            return result

        setattr(owner, name, counting)
