"""Drafting while the target waits: what is drafted, what survives, and whom the seconds are charged to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.drafting.ngram import NgramDrafter
from llmcad_mlx.engine.round import Round
from llmcad_mlx.policy import Candidates, GrowthPolicy
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.fixed import ChainPolicy
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.tree.token_tree import MODEL, NGRAM, ROOT, Selection, TokenTree
from llmcad_mlx.tree.walk import walk
from llmcad_mlx.verifying import Target, Verification
from tests.support.rounds import PROMPT, Charged, Rounds, forced, model, sampler_of
from tests.support.simulated_stream import SimulatedClock
from tests.support.tiny import VOCAB
from tests.support.waiting_target import WaitingTarget


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


def test_what_was_drafted_but_not_submitted_serves_a_resident_target_too() -> None:
    """The target's token after the accepted path is often one the policy left out."""
    drafter = ModelDrafter(model(0.3))
    engine = engine_of(forced(3), [drafter], Target(model(), VOCAB))
    stats = GenerationStats()
    engine.begin(PROMPT, stats)
    sizes = [0 if done.survivors is None else 1 for done in run(engine, 60, stats)]
    assert sum(sizes) > 5
    assert (stats.provisional, stats.provisional_passes, stats.hidden_draft_s) == (0, 0, 0.0)


# -- whose seconds -----------------------------------------------------------------------------------------


class ChargedTarget(WaitingTarget):
    """After its background it blocks for 8 s, then computes for 2 s and 0.5 s a row."""

    def __init__(self, clock: SimulatedClock, most: int) -> None:
        super().__init__(model(), VOCAB, most=most)
        self.clock = clock
        self.blocked_s = 0.0
        self.read = 0

    @property
    def io_wait_s(self) -> float:
        return self.blocked_s

    @property
    def streamed_bytes(self) -> int:
        return self.read

    def verify(self, tree: TokenTree, background: Callable[[float], bool] | None = None) -> Verification:
        done = super().verify(tree, background)
        self.blocked_s += 8.0
        self.read += 1000
        self.clock.now += 8.0 + 2.0 + 0.5 * len(tree)
        return done


def test_seconds_are_charged_to_who_spent_them() -> None:
    clock = SimulatedClock()
    drafter, target = ModelDrafter(model()), ChargedTarget(clock, most=5)
    engine = engine_of(forced(4), [drafter], target, clock)
    Charged(drafter, "expand", clock, 1.0)
    stats = GenerationStats()
    target.read = 777  # the prompt's
    engine.begin(PROMPT, stats)
    passes: list[float] = []
    engine.costs.observe_pass = lambda rows, seconds, busy: passes.append(seconds)  # type: ignore[method-assign]
    for _ in range(6):
        before = clock.now
        in_front = stats.draft_s - stats.hidden_draft_s
        engine.round(stats=stats)
        in_front = stats.draft_s - stats.hidden_draft_s - in_front
        # The pass took what it took, hidden drafting included: that stands where waiting stood.
        assert passes[-1] == clock.now - before - in_front
    assert stats.hidden_draft_s == target.steps > 6
    assert stats.io_wait_s == 6 * 8.0
    assert stats.verify_s == 6 * 4.0
    assert stats.streamed_bytes == 6 * 1000
    assert stats.decode_s == stats.draft_s + stats.verify_s + stats.io_wait_s
    assert stats.other_s == 0.0


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


@pytest.mark.parametrize("pipelined", [True, False])
def test_the_draft_reads_the_prompt_while_the_target_does(pipelined: bool) -> None:
    prompt = [(7 * i) % VOCAB for i in range(400)]
    drafter = ModelDrafter(model())
    target = WaitingTarget(model(), VOCAB, most=4)
    engine = engine_of(forced(4, pipelined=pipelined), [NgramDrafter(), drafter], target)
    lengths: list[int] = []
    prefill = drafter.prefill

    def noting(*args: Any) -> None:
        lengths.append(drafter.cache.length)
        prefill(*args)

    drafter.prefill = noting  # type: ignore[method-assign]
    engine.begin(prompt)
    assert lengths == [3 * 64 if pipelined else 0]  # the first step was the lookup's
    assert drafter.cache.length == 399


def test_a_given_up_draft_is_left_alone_in_the_background() -> None:
    policy = ThroughputPolicy(CostModel(), Calibration())
    drafter = ModelDrafter(model())
    engine = Rounds(WaitingTarget(model(), VOCAB), [drafter], policy, policy.costs, SimulatedClock())
    policy._draft_account.drafting, policy._draft_account.balance = False, 0.0
    engine.begin(PROMPT)
    stats = GenerationStats()
    run(engine, 5, stats)
    assert (stats.drafted, drafter.cache.num_slots) == (0, 0)


# -- which nodes -------------------------------------------------------------------------------------------


def submitted_tree(policy: GrowthPolicy) -> TokenTree:
    """Drafted: 1 (0.6) with 3 (0.5) below it, and 2 (0.3)."""
    tree = TokenTree(0)
    policy.begin(tree)
    for path, candidates in (
        ([], Candidates([1, 2], [0.6, 0.3])),
        ([1], Candidates([3], [0.5])),
    ):
        (leaf,) = policy.next_leaves(tree, MODEL)[:1]
        assert tree.path_tokens(leaf) == path
        policy.add(tree, leaf, candidates)
    return tree


