"""How weights are read: what is chosen, kept and measured, and how their bytes lie in the buffers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx import load
from llmcad_mlx.errors import StorageError
from llmcad_mlx.files.safetensors import TensorExtent
from llmcad_mlx.streaming import build, ways
from llmcad_mlx.streaming.storage import BLOCK_BYTES, DEFAULT_WAY, FileStorage, ReadWay, address_of
from llmcad_mlx.streaming.stream import Read, WeightStream
from llmcad_mlx.streaming.ways import WAYS, WayRate, best_way, keep_way, known_way
from llmcad_mlx.streaming.weights import Matrix, StoredParameter, StreamParts
from tests.support.faults import MemoryStorage
from tests.support.tiny_folder import make_folder, write_bundle

pytestmark = pytest.mark.usefixtures("own_home")
MB = 10**6


def rate(way: ReadWay, beside: float) -> WayRate:
    return WayRate(way, 9e9, beside, 1, True)


# -- which way ---------------------------------------------------------------------------------------------


def test_what_was_measured_is_kept_for_the_disk(tmp_path: Path, own_home: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    assert known_way(file) == DEFAULT_WAY
    found = rate(ReadWay(False, 4, 4 << 20), 1e9)
    keep_way(file, found)
    assert known_way(file) == found.way
    assert known_way(tmp_path / "gone") == DEFAULT_WAY
    keep_way(tmp_path / "gone", rate(WAYS[0], 1e9))  # another disk
    assert known_way(file) == found.way


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"version": 1}', '{"version": 2, "disks": {"DISK": {"way": {}}}}',
        '{"version": 1, "disks": {"DISK": 5}}', '{"version": 1, "disks": {"DISK": {"way": null}}}',
        '{"version": 1, "disks": {"DISK": {"way": {"direct": true, "num_readers": 0, "piece_bytes": 4194304}}}}',
        '{"version": 1, "disks": {"DISK": {"way": {"direct": true, "num_readers": 1}}}}',
    ],
)  # fmt: skip
def test_a_kept_file_that_is_none_of_ours_is_ignored(tmp_path: Path, own_home: Path, content: str) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    keep_way(file, rate(WAYS[1], 1e9))
    (kept,) = own_home.glob("*.json")
    kept.write_text(content.replace("DISK", str(file.stat().st_dev)))
    assert known_way(file) == DEFAULT_WAY
    keep_way(file, rate(WAYS[1], 1e9))
    assert known_way(file) == WAYS[1]
    assert json.loads(kept.read_text())["version"] == 1


def test_of_ways_as_fast_the_one_that_spares_most_wins() -> None:
    direct, buffered = ReadWay(True, 4, 16 << 20), ReadWay(False, 1, 16 << 20)
    assert best_way([rate(buffered, 1.0e9), rate(direct, 0.95e9)]).way == direct
    assert best_way([rate(buffered, 1.0e9), rate(direct, 0.8e9)]).way == buffered
    few, small = replace(direct, num_readers=1), replace(direct, piece_bytes=4 << 20)
    assert best_way([rate(small, 1e9), rate(direct, 1e9), rate(few, 1e9)]).way == few
    assert best_way([rate(small, 1e9), rate(direct, 1e9)]).way == direct


@pytest.mark.parametrize(
    ("available", "limit", "fits"),
    [(1000, None, True), (900, None, False), (1000, 1050, False), (9000, 1100, True), (9000, 1000, False)],
)
def test_the_page_cache_gets_what_the_plan_leaves(
    monkeypatch: pytest.MonkeyPatch, available: int, limit: int | None, fits: bool
) -> None:
    """300 MB are streamed, which needs 400; the process has 100 of the plan's 700 MB already."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available * MB))
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=100 * MB))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(ways, "_cgroup_limits", lambda: iter(() if limit is None else (limit * MB,)))
    plan: Any = SimpleNamespace(total_bytes=700 * MB, streamed_bytes=300 * MB)
    assert ways.fits_page_cache(plan) is fits


def test_pieces_of_slow_emulated_storage_are_short() -> None:
    assert ways.short_pieces(DEFAULT_WAY, 10e9) == DEFAULT_WAY
    for bytes_per_s in (1.0, 1e6, 100e6):
        piece_bytes = ways.short_pieces(DEFAULT_WAY, bytes_per_s).piece_bytes
        assert piece_bytes % BLOCK_BYTES == 0
        assert BLOCK_BYTES <= piece_bytes <= max(0.05 * bytes_per_s, BLOCK_BYTES)


