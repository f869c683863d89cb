"""Streams and feeds: the right unit at the right time, whatever is done to them at whatever moment."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx.errors import ModelError, StorageError
from llmcad_mlx.files.safetensors import read_tensors
from llmcad_mlx.streaming.modules import OnDemandFeed, RowReader, SequentialFeed
from llmcad_mlx.streaming.storage import BLOCK_BYTES, ReadWay, Storage
from llmcad_mlx.streaming.stream import Outlook, Piece, Read, ReadAhead, Unit, WeightStream
from llmcad_mlx.streaming.weights import Matrix, StoredParameter
from tests.support.faults import Interrupting, MemoryStorage, SlowRead, read_error, wrong_bytes
from tests.support.simulated_stream import SimulatedClock, SimulatedStream

A, B = Path("a.bin"), Path("b.bin")
SIZE = 64
NUM_UNITS = 5
HALF = SIZE // 2
GAP = 8
FILES = {file: np.random.default_rng(seed).bytes(NUM_UNITS * HALF) for seed, file in enumerate((A, B))}


def unit_of(number: int) -> Unit:
    """Half of it in one file, half in the other, with a gap between them in the buffer."""
    first, second = Read(A, number * HALF, HALF, 0), Read(B, number * HALF, HALF, HALF + GAP)
    checksum = hashlib.sha256(b"".join(FILES[read.file][read.offset :][:HALF] for read in (first, second)))
    return Unit(f"layer {number}", (first, second), checksum.hexdigest())


UNITS = [unit_of(number) for number in range(NUM_UNITS)]


def holds(buffer: memoryview, unit: int) -> bool:
    """Whether the whole unit is in the buffer."""
    return all(
        bytes(buffer[read.buffer_offset :][: read.num_bytes]) == FILES[read.file][read.offset :][: read.num_bytes]
        for read in UNITS[unit].reads
    )


class Streamed:
    """A threaded stream and its buffers; `have` checks what `wait` gives."""

    def __init__(
        self,
        storage: Storage | None = None,
        num_units: int = NUM_UNITS,
        num_buffers: int = 3,
        checked: bool = True,
        num_readers: int = 1,
        piece_bytes: int = SIZE,
        **options: Any,
    ) -> None:
        """piece_bytes: HALF makes a piece of each of a unit's reads."""
        self.buffers = [memoryview(bytearray(SIZE + GAP)) for _ in range(num_buffers)]
        units = [unit if checked else replace(unit, sha256=None) for unit in UNITS[:num_units]]
        way = ReadWay(direct=False, num_readers=num_readers, piece_bytes=piece_bytes)
        self.stream = WeightStream(units, self.buffers, storage or MemoryStorage(FILES), way, **options)

    def have(self, unit: int) -> None:
        assert holds(self.buffers[self.stream.wait()], unit)

    def units(self, count: int) -> None:
        """Have and release so many units from the first on, pass after pass."""
        for unit in itertools.islice(itertools.cycle(range(len(self.stream._units))), count):
            self.have(unit)
            self.stream.release()

    def passes(self, count: int) -> None:
        self.units(count * len(self.stream._units))

    def feed(self, feed: SequentialFeed, count: int = NUM_UNITS) -> None:
        """A pass of so many units through a feed."""
        for unit in range(count):
            assert holds(self.buffers[feed.take(unit)], unit)
            feed.give_back()


@contextlib.contextmanager
def streamed(storage: Storage | None = None, **options: Any) -> Iterator[Streamed]:
    made = Streamed(storage, **options)
    try:
        yield made
    finally:
        made.stream.close()
        assert not any(thread.is_alive() for thread in made.stream._threads)


