"""Who grows a tree: policies by their settings, drafting while the target waits, what survives, whose seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.drafting.lookup import NgramDrafter
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.engine.growth import make_policy
from llmcad_mlx.engine.round import Round
from llmcad_mlx.errors import UsageError
from llmcad_mlx.policy import Candidates, ChainPolicy, GrowthPolicy
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.settings import SpeculationSettings
from llmcad_mlx.tree.token_tree import NGRAM, ROOT, Selection, TokenTree
from llmcad_mlx.verifying import Target
from tests.support.rounds import PROMPT, Charged, Rounds, forced, model, sampler_of
from tests.support.simulated_stream import SimulatedClock, WaitingTarget
from tests.support.tiny import VOCAB


def engine_of(
    policy: GrowthPolicy,
    drafters: Sequence[Drafter] | None = None,
    target: Target | None = None,
    clock: Callable[[], float] | None = None,
) -> Rounds:
    """An engine whose draft is the target's own model, unless told otherwise."""
    drafters = [ModelDrafter(model())] if drafters is None else drafters
    return Rounds(target or WaitingTarget(model(), VOCAB), drafters, policy, clock=clock)


def run(engine: Rounds, rounds: int, stats: GenerationStats | None = None) -> list[Round]:
    return [engine.round(stats=stats) for _ in range(rounds)]


# -- what survives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("make", [lambda: forced(6), lambda: PaperPolicy(6)], ids=["forced", "paper"])
def test_with_a_perfect_draft_rounds_start_from_the_last_ones_tree(
    make: Callable[[], GrowthPolicy], temperature: float
) -> None:
    clock, drafter = SimulatedClock(), ModelDrafter(model())
    engine, stats = engine_of(make(), [drafter], clock=clock), GenerationStats()
    Charged(drafter, "expand", clock, 1.0)
    engine.begin(PROMPT, stats)
    survived = 0
    for _ in range(15):
        done = engine.round(sampler_of(temperature), stats)
        if done.survivors is not None:
            survived += len(done.survivors.tree) > 1
            assert done.survivors.tree.tokens[ROOT] == engine.tokens[-1]
            assert done.survivors.tree.root_position == len(engine.tokens) - 1
    assert 8 <= stats.survived == survived
    assert 0 < stats.provisional <= stats.drafted
    assert stats.accepted == stats.path_tested > 0
    # Hardly a step is left to take before a pass; without the pipeline a round takes two or more.
    assert stats.draft_s - stats.hidden_draft_s < 15 < stats.hidden_draft_s