def test_the_interpreters_lock_changes_hands_sooner_while_a_stream_is_open() -> None:
    def stream() -> WeightStream:
        reads = (Read(Path("a"), 0, 4, 0),)
        unit = ways.Unit("unit", reads)
        return WeightStream([unit], [memoryview(bytearray(4))], MemoryStorage({Path("a"): b"abcd"}), DEFAULT_WAY)

    before = sys.getswitchinterval()
    assert before > 5e-4
    first, second = stream(), stream()
    for one in (first, first, second):
        assert sys.getswitchinterval() == 5e-4
        one.close()
    assert sys.getswitchinterval() == before


# -- measuring ---------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(40 * BLOCK_BYTES + 100))
    return path


def reads_of_file(file: Path) -> list[Read]:
    weights = {
        "a": TensorExtent("a", file, 200, 10, "U8", (10,)),
        "b": TensorExtent("b", file, 300, 40 * BLOCK_BYTES, "U8", ()),
    }
    (read,) = ways.reads_of(weights)
    assert (read.offset, read.num_bytes) == (200, 40 * BLOCK_BYTES + 100)
    return [read]


def test_every_way_is_measured_alone_and_beside_python(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_REGION_BYTES", 8 * BLOCK_BYTES)
    turns: list[int] = []
    chosen = WAYS[::5]
    rates = ways.measure_ways(reads_of_file(file), 0.05, chosen, turns.append)
    assert [one.way for one in rates] == list(chosen)
    assert sum(turns) == ways.num_turns(chosen)
    for one in rates:
        assert min(one.bytes_per_s, one.beside_python_bytes_per_s) > 0
        assert one.sampled_bytes >= 6 * 8 * BLOCK_BYTES
    keep_way(file, best_way(rates))
    assert known_way(file) in chosen


@pytest.mark.skipif(sys.platform != "linux", reason="lets go of cached pages on demand")
def test_what_the_page_cache_holds_is_known_and_not_measured(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Read(file, 0, 40 * BLOCK_BYTES, 0)
    with file.open("rb") as stream:
        stream.read()
        assert ways.cached_share(whole) == 1.0
    rate = ways.measure_read_rate([whole])
    assert rate.sampled_bytes == whole.num_bytes
    monkeypatch.setattr(ways, "_forget", lambda unit: None)  # as on macOS
    monkeypatch.setattr(ways, "_REGION_BYTES", 8 * BLOCK_BYTES)
    cached = [0.0, 1.0, 1.0, 0.0, 1.0]
    monkeypatch.setattr(ways, "cached_share", lambda read: cached[read.offset // (8 * BLOCK_BYTES)])
    rate = ways.measure_read_rate([whole])
    assert (rate.sampled_bytes, rate.from_disk) == (2 * 8 * BLOCK_BYTES, True)
    cached[:] = [1.0] * 5
    rate = ways.measure_read_rate([whole])
    assert (rate.sampled_bytes, rate.from_disk) == (5 * 8 * BLOCK_BYTES, False)


def test_where_the_system_does_not_tell_it_may_have_come_from_the_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise AttributeError("mincore")

    monkeypatch.setattr(ways, "cached_share", fail)
    assert ways.measure_read_rate(reads_of_file(file)).from_disk is False


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone: cannot be read"):
        ways.measure_read_rate([Read(tmp_path / "gone", 0, BLOCK_BYTES, 0)])


# -- where bytes lie ---------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([1, 64, 4096, 16384]), st.integers(0, 100_000)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([0, 1, 13, 64]),
    st.integers(0, 100),
)
def test_each_tensor_lies_in_the_buffer_where_its_reads_bring_it(
    tensors: list[tuple[int, int, int]], shift: int, tail: int
) -> None:
    """Whatever lies between tensors: in few reads, inside the file, in whole blocks where they can be direct."""
    file, module = Path("a"), SimpleNamespace()
    parameters, end = [], shift
    for number, (rows, alignment, gap) in enumerate(tensors):
        offset = -(-(end + gap) // alignment) * alignment
        extent = TensorExtent(str(number), file, offset, rows * 640, "U8", (rows, 640))
        parameters.append(StoredParameter(module, str(number), extent, mx.uint8, mx.uint8))
        end = offset + rows * 640
    content = np.random.default_rng(0).bytes(end + tail)
    parts = StreamParts((), (tuple(parameters),), (), None, (), {file: end})
    (unit,) = parts.units([0], 0)
    buffer = memoryview(bytearray(max(read.buffer_offset + read.num_bytes for read in unit.reads)))
    storage = MemoryStorage({file: content})
    for read in unit.reads:
        assert read.offset + read.num_bytes <= end
        storage.read_into(file, read.offset, buffer[read.buffer_offset :][: read.num_bytes])
    for place in unit.places:
        extent = place.parameter.extent
        assert place.offset % 64 == 0
        assert bytes(buffer[place.offset :][: place.num_bytes]) == content[extent.offset :][: extent.num_bytes]
    for read in unit.reads:
        if read.offset % BLOCK_BYTES == 0:
            assert read.buffer_offset % BLOCK_BYTES == 0
            assert read.num_bytes % BLOCK_BYTES == 0 or read.offset + read.num_bytes == end
    assert len(unit.reads) <= len(tensors)


def test_pieces_of_a_head_are_whole_blocks_with_their_rows_inside() -> None:
    file, module = Path("a"), SimpleNamespace()
    content = np.random.default_rng(0).bytes(16384 + 1000 * (96 + 12))
    extents = [
        TensorExtent("weight", file, 16384, 96_000, "U8", (1000, 96)),
        TensorExtent("scales", file, 16384 + 96_000, 12_000, "U8", (1000, 12)),
    ]
    parameters = tuple(StoredParameter(module, one.name, one, mx.uint8, mx.uint8) for one in extents)
    head = Matrix(module, parameters)
    units = StreamParts((), (), (), head, (), {file: len(content)}).units([], 3)
    assert len(units) == 3
    first = 0
    for unit in units:
        buffer = memoryview(bytearray(max(read.buffer_offset + read.num_bytes for read in unit.reads)))
        for read in unit.reads:
            assert read.offset % BLOCK_BYTES == read.buffer_offset % BLOCK_BYTES == 0
            buffer[read.buffer_offset :][: read.num_bytes] = content[read.offset :][: read.num_bytes]
        for place, extent in zip(unit.places, extents, strict=True):
            row_bytes = extent.shape[1]
            expected = content[extent.offset + first * row_bytes :][: place.num_bytes]
            assert bytes(buffer[place.offset :][: place.num_bytes]) == expected
        first += unit.places[0].shape[0]
    assert first == 1000


def test_a_layer_of_a_bundle_is_one_read(tmp_path: Path, streams_small_matrices: None) -> None:
    write_bundle(make_folder(tmp_path / "stock"), tmp_path / "bundle")
    with load(tmp_path / "bundle", None, pinned=0) as engine:
        feed: Any = engine.pair.target.feed
        layers = [unit for unit in feed.stream._units if unit.name.startswith("layer")]
        assert layers
        assert all(len(unit.reads) == 1 for unit in layers)
        for memory in feed.stream._buffers:
            assert address_of(memory) % BLOCK_BYTES == 0


@pytest.mark.parametrize("bundle", [False, True])
@pytest.mark.parametrize("way", [ReadWay(True, 3, BLOCK_BYTES), ReadWay(False, 3, BLOCK_BYTES)])
def test_every_way_gives_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams_small_matrices: None, bundle: bool, way: ReadWay
) -> None:
    folder = make_folder(tmp_path / "stock", layers=5)
    if bundle:
        write_bundle(folder, tmp_path / "bundle")
        folder = tmp_path / "bundle"
    with load(folder, None) as engine:
        expected = engine.generate("then the other one ran", max_tokens=16).tokens
    monkeypatch.setattr(build, "known_way", lambda file: way)
    monkeypatch.setattr(build, "fits_page_cache", lambda plan: False)
    asked: list[bool] = []
    fill_directly = FileStorage._fill_directly

    def noting(*args: Any) -> bool:
        asked.append(True)
        return fill_directly(*args)

    monkeypatch.setattr(FileStorage, "_fill_directly", noting)
    with load(folder, None, pinned=0, verify=bundle) as engine:
        assert engine.generate("then the other one ran", max_tokens=16).tokens == expected
    assert bool(asked) is (way.direct and bundle)  # the folder's tensors lie at odd places