# -- the order of reading ----------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=6),
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from("bbblllftrs"), st.integers(0, 9)), max_size=120),
)
def test_read_ahead_gives_the_next_unit_and_touches_nothing_in_use(
    num_pieces: list[int], num_buffers: int, actions: list[tuple[str, int]]
) -> None:
    """Begin, land, fail, take, release, start over: in any order that is possible, many pieces at a time."""
    ahead = ReadAhead([[1] * count for count in num_pieces], num_buffers)
    contents: dict[int, list[tuple[int, int]]] = {buffer: [] for buffer in range(num_buffers)}
    on_way: list[Piece] = []
    held: list[tuple[int, int]] = []  # buffer and unit, oldest first
    next_unit = 0

    def holds_whole(buffer: int, unit: int) -> bool:
        return sorted(contents[buffer]) == [(unit, number) for number in range(num_pieces[unit])]

    for action, choice in actions:
        if action == "b":
            piece = ahead.begin()
            if piece is None:
                in_use = {reading.buffer for reading in ahead.coming} | {buffer for buffer, _ in held}
                in_use |= {piece.reading.buffer for piece in on_way}
                assert len(in_use) == num_buffers  # the only reason not to read
                continue
            buffer = piece.reading.buffer
            assert buffer not in [other for other, _ in held]
            assert all(other.reading is piece.reading for other in on_way if other.reading.buffer == buffer)
            if piece.number == 0:
                contents[buffer] = []
            on_way.append(piece)
        elif action in "lf" and on_way:
            piece = on_way.pop(choice % len(on_way))
            reading = piece.reading
            contents[reading.buffer].append((reading.unit, piece.number))
            is_whole = ahead.landed(piece)
            if action == "f":
                dropped = reading.is_dropped
                assert ahead.failed(reading) is not dropped
                again = None if dropped else ahead.begin()
                assert again is None or (again.reading.unit, again.number) == (reading.unit, 0)
                if again is not None:
                    contents[again.reading.buffer] = []
                    on_way.append(again)
            elif is_whole:
                ahead.arrived(reading)
        elif action == "t" and ahead.is_ready:
            buffer = ahead.take()
            assert holds_whole(buffer, next_unit)
            held.append((buffer, next_unit))
            next_unit = (next_unit + 1) % len(num_pieces)
            assert ahead.next_unit == next_unit
        elif action == "r":
            ahead.release()
            held = held[1:]
        elif action == "s":
            ahead.restart()
            held, next_unit = [], 0
        assert all(holds_whole(buffer, unit) for buffer, unit in held)


def test_the_next_unit_begins_with_the_last_piece_on_its_way() -> None:
    ahead = ReadAhead([[5, 5], [5, 5]], 2)
    pieces = [ahead.begin() for _ in range(4)]
    assert [(piece.reading.unit, piece.number) for piece in pieces if piece] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert ahead.begin() is None
    first, second, third, fourth = (piece for piece in pieces if piece is not None)
    assert (ahead.landed(third), ahead.landed(fourth)) == (False, True)
    ahead.arrived(third.reading)
    assert not ahead.is_ready  # units are taken in order
    assert ahead.outlook(10.0, 0) == Outlook(1.0, 1.0, 1.0)
    assert (ahead.landed(second), ahead.landed(first)) == (False, True)
    ahead.arrived(first.reading)
    assert (ahead.take(), ahead.take()) == (first.reading.buffer, third.reading.buffer)


def begun(ahead: ReadAhead) -> Piece:
    piece = ahead.begin()
    assert piece is not None
    return piece


