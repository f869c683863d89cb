"""Chooses tokens with the caller's own mlx-lm sampler and logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

from llmcad_mlx.sampling import LogitsProcessor, Row, SamplingSettings, TargetSampler


class CallerSampler(TargetSampler):
    """Calls processors and sampler as mlx-lm's plain generation does: for each token, in order.

    `logprobs` collects what each token was drawn from, (V,), until it is taken; a greedy choice leaves nothing.
    """

    def __init__(
        self,
        sampler: Any,
        processors: Sequence[LogitsProcessor],
        vocab_size: int,
        dtype: mx.Dtype,
        num_before: int,
    ) -> None:
        """`dtype`: of the model's logits. `num_before`: tokens that a prompt cache held: mlx-lm's processors see
        the prompt and what follows, not those."""
        super().__init__(SamplingSettings(), vocab_size)
        self._draw = sampler
        self._calls = list(processors)
        self.dtype = dtype
        self._num_before = num_before
        self._last: mx.array | None = None
        self._logprobs: list[mx.array] = []

    @property
    def greedy(self) -> bool:
        """Whether tokens are the largest logits, which needs none of the caller's functions."""
        return self._draw is greedy_sampler and not self._calls

    def choose(self, logits: Row | mx.array, tokens: Sequence[int], position: int) -> int:
        row = mx.array(logits)[None].astype(self.dtype)
        if self._calls:
            seen = mx.array(list(tokens[self._num_before :]))
            for process in self._calls:
                row = process(seen, row)
        self._last = row - mx.logsumexp(row, keepdims=True)
        self._logprobs.append(self._last.squeeze(0))
        return int(self._draw(self._last).item())

    def take_logprobs(self) -> list[mx.array]:
        """The rows (V,) since the last call."""
        rows, self._logprobs = self._logprobs, []
        return rows

    def draw_ahead(self) -> None:
        """mlx-lm always draws one token more than it gives out: so must we, for the next text of a program that
        seeds once to be the same."""
        if self._last is not None:
            mx.eval(self._draw(self._last))
