"""A stream whose reads take made-up seconds: the order of reading is the real one, only the clock is not. And
stand-ins for a streamed target: one that waits for such a stream, one that does background work as it likes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmcad_mlx.models.adapt import Adaptation, adapt
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.streaming.modules import SequentialFeed, StreamedLayer, StreamedUnit
from llmcad_mlx.streaming.stream import Outlook, Piece, ReadAhead
from llmcad_mlx.tree.token_tree import TokenTree
from llmcad_mlx.verifying import Target, Verification
from tests.support.tiny import VOCAB, tiny_tree_model


class SimulatedClock:
    """Stands still but for what is charged to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True)
class BusyInterval:
    """The reader read `unit` from `start` to `end`; not to its end if it was `dropped`."""

    unit: int
    start: float
    end: float
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """`unit` was waited for from `asked` on and had at `had`; it had been read at `arrived`."""

    unit: int
    asked: float
    arrived: float
    had: float


class SimulatedStream:
    """A `WeightStream` with one reader and units of one piece. A unit takes `bytes / bytes_per_s` seconds, while
    the clock goes on for other reasons."""

    def __init__(
        self, unit_bytes: Sequence[int], num_buffers: int, bytes_per_s: float, clock: SimulatedClock
    ) -> None:
        self.unit_bytes, self.bytes_per_s, self.clock = unit_bytes, bytes_per_s, clock
        self.bytes_read = 0
        self.wait_s = 0.0
        self.busy: list[BusyInterval] = []
        self.taken: list[Taken] = []
        self.released: list[float] = []
        """When each buffer was given back."""
        self.contents: dict[int, int] = {}
        """The unit in each buffer that is there or held."""
        self._arrivals: list[float] = []  # of what is there
        self._ahead = ReadAhead([[size] for size in unit_bytes], num_buffers)
        self._piece: Piece | None = None  # on its way
        self._started = 0.0
        self._begin(0.0)

    def _begin(self, at: float) -> None:
        self._started = at
        self._piece = self._ahead.begin()

    def _seconds(self, piece: Piece) -> float:
        return self.unit_bytes[piece.reading.unit] / self.bytes_per_s

    def _arrive(self, piece: Piece) -> None:
        reading = piece.reading
        end = self._started + self._seconds(piece)
        self.busy.append(BusyInterval(reading.unit, self._started, end))
        self.bytes_read += self.unit_bytes[reading.unit]
        self._arrivals.append(end)
        self.contents[reading.buffer] = reading.unit
        assert self._ahead.landed(piece)
        self._ahead.arrived(reading)
        self._begin(end)

    def _catch_up(self) -> None:
        """Do what the reader has done by now."""
        while (piece := self._piece) and self._started + self._seconds(piece) <= self.clock.now:
            self._arrive(piece)

    @property
    def next_unit(self) -> int:
        return self._ahead.next_unit

    def ready(self) -> bool:
        self._catch_up()
        return self._ahead.is_ready

    def outlook(self) -> Outlook:
        self._catch_up()
        arrived = (self.clock.now - self._started) * self.bytes_per_s if self._piece else 0.0
        return self._ahead.outlook(self.bytes_per_s, arrived)

    def wait(self) -> int:
        self._catch_up()
        asked = self.clock.now
        if not self._ahead.is_ready:
            piece = self._piece
            assert piece is not None, "all buffers are held: this would wait for ever"
            self.clock.now = max(self._started + self._seconds(piece), asked)
            self._catch_up()
            self.wait_s += self.clock.now - asked
        buffer = self._ahead.take()
        self.taken.append(Taken(self.contents[buffer], asked, self._arrivals.pop(0), self.clock.now))
        return buffer

    def release(self) -> None:
        self._catch_up()
        self._ahead.release()
        self.released.append(self.clock.now)
        if self._piece is None:
            self._begin(self.clock.now)

    def restart(self) -> None:
        self._catch_up()
        self._ahead.restart()
        there = sum(reading.is_there for reading in self._ahead.coming)
        self._arrivals = self._arrivals[len(self._arrivals) - there :]
        if self._piece is not None and self._piece.reading.is_dropped:
            unit = self._piece.reading.unit
            self.busy.append(BusyInterval(unit, self._started, self.clock.now, dropped=True))
            self.bytes_read += int((self.clock.now - self._started) * self.bytes_per_s)
            self._ahead.landed(self._piece)
            self._piece = None
        if self._piece is None:
            self._begin(self.clock.now)

    def close(self) -> None:
        """Nothing reads."""


class WaitingTarget(Target):
    """Before each pass it calls `background` up to `most` times; how often is drawn from `seed`."""

    def __init__(self, model: TreeModel, vocab_size: int, most: int = 12, seed: int | None = None) -> None:
        """seed: None for `most` calls every time."""
        super().__init__(model, vocab_size)
        self.most = most
        self.random = None if seed is None else np.random.default_rng(seed)

    def prefill(
        self,
        tokens: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
        background: Callable[[float], bool] | None = None,
    ) -> None:
        self._wait(background)
        super().prefill(tokens, on_progress)

    def verify(self, tree: TokenTree, background: Callable[[float], bool] | None = None) -> Verification:
        size = len(tree)
        self._wait(background)
        assert len(tree) == size, "the submitted tree grew"
        return super().verify(tree)

    def _wait(self, background: Callable[[float], bool] | None) -> None:
        calls = self.most if self.random is None else int(self.random.integers(0, self.most + 1))
        for _ in range(calls):
            if background is None or not background(float("inf")):
                return


class TakesTime(Adaptation):
    """A module whose calls take `_row_s` on the clock for each row."""

    _clock: SimulatedClock
    _row_s: float

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self._clock.now += self._row_s * x.shape[-2]
        return super().__call__(x, *args, **kwargs)


def simulated_target(
    clock: SimulatedClock, *, num_buffers: int = 3, read_s: float = 10.0, row_s: float = 0.1
) -> Target:
    """A tiny model in memory whose four layers and head wait for a simulated stream as streamed ones do.

    A unit takes `read_s` to read, and `row_s` for each row to compute with.
    """
    model = tiny_tree_model(0, cpu_kernels=False, layers=4)
    stream = SimulatedStream([1000] * 5, num_buffers, 1000 / read_s, clock)
    feed = SequentialFeed(stream, 5, clock)
    inner: Any = model.model
    for number, module in enumerate([*inner.layers, inner.lm_head]):
        adapt(module, TakesTime, _clock=clock, _row_s=row_s)
        adapt(module, StreamedLayer, _unit=StreamedUnit(number, (), (), feed, {}))
    return Target(model, VOCAB, feed, prefill_chunk=16)