def test_outlooks_on_paper() -> None:
    """Units of 10, 20, 40 bytes at 10 bytes a second, three buffers."""
    ahead = ReadAhead([[10], [20], [40]], 3)

    def arrive(piece: Piece) -> None:
        assert ahead.landed(piece)
        ahead.arrived(piece.reading)

    assert ahead.outlook(10.0, 0) == Outlook(1.0, 7.0, 7.0)
    piece = begun(ahead)
    assert ahead.outlook(10.0, 4) == Outlook(0.6, 6.6, 6.6)
    arrive(piece)
    piece = begun(ahead)
    assert ahead.outlook(10.0, 0) == Outlook(0.0, 6.0, 6.0)
    ahead.take()  # its buffer is not free
    assert ahead.outlook(10.0, 10) == Outlook(1.0, 5.0, 5.0)
    ahead.release()
    assert ahead.outlook(10.0, 10) == Outlook(1.0, 6.0, 5.0)
    for _ in range(2):
        arrive(piece)
        piece = begun(ahead)
    # All of the pass is read, and the first of the next one begun.
    assert ahead.outlook(10.0, 0) == Outlook(0.0, 1.0, 0.0)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=6), st.integers(1, 8))
def test_pieces_are_the_unit_in_order_and_begin_at_blocks(sizes: list[int], blocks: int) -> None:
    most, starts = blocks * BLOCK_BYTES, [0, *itertools.accumulate(sizes)]
    reads = [Read(A, 7 * start, size, start) for start, size in zip(starts, sizes, strict=False)]
    pieces = Unit("unit", tuple(reads)).pieces(most)
    assert all(0 < sum(part.num_bytes for part in piece) <= most for piece in pieces)
    parts = [part for piece in pieces for part in piece]
    for part, after in itertools.pairwise(parts):
        assert part.buffer_offset + part.num_bytes == after.buffer_offset
    for part in parts:
        (read,) = (r for r in reads if r.buffer_offset <= part.buffer_offset < r.buffer_offset + r.num_bytes)
        assert part.offset - read.offset == part.buffer_offset - read.buffer_offset
        assert (part.offset - read.offset) % BLOCK_BYTES == 0
    assert sum(part.num_bytes for part in parts) == sum(sizes)


# -- the threads that read ---------------------------------------------------------------------------------


READERS = [{}, {"num_readers": 3, "piece_bytes": HALF}]


@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("num_buffers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_units", [1, 2, 5])
def test_units_come_in_cyclic_order_with_their_bytes(num_units: int, num_buffers: int, readers: Any) -> None:
    storage = MemoryStorage(FILES)
    with streamed(storage, num_units=num_units, num_buffers=num_buffers, **readers) as made:
        made.passes(4)
        read_ahead = made.stream.bytes_read - 4 * num_units * SIZE
    assert 0 <= read_ahead <= num_buffers * SIZE
    assert 4 <= storage.checks <= 5 + num_buffers // num_units  # once a pass


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, NUM_UNITS),
    st.integers(1, 4),
    st.lists(st.sampled_from(["take", "release", "restart"]), max_size=60),
    st.sampled_from(READERS),
)
def test_any_interleaving_of_waiting_releasing_and_restarting(
    num_units: int, num_buffers: int, actions: list[str], readers: Any
) -> None:
    """What was given out stays as it is until it is released, though other threads go on reading."""
    with streamed(num_units=num_units, num_buffers=num_buffers, **readers) as made:
        next_unit, held = 0, []
        for action in actions:
            if action == "take" and len(held) < num_buffers:
                buffer = made.stream.wait()
                held.append((buffer, next_unit))
                next_unit = (next_unit + 1) % num_units
            elif action == "release":
                made.stream.release()
                held = held[1:]
            elif action == "restart":
                made.stream.restart()
                next_unit, held = 0, []
            assert all(holds(made.buffers[buffer], unit) for buffer, unit in held)


@pytest.mark.parametrize("number", [1, 2, 5, 10, 11, 17])
def test_an_error_is_told_in_its_turn_and_a_restart_recovers(number: int) -> None:
    storage = MemoryStorage(FILES, {number: read_error})
    with streamed(storage) as made:
        broken = (number - 1) // 2  # two reads a unit
        made.units(broken)  # what was read before serves
        for _ in range(2):  # it stays until somebody starts again
            with pytest.raises(StorageError, match=r"[ab]\.bin"):
                made.stream.wait()
        assert made.stream.ready()
        assert made.stream.outlook() == Outlook(0.0, 0.0, 0.0)
        made.stream.restart()
        made.passes(3)


