"""Storages: what is read, what is noticed, and how fast an emulated disk is."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx.errors import StorageError
from llmcad_mlx.files.safetensors import read_json, read_tensors
from llmcad_mlx.gguf.reader import read_gguf_header
from llmcad_mlx.streaming.storage import FileStorage, ThrottledStorage
from tests.support.faults import MemoryStorage
from tests.support.simulated_stream import SimulatedClock

DATA = bytes((7 * i + i // 256) % 256 for i in range(100_000))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture(params=[False, True], ids=["cached", "uncached"])
def storage(request: pytest.FixtureRequest) -> Iterator[FileStorage]:
    opened = FileStorage(drop_cache=request.param)
    yield opened
    opened.close()


def read(storage: Any, file: Path, offset: int, size: int) -> bytes:
    out = bytearray(size)
    storage.read_into(file, offset, memoryview(out))
    return bytes(out)


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "size"), [(0, 100_000), (1, 1), (4095, 4098), (99_999, 1), (50, 0)])
def test_any_bytes_of_a_file(storage: FileStorage, file: Path, offset: int, size: int) -> None:
    assert read(storage, file, offset, size) == DATA[offset : offset + size]


def test_what_the_system_reads_in_parts_is_put_together(
    storage: FileStorage, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, []

    def partly(handle: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(handle, [buffers[0][: 1 + len(buffers[0]) // 3]], offset)

    monkeypatch.setattr(os, "preadv", partly)
    assert read(storage, file, 10, 50_000) == DATA[10:50_010]
    assert len(calls) > 10


@pytest.mark.parametrize(("offset", "size"), [(99_999, 2), (100_000, 1), (200_000, 5)])
def test_a_file_that_ends_too_early_is_named(storage: FileStorage, file: Path, offset: int, size: int) -> None:
    with pytest.raises(
        StorageError, match=r"weights\.bin: was cut off while it was in use; fetch the model again"
    ):
        read(storage, file, offset, size)


def test_an_error_of_the_disk_is_told(storage: FileStorage, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(
            StorageError, match=r"weights\.bin: cannot be read \(Input/output error\); check the disk"
        ):
            read(storage, file, 0, 10)
    assert read(storage, file, 0, 10) == DATA[:10]
    with pytest.raises(StorageError, match=r"gone\.bin: cannot be read \(No such file or directory\); check"):
        read(storage, file.with_name("gone.bin"), 0, 1)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_not_the_disks_fault(
    storage: FileStorage, file: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Wherever a model's files are opened."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    told = r"weights\.bin: cannot be opened, too many files are; raise the limit \(ulimit -n\)"
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StorageError, match=told):
        read(storage, file, 0, 1)
    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(Path, "read_text", fail)
    for use in (read_tensors, partial(read_json, remedy=""), read_gguf_header):
        with pytest.raises(StorageError, match=told):
            use(file)


def replace(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(DATA)
    os.replace(other, file)


def rewrite(file: Path) -> None:
    before = file.stat().st_mtime_ns
    file.write_bytes(DATA[:-1] + b"?")
    os.utime(file, ns=(before + 1, before + 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: os.truncate(file, 99_999), "was changed"),
        (replace, "was changed"),
        (rewrite, "was changed"),
        (Path.unlink, "was deleted"),
    ],
)
def test_a_file_that_is_not_what_it_was_is_noticed(
    storage: FileStorage, file: Path, damage: Callable[[Path], None], message: str
) -> None:
    other = file.with_name("other.bin")
    other.write_bytes(DATA)
    storage.check()  # nothing is open yet
    read(storage, file, 0, 10)
    read(storage, other, 0, 10)
    storage.check()
    damage(file)
    with pytest.raises(StorageError, match=rf"weights\.bin: {message} while it was in use; load the model again"):
        storage.check()
    if damage is not rewrite:  # the pass goes on with what was opened
        assert read(storage, file, 20, 10) == DATA[20:30]


def test_files_are_opened_once_and_let_go_of(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = os.open

    def noting(*arguments: Any) -> int:
        opened.append(real(*arguments))
        return opened[-1]

    monkeypatch.setattr(os, "open", noting)
    storage = FileStorage()
    for _ in range(3):
        read(storage, file, 0, 10)
    (handle,) = opened
    storage.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)
    assert read(storage, file, 0, 10) == DATA[:10]  # opens it again
    again = opened[-1]
    del storage
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(again)


def test_two_threads_read_at_the_same_time(storage: FileStorage, file: Path) -> None:
    def reader(first: int, found: list[bool]) -> None:
        found += [read(storage, file, at, 977) == DATA[at : at + 977] for at in range(first, 90_000, 977)]

    found: list[bool] = []
    threads = [threading.Thread(target=reader, args=(first, found)) for first in (0, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 93 + 92
    assert all(found)


# -- slower files ------------------------------------------------------------------------------------------


class Clock(SimulatedClock):
    """Time passes only by sleeping; two threads may sleep at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeps: list[float] = []
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        with self._lock:
            self.now += seconds
            self.sleeps.append(seconds)


def throttled(rate: float, clock: Clock) -> ThrottledStorage:
    return ThrottledStorage(MemoryStorage({Path("a"): DATA}), rate, clock, clock.sleep)


@given(st.floats(20.0, 1e9), st.lists(st.integers(0, 30_000), max_size=6))
def test_reads_take_as_long_as_at_that_rate(rate: float, sizes: list[int]) -> None:
    clock = Clock()
    storage = throttled(rate, clock)
    if rate < 1e4:  # one byte at a time
        sizes = [size // 100 for size in sizes]
    for size in sizes:
        assert read(storage, Path("a"), 3, size) == DATA[3 : 3 + size]
    expected = sum(sizes) / rate
    assert clock.now <= expected + 1e-6
    assert clock.now >= expected - 0.02 - 1e-6  # the bucket was full


def test_pieces_are_short_so_that_the_rate_is_even_and_a_pause_is_not_saved_up() -> None:
    clock = Clock()
    storage = throttled(1e6, clock)
    read(storage, Path("a"), 0, 100_000)
    assert clock.sleeps == pytest.approx([0.02] * 5)
    clock.now = before = 1000.0
    read(storage, Path("a"), 0, 50_000)
    assert clock.now - before == pytest.approx(0.05 - 0.02)


def test_threads_at_the_same_time_are_never_faster_than_the_rate() -> None:
    clock = Clock()
    storage = throttled(1e6, clock)
    threads = [threading.Thread(target=read, args=(storage, Path("a"), 0, 80_000)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.now >= 0.24 - 0.02 - 1e-6


def test_checking_and_closing_reach_the_files() -> None:
    inner = MemoryStorage({})
    storage = ThrottledStorage(inner, 1e6)
    storage.check()
    storage.close()
    assert (inner.checks, inner.closed) == (1, True)
