"""A session: one sequence of tokens, the caches that hold it, and what is learned while it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.engine.growth import CarriedTree, prefill_steps
from llmcad_mlx.policy import GrowthPolicy
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.verifying import Target


@dataclass(slots=True)
class Session:
    """Owns the tokens, the caches of target and drafters, the tree carried from round to round, and the books.

    `tokens` is prompt and output; its last one is the next tree's root and the only one not in the target's cache.
    `costs`: the books, written by rounds and by nobody else. Drafters are asked in order, cheapest first. `clock`
    gives seconds; only costs are learned from it, never a token.
    """

    target: Target
    drafters: Sequence[Drafter]
    costs: CostModel
    clock: Callable[[], float] = time.perf_counter
    tokens: list[int] = field(default_factory=list)
    carried: CarriedTree | None = field(default=None, init=False)
    streamed_bytes: int = field(default=0, init=False)  # what the target had read when the last round ended
    _unfinished: bool = field(default=False, init=False)  # whether caches and tokens may disagree

    def start(
        self,
        prompt: Sequence[int],
        policy: GrowthPolicy,
        stats: GenerationStats,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Make `prompt` the sequence, keeping what caches already hold of it, and feed the rest.

        policy: what the rounds to come are grown by; the drafters it uses read the prompt too. on_progress(done,
        total) counts prompt tokens; an exception it raises ends the prefill, and the next one goes on from there.
        """
        started = self.clock()
        self.carried, self._unfinished = None, True
        kept = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        self.target.truncate(kept)
        kept = self.target.cache.length
        for drafter in self.drafters:
            drafter.truncate(kept)
        self.tokens = list(prompt)
        stats.prompt_tokens, stats.reused_tokens = len(prompt), kept
        on_progress(kept, len(prompt))
        drafters = self.drafters_of(policy)
        self.target.prefill(
            prompt[kept:-1],
            lambda done: on_progress(min(kept + done, len(prompt)), len(prompt)),
            prefill_steps(drafters, prompt) if policy.pipelined else None,
        )
        for drafter in drafters:
            # Told again with each chunk: whoever wants to end the prompt here raises.
            drafter.prefill(prompt, lambda done: on_progress(len(prompt), len(prompt)))
        on_progress(len(prompt), len(prompt))
        self._unfinished = False
        self.streamed_bytes = self.target.streamed_bytes
        stats.prompt_s += self.clock() - started

    def begin_round(self, policy: GrowthPolicy) -> None:
        """After a round or a prefill that was broken off, first make the caches hold what `tokens` says."""
        if self._unfinished:
            self.start(list(self.tokens), policy, GenerationStats())
        self._unfinished = True

    def end_round(self, tokens: Sequence[int], carried: CarriedTree | None) -> None:
        """All caches hold what came before the last of `tokens`, which now join the sequence."""
        self.tokens.extend(tokens)
        self.carried, self._unfinished = carried, False

    def drafters_of(self, policy: GrowthPolicy) -> list[Drafter]:
        """The drafters that a policy listens to at present, cheapest first."""
        return [drafter for drafter in self.drafters if policy.wants(drafter.source)]

    def resume(self, tokens: Sequence[int]) -> None:
        """The target's cache was filled from elsewhere, and holds `tokens`."""
        self.tokens = list(tokens)

    def forget(self) -> None:
        """Empty the sequence and all caches."""
        self.tokens, self.carried = [], None
        self.target.truncate(0)
        for drafter in self.drafters:
            drafter.truncate(0)


def reusable_prefix(tokens: Sequence[int], prompt: Sequence[int], least: int) -> int:
    """How many tokens of `prompt` a cache of `tokens` saves reading; `least`: see `ModelCache.least_length`."""
    common = min(common_prefix(tokens, prompt), len(prompt) - 1)
    return common if common >= least else 0


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    differing = (index for index, (left, right) in enumerate(zip(a, b, strict=False)) if left != right)
    return next(differing, min(len(a), len(b)))