@pytest.mark.parametrize("number", range(1, 22, 3))
def test_an_error_of_one_of_several_readers_is_told_in_its_turn(number: int) -> None:
    """Whole units before it serve, what others have begun after it does not come before it is tried again."""
    storage = MemoryStorage(FILES, {number: read_error})
    with streamed(storage, num_readers=3, piece_bytes=HALF) as made:
        served = 0
        with pytest.raises(StorageError, match=r"[ab]\.bin"):  # noqa: PT012
            for unit in itertools.cycle(range(NUM_UNITS)):
                made.have(unit)
                made.stream.release()
                served += 1
        assert (number - 1) // 2 - 3 <= served <= (number - 1) // 2 + 1
        made.stream.restart()
        made.passes(3)


def test_a_reader_goes_on_while_another_one_waits() -> None:
    slow = SlowRead()
    with streamed(MemoryStorage(FILES, {1: slow}), num_readers=2, piece_bytes=HALF) as made:
        assert slow.begun.wait(30)
        while made.stream.bytes_read < 5 * HALF:  # the rest of three buffers
            time.sleep(0.001)
        assert not made.stream.ready()
        slow.go.set()
        made.passes(2)


def test_a_buffer_is_not_used_again_while_a_dropped_piece_is_on_its_way() -> None:
    slow = SlowRead()
    storage = MemoryStorage(FILES, {5: slow})  # of unit 2, in the last of three buffers
    with streamed(storage, num_readers=2, piece_bytes=HALF, checked=False) as made:
        assert slow.begun.wait(30)
        made.have(0)
        made.stream.restart()
        made.units(9)  # in the other two
        buffer = made.stream.wait()
        slow.go.set()
        assert holds(made.buffers[buffer], 4)


def test_changed_files_are_noticed_at_the_start_of_a_pass() -> None:
    class Changing(MemoryStorage):
        def check(self) -> None:
            super().check()
            if self.checks == 2:
                raise StorageError("a.bin: was changed")

    with streamed(Changing(FILES), num_buffers=2) as made:
        made.passes(1)
        with pytest.raises(StorageError, match="was changed"):
            made.stream.wait()


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("number", [1, 6, 13])
def test_wrong_bytes_are_noticed_where_they_are_checked(checked: bool, number: int) -> None:
    storage = MemoryStorage(FILES, {number: wrong_bytes})
    with streamed(storage, checked=checked) as made:
        broken = (number - 1) // 2
        made.units(broken)
        if checked:
            name = f"layer {broken % NUM_UNITS}"
            with pytest.raises(StorageError, match=f"{A}: the bytes of {name} are not what they were; fetch"):
                made.stream.wait()
            made.stream.restart()
            made.passes(2)
        else:
            assert not holds(made.buffers[made.stream.wait()], broken % NUM_UNITS)


def test_a_restart_in_the_middle_of_a_read() -> None:
    slow = SlowRead()
    with streamed(MemoryStorage(FILES, {6: slow})) as made:
        made.have(0)
        made.have(1)
        assert slow.begun.wait(30)  # the second half of unit 2
        assert not made.stream.ready()
        made.stream.restart()
        slow.go.set()
        made.passes(2)


def test_a_pass_that_ends_early_keeps_what_was_read_for_the_next() -> None:
    slow = SlowRead()
    with streamed(MemoryStorage(FILES, {4 * 2 + 4 * 2: slow}), num_buffers=4) as made:
        made.units(4)
        assert slow.begun.wait(30)  # units 4, 0, 1 are there, 2 is being read
        before = made.stream.bytes_read
        made.stream.restart()
        made.have(0)
        made.have(1)
        assert made.stream.bytes_read == before
        slow.go.set()
        made.have(2)


