"""Rounds of tiny models: a session whose rounds are grown by one policy, on a clock that is charged by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.engine.round import Round, run_round
from llmcad_mlx.engine.session import Session
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.policy import ChainPolicy, GrowthPolicy
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import SamplingSettings
from llmcad_mlx.verifying import Target
from tests.support.simulated_stream import SimulatedClock
from tests.support.tiny import VOCAB, tiny_tree_model

PROMPT = [1, 2, 3, 4, 5, 1, 2, 3]


@functools.cache
def model(noise: float = 0.0) -> TreeModel:
    """The target, or with noise a draft that is right now and then."""
    return tiny_tree_model(0, noise=noise)


class Rounds(Session):
    """`begin` and `round` with the policy it was made with."""

    def __init__(
        self,
        target: Any,
        drafters: Sequence[Drafter],
        policy: GrowthPolicy,
        costs: CostModel | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """target: None for `model()` in memory."""
        target = Target(model(), VOCAB) if target is None else target
        super().__init__(target, drafters, CostModel() if costs is None else costs, clock or SimulatedClock())
        self.policy = policy

    def begin(self, prompt: Sequence[int], stats: GenerationStats | None = None, **options: Any) -> None:
        self.start(prompt, self.policy, GenerationStats() if stats is None else stats, **options)

    def round(
        self,
        sampler: TargetSampler | None = None,
        stats: GenerationStats | None = None,
        stop: Callable[[int], bool] | None = None,
    ) -> Round:
        """Greedy unless told otherwise."""
        stats = GenerationStats() if stats is None else stats
        return run_round(self, self.policy, sampler or sampler_of(), stats, stop)

    def decode(
        self, count: int, sampler: TargetSampler | None = None, stop: Callable[[int], bool] | None = None
    ) -> list[int]:
        """At least `count` more tokens."""
        start = len(self.tokens)
        while len(self.tokens) < start + count:
            self.round(sampler, stop=stop)
        return self.tokens[start:]


def plain_text(prompt: Sequence[int], count: int) -> list[int]:
    """What `model()` alone says."""
    return _plain_text(tuple(prompt), count)


@functools.cache
def _plain_text(prompt: tuple[int, ...], count: int) -> list[int]:
    engine = Rounds(None, [], ChainPolicy(0))
    engine.begin(prompt)
    return engine.decode(count)


def forced(
    num_nodes: int, max_width: int = 8, max_provisional: int | None = None, **options: Any
) -> ThroughputPolicy:
    """The default policy, told how many nodes to submit, and how many to expand in a step and while the target
    waits."""
    policy = ThroughputPolicy(CostModel(), Calibration(), tree_nodes=num_nodes, **options)
    policy.max_width = max_width
    policy.max_provisional = max_provisional or policy.max_provisional
    return policy


def sampler_of(temperature: float = 0.0, seed: int = 0, vocab_size: int = VOCAB) -> TargetSampler:
    return TargetSampler(SamplingSettings(temperature=temperature, seed=seed), vocab_size)


class Charged:
    """Wraps a method so that each call takes `seconds` on the clock."""

    def __init__(self, owner: Any, name: str, clock: SimulatedClock, seconds: float) -> None:
        self.inner, self.clock, self.seconds = getattr(owner, name), clock, seconds
        self.calls = 0
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.now += self.seconds
        self.calls += 1
        return self.inner(*args, **kwargs)