def test_the_draft_reads_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a tree survived, steps feed the rows of the nodes they expand: nothing comes again."""
    drafter = ModelDrafter(model(0.2))
    engine = engine_of(forced(6, max_provisional=8), [drafter])
    expand, survivors, checked = drafter.expand, None, []

    def checking(tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        proposals = expand(tree, leaves)
        if survivors is not None:
            checked.append(len(leaves))
            assert drafter.rows_fed == len(leaves)
        return proposals

    monkeypatch.setattr(drafter, "expand", checking)
    engine.begin(PROMPT)
    for _ in range(20):
        survivors = engine.round().survivors
    assert sum(checked) > 20


def begun_with(policy: GrowthPolicy) -> list[Selection | None]:
    """Will list what each round of `policy` is begun with."""
    seen: list[Selection | None] = []
    begin = policy.begin

    def noting(tree: TokenTree, survivors: Selection | None = None) -> None:
        seen.append(survivors)
        begin(tree, survivors)

    policy.begin = noting  # type: ignore[method-assign]
    return seen


def test_a_tree_is_carried_over_to_the_next_round_only() -> None:
    policy = forced(6)
    engine, seen = engine_of(policy), begun_with(policy)
    engine.begin(PROMPT)
    rounds = run(engine, 4)
    assert seen == [None, *(done.survivors for done in rounds[:-1])]
    assert None not in seen[1:]


@pytest.mark.parametrize("change", ["prompt", "same prompt", "sampling", "policy", "error", "stop"])
def test_a_carried_tree_is_dropped_when_anything_changes(change: str) -> None:
    policy = forced(6)
    engine = engine_of(policy)
    engine.begin(PROMPT)
    (done,) = run(engine, 1)
    assert done.survivors is not None
    chosen = None
    if change == "prompt":
        engine.begin([*engine.tokens, 5])
    elif change == "same prompt":
        engine.begin(list(engine.tokens))
    elif change == "sampling":
        chosen = sampler_of(0.5)
    elif change == "policy":
        policy = engine.policy = forced(6)
    elif change == "error":
        engine.target._wait = lambda background: 1 / 0  # type: ignore[attr-defined]
        with pytest.raises(ZeroDivisionError):
            run(engine, 1)
        del engine.target._wait  # type: ignore[attr-defined]
    elif change == "stop":
        done = engine.round(stop=lambda token: True)
        assert done.survivors is None
    seen = begun_with(policy)
    engine.round(chosen)
    assert seen == [None]


@pytest.mark.parametrize("make", [lambda: ChainPolicy(3), lambda: forced(6, pipelined=False)])
def test_a_chain_or_without_the_pipeline_nothing_is_drafted_provisionally(
    make: Callable[[], GrowthPolicy],
) -> None:
    engine, stats = engine_of(make()), GenerationStats()
    engine.begin(PROMPT, stats)
    run(engine, 5, stats)
    assert stats.drafted > 0
    assert (stats.hidden_draft_s, stats.provisional, stats.survived) == (0.0, 0, 0)


# -- whose seconds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Target, WaitingTarget])
def test_lookups_take_no_drafting_time(target: type[Target]) -> None:
    """Nor must they teach the cost model that a draft step takes none."""
    engine, stats = engine_of(forced(8), [NgramDrafter()], target(model(), VOCAB)), GenerationStats()
    engine.begin(PROMPT, stats)
    run(engine, 20, stats)
    assert stats.drafted > 0
    assert (stats.provisional > 0) is (target is WaitingTarget)
    assert stats.draft_s == stats.hidden_draft_s == 0.0
    assert not engine.costs.draft


def test_a_given_up_draft_is_left_alone_in_the_background() -> None:
    policy = ThroughputPolicy(CostModel(), Calibration())
    drafter = ModelDrafter(model())
    engine = Rounds(WaitingTarget(model(), VOCAB), [drafter], policy, policy.costs, SimulatedClock())
    policy._draft_account.drafting, policy._draft_account.balance = False, 0.0
    engine.begin(PROMPT)
    stats = GenerationStats()
    run(engine, 5, stats)
    assert (stats.drafted, drafter.cache.num_slots) == (0, 0)


# -- policies by their settings ----------------------------------------------------------------------------


def policy_of(max_nodes: int = 64, **options: Any) -> GrowthPolicy:
    return make_policy(SpeculationSettings(**options), [NgramDrafter()], CostModel(), Calibration(), max_nodes)


def drafted(policy: GrowthPolicy, confidence: float = 0.6) -> TokenTree:
    """One round's tree when every leaf has two candidates of which the second is above the paper's threshold."""
    tree = TokenTree(0)
    policy.begin(tree)
    while leaves := policy.next_leaves(tree, NGRAM):
        for leaf in leaves:
            policy.add(tree, leaf, Candidates([1, 2], [confidence, 0.35], NGRAM))
    return policy.submit(tree).tree


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        ({"policy": "paper", "fallback": False}, 9),
        ({"policy": "paper", "fallback": False, "tree_nodes": 5}, 5),
        ({"policy": "paper", "fallback": False, "tree_nodes": 1}, 1),
        ({"fallback": False}, 16),
        ({"fallback": False, "tree_nodes": 6}, 6),
        ({"tree_nodes": 7}, 7),
        ({"policy": "chain"}, 5),
        ({"policy": "chain", "tree_nodes": 3}, 3),
        ({"policy": "plain"}, 1),
    ],
    ids=str,
)
def test_a_fixed_number_of_nodes_is_drafted(options: dict[str, Any], nodes: int) -> None:
    assert len(drafted(policy_of(**options))) == nodes
    assert len(drafted(policy_of(**options), confidence=0.0)) in (nodes, 1)  # 1: no candidate is worth a place


def test_the_papers_fallback_ends_drafting_where_confidence_does() -> None:
    policy = policy_of(policy="paper", tree_nodes=64)
    assert isinstance(policy, PaperPolicy)
    policy.alpha = 0.3
    assert len(drafted(policy)) < 12
    assert len(drafted(policy_of(policy="paper", tree_nodes=64, fallback=False))) == 64


@pytest.mark.parametrize(
    "options", [{"policy": "paper"}, {"policy": "paper", "fallback": False}, {"tree_nodes": 6}]
)
def test_without_trees_one_branch_is_submitted(options: dict[str, Any]) -> None:
    tree = drafted(policy_of(tree=False, **options))
    assert tree.parents == list(range(-1, len(tree) - 1))
    assert len(tree) > 4
    branchy = drafted(policy_of(**options))
    assert branchy.parents != list(range(-1, len(branchy) - 1))


def test_the_pipeline_and_the_largest_pass_reach_the_policy() -> None:
    for name in ("throughput", "paper", "chain", "plain"):
        assert policy_of(policy=name).pipelined
        assert not policy_of(policy=name, pipeline=False).pipelined
    policies = policy_of(), policy_of(256), policy_of(256, tree_nodes=32)
    assert [p.max_nodes for p in policies if isinstance(p, ThroughputPolicy)] == [64, 256, 32]


@pytest.mark.parametrize("policy", ["chain", "plain"])
@pytest.mark.parametrize("name", ["tree", "fallback"])
def test_what_a_policy_does_not_have_cannot_be_switched_off(policy: Any, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: the {policy} policy"):
        SpeculationSettings(policy, **{name: False})