def test_free_time_goes_to_the_nodes_the_text_passes_through_most_likely() -> None:
    """Whether they were submitted or not, and never twice to the same."""
    policy = forced(4, max_width=1)
    tree = submitted_tree(policy)
    while policy.next_leaves(tree, MODEL):
        pass
    order = []
    policy._expanded[MODEL] = {ROOT, 1}
    for confidences in ([0.9, 0.1], [0.9], [0.5], []):
        (leaf,) = policy.provisional_leaves(tree, MODEL, 8)
        order.append(tree.path_tokens(leaf))
        policy.add(tree, leaf, Candidates([7, 8][: len(confidences)], confidences))
    # 0.3 at [1, 3] and at [2]; then 0.27 below the one, and below the other
    assert order == [[2], [1, 3], [2, 7], [1, 3, 7]]


def test_unlikely_nodes_and_full_trees_are_left_alone() -> None:
    policy = forced(4, max_provisional=3, max_width=8)
    tree = TokenTree(0)
    policy.begin(tree)
    assert policy.next_leaves(tree, MODEL) == [ROOT]
    policy.add(tree, ROOT, Candidates([1, 2, 3, 4], [0.9, 0.05, 0.004, 0.003]))
    assert [tree.tokens[leaf] for leaf in policy.provisional_leaves(tree, MODEL, 8)] == [1, 2]
    assert list(policy.provisional_leaves(tree, MODEL, 8)) == []
    policy.add(tree, 1, Candidates([5], [0.9]))
    assert list(policy.provisional_leaves(tree, MODEL, 8)) == []  # three are expanded


def test_a_pass_that_measures_plain_decoding_is_not_disturbed() -> None:
    costs = CostModel()
    policy = ThroughputPolicy(costs, Calibration())
    tree = TokenTree(0)
    policy.begin(tree)
    assert list(policy.provisional_leaves(tree, MODEL, 8)) == []  # the price of a plain pass is not known yet
    for _ in range(2):
        costs.verify.observe(1, 1.0)
    policy.begin(tree)
    assert list(policy.provisional_leaves(tree, MODEL, 8)) == [ROOT]
    policy._schedule._since_plain = 1000
    policy.begin(tree)
    assert list(policy.provisional_leaves(tree, MODEL, 8)) == []


def test_expanded_nodes_are_remembered_under_their_new_names() -> None:
    policy = forced(4, max_width=1)
    tree = submitted_tree(policy)
    policy.max_width = 8
    leaves = policy.provisional_leaves(tree, MODEL, 8)
    assert [tree.tokens[leaf] for leaf in leaves] == [2, 3]
    policy.add(tree, 2, Candidates([5, 6], [0.5, 0.4]))
    survivors = tree.reroot(2)
    policy.begin(survivors.tree, survivors)
    assert [survivors.tree.tokens[leaf] for leaf in policy.next_leaves(survivors.tree, MODEL)] == [5, 6]
    assert 0 in policy.next_leaves(survivors.tree, NGRAM)  # the lookup has not been asked about anything
    policy.begin(TokenTree(9))
    assert list(policy.next_leaves(TokenTree(9), MODEL)) == [ROOT]


def test_the_papers_pipeline_keeps_one_continuation_of_the_best_branch() -> None:
    policy = PaperPolicy(4)
    tree = TokenTree(0)
    policy.begin(tree)
    policy.next_leaves(tree, MODEL)
    policy.add(tree, ROOT, Candidates([1, 2], [0.4, 0.35]))
    policy.next_leaves(tree, MODEL)
    policy.add(tree, 1, Candidates([3], [0.5]))
    assert list(policy.next_leaves(tree, MODEL)) == []  # four nodes
    assert policy.submit(tree).tree.tokens == [0, 1, 2, 3]
    order = []
    assert list(policy.provisional_leaves(tree, NGRAM, 8)) == []
    policy.begin(tree)
    while leaves := policy.provisional_leaves(tree, MODEL, 8):
        (leaf,) = leaves
        order.append(tree.path_tokens(leaf))
        policy.add(tree, leaf, Candidates([7, 8], [0.6, 0.35]))
    assert order == [[2], [2, 7], [2, 7, 7], [2, 7, 7, 7]]  # 2 is likelier than 3 below 1
    assert len(tree) == 8  # no branch for 8, and no more candidates than a pass has nodes
    survivors = tree.reroot(2)
    policy.begin(survivors.tree, survivors)
    assert policy.next_leaves(survivors.tree, MODEL) == []  # full already
    assert len(policy.submit(survivors.tree).tree) == 4


@pytest.mark.parametrize("make", [lambda: ChainPolicy(3), lambda: forced(6, pipelined=False)])
def test_a_chain_or_without_the_pipeline_nothing_is_drafted_provisionally(
    make: Callable[[], GrowthPolicy],
) -> None:
    engine, stats = engine_of(make()), GenerationStats()
    engine.begin(PROMPT, stats)
    run(engine, 5, stats)
    assert stats.drafted > 0
    assert (stats.hidden_draft_s, stats.provisional, stats.survived) == (0.0, 0, 0)


def test_calibration_learns_from_provisional_nodes_too() -> None:
    policy = forced(4, max_width=8)
    tree = submitted_tree(policy)
    selection = policy.submit(tree)
    policy.provisional_leaves(tree, MODEL, 8)
    policy.add(tree, 3, Candidates([9], [0.8]))
    before = policy.calibration.probabilities([0.8], MODEL)[0]
    text = iter([1, 3, 9])
    policy.verified(selection.tree, walk(selection.tree, lambda node, path: next(text)))
    assert policy.calibration.probabilities([0.8], MODEL)[0] > before
