"""A stand-in for a streamed target: a resident one that does its background work at made-up times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.target.resident import ResidentTarget
from llmcad_mlx.target.target import Verification
from llmcad_mlx.tree.token_tree import TokenTree


class WaitingTarget(ResidentTarget):
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
        on_progress: Callable[[int], None],
        should_stop: Callable[[], bool],
        background: Callable[[float], bool] | None = None,
    ) -> None:
        self._wait(background)
        super().prefill(tokens, on_progress, should_stop)

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
