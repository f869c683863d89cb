"""Stand-ins for a streamed target: one that does its background work at made-up times, and a real one on a
simulated clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmcad_mlx.models.adapt import Adaptation, adapt
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.streaming.modules import SequentialFeed, StreamedLayer, StreamedUnit
from llmcad_mlx.tree.token_tree import TokenTree
from llmcad_mlx.verifying import Target, Verification
from tests.support.simulated_stream import SimulatedClock, SimulatedStream
from tests.support.tiny import VOCAB, tiny_tree_model


class WaitingTarget(Target):
    """Before each pass it calls `background` up to `most` times; how often is drawn from `seed`."""

    def __init__(self, model: TreeModel, vocab_size: int, most: int = 12, seed: int | None = None) -> None:
        """seed: None for `most` calls every time."""
        super().__init__(model, vocab_size)
        self.most = most
        self.random = None if seed is None else np.random.default_rng(seed)
        self.steps = 0

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
            self.steps += 1


class TakesTime(Adaptation):
    """A module whose calls take `_row_s` on the clock for each row."""

    _clock: SimulatedClock
    _row_s: float

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self._clock.now += self._row_s * x.shape[-2]
        return super().__call__(x, *args, **kwargs)


def simulated_target(
    clock: SimulatedClock,
    *,
    layers: int = 4,
    num_buffers: int = 3,
    read_s: float = 10.0,
    row_s: float = 0.1,
    prefill_chunk: int = 16,
) -> Target:
    """A tiny model in memory whose layers and head wait for a simulated stream as streamed ones do.

    A unit takes `read_s` to read, and `row_s` for each row to compute with.
    """
    model = tiny_tree_model(0, cpu_kernels=False, layers=layers)
    stream = SimulatedStream([1000] * (layers + 1), num_buffers, 1000 / read_s, clock)
    feed = SequentialFeed(stream, layers + 1, clock)
    inner: Any = model.model
    for number, module in enumerate([*inner.layers, inner.lm_head]):
        adapt(module, TakesTime, _clock=clock, _row_s=row_s)
        adapt(module, StreamedLayer, _unit=StreamedUnit(number, (), (), feed, {}))
    return Target(model, VOCAB, feed, prefill_chunk)
