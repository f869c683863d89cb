"""Storages: what is read and how, what is noticed, and how fast an emulated disk is."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
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
from llmcad_mlx.files import MAX_IO_BYTES
from llmcad_mlx.files.safetensors import read_json, read_tensors
from llmcad_mlx.gguf.reader import read_gguf_header
from llmcad_mlx.streaming.storage import BLOCK_BYTES, FileStorage, ThrottledStorage, address_of
from tests.support.faults import MemoryStorage
from tests.support.simulated_stream import SimulatedClock

DATA = bytes((7 * i + i // 256) % 256 for i in range(100_000))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def storage(request: pytest.FixtureRequest) -> Iterator[FileStorage]:
    opened = FileStorage(direct=request.param)
    yield opened
    opened.close()


def memory_like(offset: int, size: int) -> memoryview:
    """Zeros that lie as a file's bytes at `offset` do, so that they can be read directly."""
    whole = memoryview(bytearray(size + 2 * BLOCK_BYTES))
    start = (offset - address_of(whole)) % BLOCK_BYTES
    return whole[start : start + size]


def read(storage: Any, file: Path, offset: int, size: int) -> bytes:
    out = memory_like(offset, size)
    storage.read_into(file, offset, out)
    return bytes(out)


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "size"), [(0, 100_000), (1, 1), (4095, 4098), (99_999, 1), (50, 0)])
def test_any_bytes_of_a_file(storage: FileStorage, file: Path, offset: int, size: int) -> None:
    assert read(storage, file, offset, size) == DATA[offset : offset + size]


def test_memory_that_lies_otherwise_is_filled_too(storage: FileStorage, file: Path) -> None:
    out = memory_like(1, 80_000)
    storage.read_into(file, 10, out)
    assert bytes(out) == DATA[10:80_010]


def test_what_the_system_reads_in_parts_is_put_together(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage()
    real, calls = os.preadv, []

    def partly(handle: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(handle, [buffers[0][: 1 + len(buffers[0]) // 3]], offset)

    monkeypatch.setattr(os, "preadv", partly)
    assert read(storage, file, 10, 50_000) == DATA[10:50_010]
    assert len(calls) > 10


class Calls:
    """Notes the reads of descriptors; `rule` may refuse one, by descriptor, length, address and offset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rule: Callable[[int, int, int, int], bool]) -> None:
        self.real, self.rule = os.preadv, rule
        self.made: list[tuple[int, int, int]] = []
        """Descriptor, offset and length of each."""
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, handle: int, buffers: list[memoryview], offset: int) -> int:
        (out,) = buffers
        if not self.rule(handle, len(out), address_of(out), offset):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.made.append((handle, offset, len(out)))
        return self.real(handle, buffers, offset)


def test_whole_blocks_are_read_past_the_page_cache_and_the_rest_through_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, lambda *call: True)
    storage = FileStorage(direct=True)
    assert read(storage, file, 100, 70_000) == DATA[100:70_100]
    (first, *head), (middle, *body), (last, *tail) = calls.made
    assert first == last != middle
    assert (head, body, tail) == ([100, 16_284], [16_384, 3 * 16_384], [65_536, 4_564])
    calls.made.clear()
    for offset, size in ((16_384, 16_383), (5, 16_384), (40_000, 700)):  # rows, for instance
        assert read(storage, file, offset, size) == DATA[offset : offset + size]
    out = memory_like(4096, 65_536)
    storage.read_into(file, 0, out)
    assert {handle for handle, *_ in calls.made} == {first}
    storage.direct = False
    calls.made.clear()
    assert read(storage, file, 0, 65_536) == DATA[:65_536]
    assert [handle for handle, *_ in calls.made] == [first]


@pytest.mark.parametrize("refuses", ["open", "preadv"])
def test_file_systems_without_direct_reads_are_read_all_the_same(
    file: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        pytest.skip("no O_DIRECT here")
    real, uncached = os.open, set[int]()

    def opening(path: Path, flags: int) -> int:
        if flags & direct and refuses == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        handle = real(path, flags & ~direct)
        if flags & direct:
            uncached.add(handle)
        return handle

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opening)
        calls = Calls(patch, lambda handle, *call: handle not in uncached)
        storage = FileStorage(direct=True)
        for _ in range(2):
            assert read(storage, file, 7, 90_000) == DATA[7:90_007]
        assert len(calls.made) == 3  # once more is not tried
        storage.close()


def test_on_macos_a_descriptor_of_its_own_goes_past_the_page_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int, int]] = []
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *words: told.append(words))
    calls = Calls(monkeypatch, lambda *call: True)
    storage = FileStorage(direct=True)
    assert read(storage, file, 0, 70_000) == DATA[:70_000]
    (handle, *_), (other, *_) = calls.made
    assert told == [(handle, 48, 1)]  # F_NOCACHE
    assert other != handle


@pytest.mark.parametrize("direct", [False, True])
def test_no_single_read_is_larger_than_macos_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """A file of 2 GiB and a bit, as an embedding in 16 bits has, with a system that refuses above INT_MAX."""
    size = (2 << 30) + 5
    asked: list[tuple[int, int]] = []

    def preadv(handle: int, buffers: list[Any], offset: int) -> int:
        (out,) = buffers
        if len(out) > (1 << 31) - 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        asked.append((offset, len(out)))
        return len(out)

    file = tmp_path / "large.bin"
    file.touch()
    monkeypatch.setattr(os, "preadv", preadv)
    storage = FileStorage(direct)
    with mmap.mmap(-1, size) as memory:  # pages that nobody touches take no memory
        out = memoryview(memory)
        storage.read_into(file, 0, out)
        out.release()
    assert sum(count for _, count in asked) == size
    assert [offset for offset, _ in asked] == [0, *itertools.accumulate(count for _, count in asked[:-1])]
    assert max(count for _, count in asked) == MAX_IO_BYTES
    assert MAX_IO_BYTES % BLOCK_BYTES == 0


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


@pytest.mark.parametrize("direct", [False, True])
def test_files_are_opened_once_and_let_go_of(file: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    opened: list[int] = []
    real = os.open

    def noting(*arguments: Any) -> int:
        opened.append(real(*arguments))
        return opened[-1]

    monkeypatch.setattr(os, "open", noting)
    storage = FileStorage(direct)
    for _ in range(3):
        read(storage, file, 0, 99_000)
    assert len(opened) == 1 + direct
    storage.close()
    for handle in opened:
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
    assert sum(clock.sleeps) == pytest.approx(0.1)
    assert max(clock.sleeps) <= 0.02
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
