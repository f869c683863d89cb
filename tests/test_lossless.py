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
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.drafting.ngram import NgramDrafter
from llmcad_mlx.policy import Candidates, GrowthPolicy
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.fixed import ChainPolicy
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import SamplingSettings
from llmcad_mlx.tree.token_tree import MODEL, NGRAM, Selection, TokenTree
from llmcad_mlx.verifying import Target
from tests.support.rounds import Rounds
from tests.support.tiny import VOCAB, tiny_tree_model
from tests.support.waiting_target import WaitingTarget


@functools.cache
def model(seed: int, kernels: bool, noise: float = 0.0):
    return tiny_tree_model(seed, cpu_kernels=kernels, noise=noise)


class RandomDrafter:
    """Proposes random tokens, or always the same wrong one: trees no real draft would grow."""

    source = MODEL
    rows_fed = 1

    def __init__(self, seed: int, adversarial: bool) -> None:
        self.random = np.random.default_rng(seed)
        self.adversarial = adversarial

    def prefill(self, tokens: Sequence[int], on_progress: object, should_stop: object) -> None: ...
    def begin(self, tokens: Sequence[int], sampler: TargetSampler, tree: TokenTree | None = None) -> None: ...
    def commit(self, tree: TokenTree, path: Sequence[int], survivors: Selection | None = None) -> None: ...
    def truncate(self, length: int) -> None: ...

    def prefill_some(self, tokens: Sequence[int], limit: int) -> bool:
        return False

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        out = []
        for leaf in leaves:
            if self.adversarial:
                out.append(Candidates([tree.tokens[leaf]], [1.0], MODEL))
            else:
                count = int(self.random.integers(0, 4))
                tokens = self.random.choice(VOCAB, count, replace=False).tolist()
                out.append(Candidates(tokens, sorted(self.random.random(count).tolist(), reverse=True), MODEL))
        return out


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


def make_policy(
    kind: str, costs: CostModel, nodes: int, *, branching: bool = True, pipelined: bool = True
) -> GrowthPolicy:
    if kind == "throughput":
        return ThroughputPolicy(costs, Calibration(), branching=branching, pipelined=pipelined)
    if kind == "forced":
        return ThroughputPolicy(costs, Calibration(), tree_nodes=nodes, branching=branching, pipelined=pipelined)
    if kind == "paper":
        return PaperPolicy(nodes, branching=branching, pipelined=pipelined)
    return ChainPolicy(nodes, pipelined=pipelined)


def make_drafters(kind: str, seed: int, kernels: bool) -> list[Drafter]:
    if kind == "perfect":
        return [ModelDrafter(model(0, kernels))]
    if kind == "good":
        return [NgramDrafter(), ModelDrafter(model(0, kernels, 0.2))]
    if kind == "other":
        return [ModelDrafter(model(7, kernels))]
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
    first = run(engine, prompt, 40, sampling)
    assert first == plain(prompt, 40, sampling, kernels)
    # A second turn that goes on, and a third whose prompt was edited in the middle: caches are reused.
    second = [*prompt, *first, *random.integers(0, VOCAB, 5).tolist()]
    assert run(engine, second, 15, sampling) == plain(second, 15, sampling, kernels)
    edited = [*second[: len(second) // 2], *random.integers(0, VOCAB, 7).tolist()]
    assert run(engine, edited, 15, sampling) == plain(edited, 15, sampling, kernels)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", ["forced", "paper", "chain"])
def test_a_perfect_draft_is_always_accepted(temperature: float, policy: str) -> None:
    """With draft = target, every drafted branch on the sampled path is accepted, at T = 0 and T = 1."""
    costs = CostModel()
    engine = make_engine(
        True, make_drafters("perfect", 0, True), make_policy(policy, costs, 8), costs, FakeClock(1)
    )
    stats = GenerationStats()
    sampler = TargetSampler(SamplingSettings(temperature=temperature, seed=5), VOCAB)
    engine.begin([1, 2, 3], stats)
    for _ in range(20):
        done = engine.round(sampler, stats)
        # The path ends at a node that has no drafted children at all.
        assert not done.selection.tree.has_children(done.walk.last)
    assert stats.accepted == stats.path_tested > 0
    assert stats.acceptance_rate == 1.0


@pytest.mark.parametrize("policy", ["throughput", "forced", "paper", "chain"])
def test_the_draft_cache_is_never_starved(policy: str) -> None:
    """After a round the draft has every committed token but those that were never fed: it catches up next."""
    costs = CostModel()
    drafter = ModelDrafter(model(0, True))
    engine = make_engine(True, [drafter], make_policy(policy, costs, 6), costs, FakeClock(2))
    stats, sampler = GenerationStats(), TargetSampler(SamplingSettings(), VOCAB)
    engine.begin([1, 2, 3], stats)
    for _ in range(25):
        done = engine.round(sampler, stats)
        fed = drafter.cache.length
        assert fed <= len(engine.tokens) - 1
        if len(done.drafted) > 1:
            # Root was fed; of the accepted path at most the last node was not.
            assert fed >= len(engine.tokens) - 1 - 1
    reference = model(0, True).new_cache()
    whole = model(0, True).forward(engine.tokens, reference).logits[-1]
    drafter.begin(engine.tokens, sampler)
    tree = TokenTree(engine.tokens[-1], len(engine.tokens) - 1)
    (candidates,) = drafter.expand(tree, [0])
    assert candidates.tokens[0] == int(mx.argmax(whole).item())


def test_sources_are_the_ones_policies_know() -> None:
    assert ModelDrafter(model(0, True)).source == MODEL
    assert NgramDrafter().source == NGRAM