def test_closing_in_the_middle_of_a_read_wakes_who_waits() -> None:
    slow, raised = SlowRead(), []
    made = Streamed(MemoryStorage(FILES, {1: slow}))
    assert slow.begun.wait(30)

    def wait() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            made.stream.wait()
        raised.append(True)

    waiting, closing = threading.Thread(target=wait), threading.Thread(target=made.stream.close)
    waiting.start()
    closing.start()
    waiting.join(30)  # although the read goes on
    assert raised == [True]
    slow.go.set()
    closing.join(30)
    assert not closing.is_alive()
    assert not any(thread.is_alive() for thread in made.stream._threads)
    assert made.stream.ready()
    wait()
    made.stream.close()  # again does nothing


def test_only_waiting_that_waits_is_counted() -> None:
    slow, ticks = SlowRead(), itertools.count()

    def clock() -> float:
        if threading.current_thread() is threading.main_thread():  # `wait` is about to block
            slow.go.set()
        return float(next(ticks))

    with streamed(MemoryStorage(FILES, {3: slow}), clock=clock) as made:
        assert slow.begun.wait(30)
        made.have(0)
        assert made.stream.wait_s == 0.0  # it was there
        assert not slow.go.is_set()
        made.have(1)
        assert made.stream.wait_s > 0.0


# -- feeds -------------------------------------------------------------------------------------------------


def simulated(num_units: int = 4, num_buffers: int = 2) -> tuple[SequentialFeed, SimulatedStream]:
    clock = SimulatedClock()
    stream = SimulatedStream([10] * num_units, num_buffers, 10.0, clock)
    return SequentialFeed(stream, num_units, clock), stream


def one_pass(feed: SequentialFeed, stream: SimulatedStream, num_units: int = 4) -> None:
    for unit in range(num_units):
        assert stream.contents[feed.take(unit)] == unit
        stream.clock.now += 0.3
        feed.give_back()


@pytest.mark.parametrize("order", [[1], [0, 2], [0, 1, 1], [0, 1, 2, 3, 1]])
def test_a_layer_out_of_order_is_refused(order: Sequence[int]) -> None:
    feed, stream = simulated()
    for unit in order[:-1]:
        feed.take(unit)
        feed.give_back()
    with pytest.raises(ModelError, match=f"another order .*unit {order[-1]} where .*give it memory"):
        feed.take(order[-1])
    one_pass(feed, stream)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_pass_may_end_early(length: int) -> None:
    feed, stream = simulated()
    for _ in range(3):
        one_pass(feed, stream, length)
    one_pass(feed, stream)


def test_background_work_is_done_while_a_unit_is_not_there() -> None:
    feed, stream = simulated(num_buffers=3)
    offered: list[float] = []

    def step(seconds: float) -> bool:
        assert not stream.ready()
        offered.append(seconds)
        if len(offered) % 4 == 0:
            return False
        stream.clock.now += 0.25
        return True

    with feed.working(step):
        feed.take(0)
        assert offered == [1.0, 0.75, 0.5, 0.25]  # how long the read takes from now; then there was nothing to do
        assert stream.wait_s == 0.25
        stream.clock.now += 5.0
        feed.give_back()
        feed.take(1)  # it is there
        assert len(offered) == 4
        feed.give_back()
    stream.clock.now += 0.1
    feed.take(0)
    assert len(offered) == 4  # only inside the block


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 90), st.booleans())
def test_an_interruption_anywhere_does_not_misplace_a_layer(
    num_units: int, num_buffers: int, number: int, after: bool
) -> None:
    """A signal may come between any two steps, or an error in the background; the next pass has the right
    weights, and all the buffers."""
    feed, stream = simulated(num_units, num_buffers)
    interrupting, background = Interrupting(number, after), SimpleNamespace(step=lambda seconds: False)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ready", "outlook", "wait", "release", "restart"):
            patch.setattr(stream, name, getattr(stream, name))  # to be put back
            interrupting.around(stream, name)
        patch.setattr(feed, "_clock", feed._clock)
        interrupting.around(feed, "_clock")
        interrupting.around(background, "step")
        with contextlib.suppress(KeyboardInterrupt):
            for _ in range(3):
                with feed.working(background.step):
                    for unit in range(num_units):
                        feed.take(unit)
                        try:
                            stream.clock.now += 0.3
                        finally:
                            feed.give_back()
    for _ in range(3):
        one_pass(feed, stream, num_units)
    taken = [one.unit for one in stream.taken][-3 * num_units :]
    assert taken == [*range(num_units)] * 3


