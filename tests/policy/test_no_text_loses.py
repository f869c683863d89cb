"""What the default policy makes of the embedded pair's drafts, on a clock that only passes and draft steps move.

The policy, the drafts and what the target says are real; what things cost is a table, measured on a machine with
two cores where a second row costs 17 % of a pass. So nothing here depends on the machine, and every text can be
held against plain decoding exactly; the policy's own arithmetic is `llmcad-mlx bench`'s affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from llmcad_mlx import Engine
from llmcad_mlx.drafting import Drafter
from llmcad_mlx.engine.growth import make_policy
from llmcad_mlx.measure.workload import load_prompts
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import SamplingSettings, SpeculationSettings
from llmcad_mlx.store.profile import PairProfile
from llmcad_mlx.tree.token_tree import TokenTree
from llmcad_mlx.verifying import Verification
from tests.support.real_text import chat, default_engine
from tests.support.rounds import Rounds
from tests.support.simulated_stream import SimulatedClock

pytestmark = pytest.mark.embedded

TOKENS = 24  # the shorter a text, the less it can earn back
PASS_S = ((1, 1.0), (2, 1.17), (3, 1.20), (4, 1.33), (8, 2.3), (16, 4.4), (64, 16.0))  # in plain passes
STEP_S, ROW_S, CATCH_UP_S = 0.32, 0.016, 0.85  # of a draft step, of one more row, of reading what it has missed


@dataclass
class RecordedTarget:
    """Says again what the target has said, in the time that `PASS_S` gives it."""

    clock: SimulatedClock
    vocab_size: int
    text: Sequence[int] = ()
    cache: Any = field(default_factory=lambda: SimpleNamespace(length=0, capability="tree"))
    io_wait_s: float = 0.0
    streamed_bytes: int = 0

    def free_seconds(self) -> float:
        return 0.0

    def prefill(self, tokens: Sequence[int], *_: Any) -> None:
        self.cache.length += len(tokens)

    def truncate(self, length: int) -> None:
        self.cache.length = min(length, self.cache.length)

    def verify(self, tree: TokenTree, background: Callable[[float], bool] | None = None) -> Verification:
        self.clock.now += float(np.interp(len(tree), *zip(*PASS_S, strict=True)))
        logits = np.zeros((len(tree), self.vocab_size), np.float32)
        for node in range(len(tree)):
            first, path = self.cache.length + 1, tree.path_tokens(node)
            if list(self.text[first : first + len(path)]) == path and first + len(path) < len(self.text):
                logits[node, self.text[first + len(path)]] = 1.0  # elsewhere nobody asks
        return Verification(mx.array(logits), range(len(tree)))

    def commit(self, verification: Verification, nodes: Sequence[int]) -> None:
        self.cache.length += 1 + len(nodes)


def timed(drafter: Drafter, clock: SimulatedClock) -> Drafter:
    """The drafter, whose steps take what the table says."""
    expand = drafter.expand

    def on_the_clock(tree: TokenTree, leaves: Sequence[int]) -> Any:
        proposals = expand(tree, leaves)
        if drafter.rows_fed != 0:
            rows = drafter.rows_fed
            clock.now += CATCH_UP_S if rows is None else STEP_S + ROW_S * (rows - 1)
        return proposals

    drafter.expand = on_the_clock  # type: ignore[method-assign]
    return drafter


@dataclass
class Session:
    """The default policy over one text after the other, as a user's session."""

    engine: Engine
    clock: SimulatedClock = field(default_factory=SimulatedClock)

    def __post_init__(self) -> None:
        self.target = RecordedTarget(self.clock, self.engine.pair.vocab_size)
        self.drafters = [timed(drafter, self.clock) for drafter in self.engine.pair.drafters]
        profile = PairProfile(None)
        policy = make_policy(
            SpeculationSettings(), self.drafters, profile.costs, profile.calibration, self.engine.pair.max_nodes
        )
        self.rounds = Rounds(self.target, self.drafters, policy, profile.costs, self.clock)  # type: ignore[arg-type]
        self.sampler = TargetSampler(SamplingSettings(), self.engine.pair.vocab_size)

    def seconds(self, prompt: list[int], answer: list[int]) -> float:
        """Of the answer, in plain passes."""
        self.target.text = [*prompt, *answer]
        for drafter in self.drafters:
            drafter.truncate(0)
        self.rounds.tokens.clear()
        stats = GenerationStats()
        self.rounds.begin(prompt, stats)
        started, left = self.clock.now, len(answer)

        def stop(token: int) -> bool:
            nonlocal left
            left -= 1
            return left == 0

        while left:
            self.rounds.round(self.sampler, stats, stop)
        assert self.rounds.tokens == self.target.text
        return self.clock.now - started


def test_no_text_loses_more_than_a_token_or_so() -> None:
    with default_engine() as engine:
        texts = []
        for prompt in load_prompts(Path("examples/four_domains.toml"), per_domain=5):
            tokens = engine.encode(chat(prompt.text))
            texts.append((tokens, engine.generate(tokens, max_tokens=TOKENS, policy="plain").tokens))
        session = Session(engine)
        for prompt, answer in texts:
            session.seconds(prompt, answer)  # learns what things cost, and how far the drafts can be believed
        lost = [session.seconds(prompt, answer) - len(answer) for prompt, answer in texts]
    assert len(lost) == 20
    assert max(lost) <= 1.25
    assert sum(lost) < -0.05 * sum(len(answer) for _, answer in texts)
