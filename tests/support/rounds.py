"""A session whose rounds are all grown by one policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from llmcad_mlx.drafting.drafter import Drafter
from llmcad_mlx.engine.round import Round, run_round
from llmcad_mlx.engine.session import Session
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.policy import GrowthPolicy
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler


class Rounds(Session):
    """`round` and `start` with the policy it was made with."""

    def __init__(
        self,
        target: Any,
        drafters: Sequence[Drafter],
        policy: GrowthPolicy,
        costs: CostModel,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(target, drafters, costs, clock)
        self.policy = policy

    def begin(self, prompt: Sequence[int], stats: GenerationStats | None = None, **options: Any) -> None:
        self.start(prompt, self.policy, GenerationStats() if stats is None else stats, **options)

    def round(
        self, sampler: TargetSampler, stats: GenerationStats, stop: Callable[[int], bool] | None = None
    ) -> Round:
        return run_round(self, self.policy, sampler, stats, stop)