def test_an_error_of_the_stream_ends_the_pass_and_the_next_one_tries_again() -> None:
    storage = MemoryStorage(FILES, {7: read_error})  # read when unit 0 was given back
    with streamed(storage, num_buffers=3) as made:
        feed = SequentialFeed(made.stream, NUM_UNITS)
        made.feed(feed, 3)
        with pytest.raises(StorageError, match="made up"):
            feed.take(3)
        made.feed(feed)


def test_what_failed_before_its_pass_began_is_tried_again() -> None:
    storage = MemoryStorage(FILES, {1: read_error})
    with streamed(storage) as made:
        while not made.stream.ready():  # nothing is there yet but the error
            time.sleep(0.001)
        made.feed(SequentialFeed(made.stream, NUM_UNITS))


def test_on_demand_any_unit_in_any_order() -> None:
    buffer = memoryview(bytearray(SIZE + GAP))
    feed = OnDemandFeed(UNITS, buffer, MemoryStorage(FILES))
    for unit in (3, 0, 0, 4, 2):
        assert feed.take(unit) == 0
        assert holds(buffer, unit)
        feed.give_back()


# -- rows --------------------------------------------------------------------------------------------------


def reader_of(
    tmp_path: Path, module: Any, wanted: mx.Dtype | None, feed: SequentialFeed | None = None, fault: int = 0
) -> RowReader:
    """Of the module's parameters, stored in a file."""
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), dict(module.parameters()))
    stored = [
        StoredParameter(module, each.name, each, module[each.name].dtype, wanted or module[each.name].dtype)
        for each in read_tensors(file)
    ]
    storage = MemoryStorage({file: file.read_bytes()}, {fault: read_error})
    return RowReader(Matrix(module, tuple(stored)), storage, feed)


@pytest.mark.parametrize("indices", [[0], [9, 0, 3], list(range(10))])
def test_rows_are_those_of_a_quantised_matrix(tmp_path: Path, indices: list[int]) -> None:
    module: Any = nn.Embedding(10, 64).to_quantized(32, 4)
    rows = reader_of(tmp_path, module, None).rows(indices)
    assert set(rows) == set(module.parameters())
    for name, array in module.parameters().items():
        assert rows[name].dtype == array.dtype
        assert mx.array_equal(rows[name], array[mx.array(indices)])


def test_rows_are_converted_and_counted(tmp_path: Path) -> None:
    module = nn.Embedding(10, 64)
    module.weight = module.weight.astype(mx.float16)
    feed, _ = simulated()
    rows = reader_of(tmp_path, module, mx.float32, feed).rows([4, 5])
    assert mx.array_equal(rows["weight"], module.weight[4:6].astype(mx.float32))
    assert rows["weight"].dtype == mx.float32
    assert feed.row_bytes == feed.bytes_read == 2 * 64 * 2


def test_a_row_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    module = nn.Embedding(10, 64)
    reader = reader_of(tmp_path, module, mx.float32, fault=2)
    with pytest.raises(StorageError, match=r"model\.safetensors: cannot be read \(made up\)"):
        reader.rows([1, 2, 3])
    assert mx.array_equal(reader.rows([1])["weight"], module.weight[1:2])
