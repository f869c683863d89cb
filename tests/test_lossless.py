"""The headline: speculative text equals plain text, token for token, whatever the draft and the tree."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.drafting.lookup import NgramDrafter
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.policy import Candidates, ChainPolicy, GrowthPolicy
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import SamplingSettings
from llmcad_mlx.tree.token_tree import MODEL, TokenTree
from llmcad_mlx.verifying import Target
from tests.support.rounds import Rounds, sampler_of
from tests.support.simulated_stream import WaitingTarget
from tests.support.tiny import VOCAB, tiny_tree_model


@functools.cache
def model(seed: int, kernels: bool, noise: float = 0.0):
    return tiny_tree_model(seed, cpu_kernels=kernels, noise=noise)


class RandomDrafter(Drafter):
    """Proposes random tokens, or always the same wrong one: trees no real draft would grow."""

    source = MODEL
    rows_fed = 1

    def __init__(self, seed: int, adversarial: bool) -> None:
        self.random = np.random.default_rng(seed)
        self.adversarial = adversarial

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        if self.adversarial:
            return [Candidates([tree.tokens[leaf]], [1.0]) for leaf in leaves]
        return [self._random() for _ in leaves]

    def _random(self) -> Candidates:
        count = int(self.random.integers(0, 4))
        tokens = self.random.choice(VOCAB, count, replace=False).tolist()
        return Candidates(tokens, sorted(self.random.random(count).tolist(), reverse=True))


class FakeClock:
    """Each reading is a random step later: the policy sees costs of every kind."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.now = 0.0

    def __call__(self) -> float:
        self.now += float(self.random.exponential(1.0))
        return self.now


def make_engine(
    target_kernels: bool,
    drafters: Sequence[Drafter],
    policy: GrowthPolicy,
    costs: CostModel,
    clock: Callable[[], float],
    waits: int | None = None,
) -> Rounds:
    """waits: the seed of a target that waits for its weights; None: a resident one."""
    tree_model = model(0, target_kernels)
    target = Target(tree_model, VOCAB) if waits is None else WaitingTarget(tree_model, VOCAB, seed=waits)
    target.cache.max_dead_share, target.cache.min_dead = 0.1, 2  # compact often
    return Rounds(target, drafters, policy, costs, clock)


def run(engine: Rounds, prompt: Sequence[int], count: int, sampling: SamplingSettings) -> list[int]:
    stats, sampler = GenerationStats(), TargetSampler(sampling, VOCAB)
    engine.begin(prompt, stats)
    left = itertools.count(count - 1, -1)
    while stats.generated_tokens < count:
        engine.round(sampler, stats, lambda _: next(left) == 0)
    return engine.tokens[len(prompt) :]


def plain(prompt: Sequence[int], count: int, sampling: SamplingSettings, kernels: bool) -> list[int]:
    engine = make_engine(kernels, [], ChainPolicy(0), CostModel(), FakeClock(0))
    return run(engine, prompt, count, sampling)


def make_policy(kind: str, costs: CostModel, nodes: int, branching: bool = True, **options: bool) -> GrowthPolicy:
    if kind == "chain":
        return ChainPolicy(nodes, **options)
    if kind == "paper":
        return PaperPolicy(nodes, branching=branching, **options)
    forced = nodes if kind == "forced" else None
    return ThroughputPolicy(costs, Calibration(), tree_nodes=forced, branching=branching, **options)


def make_drafters(kind: str, seed: int, kernels: bool) -> list[Drafter]:
    if kind in ("perfect", "other"):
        return [ModelDrafter(model(7 if kind == "other" else 0, kernels))]
    if kind == "good":
        return [NgramDrafter(), ModelDrafter(model(0, kernels, 0.2))]
    if kind == "ngram":
        return [NgramDrafter()]
    return [RandomDrafter(seed, adversarial=kind == "adversarial")]


sampling_settings = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**63),
    repetition_penalty=st.sampled_from([0.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([None, {3: 2.0, 5: -4.0}]),
)


@settings(max_examples=60, deadline=None)
@given(
    sampling=sampling_settings,
    draft=st.sampled_from(["perfect", "good", "other", "ngram", "random", "adversarial"]),
    policy=st.sampled_from(["throughput", "forced", "paper", "chain"]),
    nodes=st.integers(1, 24),
    seed=st.integers(0, 1000),
    kernels=st.booleans(),
    waits=st.one_of(st.none(), st.integers(0, 1000)),
    options=st.fixed_dictionaries({"branching": st.booleans(), "pipelined": st.booleans()}),
)
def test_output_equals_plain_decoding(
    sampling: SamplingSettings,
    draft: str,
    policy: str,
    nodes: int,
    seed: int,
    kernels: bool,
    waits: int | None,
    options: dict[str, bool],
) -> None:
    random = np.random.default_rng(seed)
    prompt = random.integers(0, VOCAB, int(random.integers(1, 30))).tolist()
    costs = CostModel()
    growth = make_policy(policy, costs, nodes, **options)
    engine = make_engine(kernels, make_drafters(draft, seed, kernels), growth, costs, FakeClock(seed), waits)
    first = run(engine, prompt, 28, sampling)
    assert first == plain(prompt, 28, sampling, kernels)
    # A second turn that goes on, and a third whose prompt was edited in the middle: caches are reused.
    second = [*prompt, *first, *random.integers(0, VOCAB, 5).tolist()]
    assert run(engine, second, 10, sampling) == plain(second, 10, sampling, kernels)
    edited = [*second[: len(second) // 2], *random.integers(0, VOCAB, 7).tolist()]
    assert run(engine, edited, 10, sampling) == plain(edited, 10, sampling, kernels)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", ["forced", "paper", "chain"])
def test_a_perfect_draft_is_always_accepted(temperature: float, policy: str) -> None:
    """With draft = target, every drafted branch on the sampled path is accepted, at T = 0 and T = 1."""
    costs, stats, sampler = CostModel(), GenerationStats(), sampler_of(temperature, 5)
    growth = make_policy(policy, costs, 8)
    engine = make_engine(True, make_drafters("perfect", 0, True), growth, costs, FakeClock(1))
    engine.begin([1, 2, 3], stats)
    for _ in range(20):
        done = engine.round(sampler, stats)
        assert not done.selection.tree.has_children(done.walk.last)  # the path ends where drafting had
    assert stats.accepted == stats.path_tested > 0


@pytest.mark.parametrize("policy", ["throughput", "forced", "paper", "chain"])
def test_the_draft_cache_is_never_starved(policy: str) -> None:
    """After a round the draft has every committed token but those that were never fed: it catches up next."""
    costs = CostModel()
    drafter = ModelDrafter(model(0, True))
    engine = make_engine(True, [drafter], make_policy(policy, costs, 6), costs, FakeClock(2))
    engine.begin([1, 2, 3])
    for _ in range(25):
        done = engine.round()
        missing = len(engine.tokens) - 1 - drafter.cache.length
        assert missing >= 0
        if len(done.drafted) > 1:
            assert missing <= 1  # the root was fed; of the accepted path at most the last node was not
    whole = model(0, True).forward(engine.tokens, model(0, True).new_cache()).logits[-1]
    drafter.begin(engine.tokens, sampler_of())
    tree = TokenTree(engine.tokens[-1], len(engine.tokens) - 1)
    (candidates,) = drafter.expand(tree, [0])
    assert candidates.tokens[0] == int(mx.argmax(whole).item())
