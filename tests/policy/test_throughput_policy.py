"""The default policy against drafts and clocks made of numbers: what it drafts, submits and gives up."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx.policy import Candidates
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.tree.token_tree import MODEL, NGRAM, ROOT, TokenTree
from llmcad_mlx.tree.walk import walk
from tests.support.rounds import forced
from tests.support.trees import check_integrity, measured

# -- a world of numbers ------------------------------------------------------------------------------------

Propose = Callable[[Sequence[int]], Candidates]  # path of tokens below the root -> candidates below it

WRONG = 1_000_000  # a token that no drafter ever proposes


def dearer(share: float) -> Callable[[int], float]:
    """Seconds of a pass in which each row but the first costs that share of it."""
    return lambda rows: 1 + share * (rows - 1)


@dataclass
class World:
    """A target whose next token is the draft's first, second, … candidate with given probabilities.

    `draft_s(rows)`, `verify_s(rows)` are seconds of one step, `jitter` their relative noise. `accept[i]` is the
    probability that candidate i is right, `confidences` what the draft says of it. `ngram` proposes one token
    with that match confidence, right with probability `ngram_accept`.
    """

    accept: Sequence[float]
    confidences: Sequence[float]
    draft_s: Callable[[int], float] = lambda rows: 0.2
    verify_s: Callable[[int], float] = lambda rows: 1 + 0.1 * (rows - 1)
    jitter: float = 0.0
    load_s: float = 0.0  # a pass takes at least so long: its weights are read meanwhile
    ngram: float | None = None
    ngram_accept: float = 0.0
    seed: int = 0
    policy: ThroughputPolicy = field(init=False)
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    tested: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.policy = ThroughputPolicy(CostModel(), Calibration())

    def run(self, num_tokens: int) -> float:
        """Decode `num_tokens` more tokens; returns how many a pass gave."""
        tokens, passes = self.tokens, self.passes
        while self.tokens < tokens + num_tokens:
            self.round()
        return (self.tokens - tokens) / (self.passes - passes)

    def round(self) -> None:
        policy, tree = self.policy, TokenTree(0, self.tokens)
        seconds = 0.0
        policy.begin(tree)
        if self.ngram is not None:
            while leaves := policy.next_leaves(tree, NGRAM):
                for leaf in leaves:
                    policy.add(tree, leaf, Candidates([50], [self.ngram], NGRAM))
        drafting = policy.wants(MODEL)  # as the engine: it is not even asked otherwise
        while drafting and (leaves := policy.next_leaves(tree, MODEL)):
            took = self._noisy(self.draft_s(len(leaves)))
            policy.costs.draft.observe(len(leaves), took)
            seconds += took
            for leaf in leaves:
                tokens = list(range(1, 1 + len(self.confidences)))
                policy.add(tree, leaf, Candidates(tokens, self.confidences, MODEL))
            assert len(tree) < 1000, "drafting without end"
        selection = policy.submit(tree)
        busy = self._noisy(self.verify_s(len(selection.tree)))
        took = max(busy, self.load_s)
        policy.costs.verify.observe(len(selection.tree), took, busy)
        seconds += took
        steps = walk(selection.tree, lambda node, path: self._target_token())
        policy.verified(selection.tree, steps)
        policy.finished(len(steps.tokens), seconds)
        self.tokens += len(steps.tokens)
        self.tested += len(selection.tree) - 1
        self.passes += 1
        self.seconds += seconds

    def _target_token(self) -> int:
        draw = float(self.random.random())
        for token, probability in enumerate(self.accept, 1):
            if draw < probability:
                return token
            draw -= probability
        return 50 if draw < self.ngram_accept else WRONG

    def _noisy(self, seconds: float) -> float:
        return seconds * float(np.exp(self.jitter * self.random.standard_normal()))

    @property
    def plain_seconds(self) -> float:
        """What the same tokens take without drafting, on average."""
        return self.tokens * max(self.verify_s(1) * float(np.exp(self.jitter**2 / 2)), self.load_s)


# -- never slower ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    accept=st.floats(0.0, 1.0) | st.just(0.0),
    confidences=st.sampled_from([[0.9, 0.05], [0.5, 0.3, 0.1], [0.2] * 4, [1.0], [0.01], [0.7]]),
    draft_s=st.floats(0.01, 2.0),
    row_share=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_no_draft_is_slower_than_none(
    accept: float, confidences: list[float], draft_s: float, row_share: float, seed: int
) -> None:
    """Good, bad and useless, shy and boastful drafts, cheap and dear."""
    world = World([accept], confidences, lambda rows: draft_s, dearer(row_share), seed=seed)
    world.run(800)
    assert world.seconds <= 1.05 * world.plain_seconds


@pytest.mark.parametrize("seed", range(6))
def test_noisy_clocks_do_not_make_a_useless_draft_look_good(seed: int) -> None:
    world = World([], [0.8, 0.1], verify_s=dearer(0.05), jitter=0.15, seed=seed)
    world.run(800)
    assert world.seconds <= 1.05 * world.plain_seconds


@pytest.mark.parametrize(
    ("first_row", "next_rows"), [(0.0, 0.02), (0.1, 0.02), (0.0, 0.1), (0.1, 0.1), (0.0, 0.2), (0.0, 0.5)]
)
@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.3])
def test_useless_lookups_cost_next_to_nothing_on_noisy_clocks_too(
    first_row: float, next_rows: float, jitter: float
) -> None:
    """Noise can make the price of a row look like nothing; plain passes must then be measured again."""
    ratios = []
    for seed in range(8):
        world = World([], [], verify_s=lambda rows: 1 + first_row * (rows > 1) + next_rows * (rows - 1),
                      ngram=0.57, jitter=jitter, seed=seed)  # fmt: skip
        world.run(1000)
        ratios.append(world.seconds / world.plain_seconds)
    assert max(ratios) <= 1.05


def test_plain_passes_are_measured_again_at_times_but_rarely() -> None:
    world = World([0.7], [0.7], lambda rows: 0.05, dearer(0.02))
    world.run(200)
    plain = 0
    for _ in range(1000):
        tested = world.tested
        world.round()
        plain += world.tested == tested
    assert 5 <= plain <= 25


def test_a_useless_draft_does_not_spoil_good_lookups() -> None:
    world = World([], [0.9], draft_s=lambda rows: 0.5, verify_s=dearer(0.02),
                  ngram=0.8, ngram_accept=0.8)  # fmt: skip
    assert world.run(1000) > 2.5
    assert world.seconds < 0.5 * world.plain_seconds


# -- faster where it can be --------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.95, 1.0])
def test_a_perfect_cheap_draft_is_used(confidence: float) -> None:
    world = World([1.0], [confidence], lambda rows: 0.05, dearer(0.05))
    assert world.run(600) > 6
    assert world.seconds < 0.4 * world.plain_seconds


@pytest.mark.parametrize("accept", [0.7, 0.8, 0.9])
def test_a_step_that_pays_only_with_the_next_is_taken(accept: float) -> None:
    """Seconds of a 1.5B target and its 0.5B draft on two cores: the second row costs much, the third next to
    nothing, so a single draft step hardly ever pays."""
    verify = {1: 72.7, 2: 89.0, 3: 90.0, 4: 99.0, 5: 127.0, 6: 159.0, 8: 190.0, 16: 385.0, 32: 627.0}
    draft = {1: 25.0, 2: 30.0, 4: 34.0, 8: 64.0}

    def seconds(times: dict[int, float]) -> Callable[[int], float]:
        return lambda rows: float(np.interp(rows, list(times), list(times.values()))) / 1000

    shares = [accept, 0.3 * (1 - accept), 0.2 * (1 - accept)]
    world = World(shares, shares, seconds(draft), seconds(verify), jitter=0.02)
    world.run(1500)
    chains = [
        (1 - accept ** (length + 1)) / (1 - accept) / (length * world.draft_s(1) + world.verify_s(length + 1))
        for length in range(8)
    ]
    assert world.tokens / world.seconds >= 0.95 * max(chains)


def stairs(rows: int) -> float:
    """Weights are read again for every five rows (Metal's qmv_wide); from 13 on, tiles of 32 rows."""
    if rows < 13:
        return 1 + 0.45 * ((rows - 1) // 5) + 0.01 * rows
    return 2.2 if rows <= 32 else 4.0


def slope_then_tile(rows: int) -> float:
    """Rows one by one, then tiles of 32 (M1, M2)."""
    return 1 + 0.08 * (rows - 1) if rows < 10 else 2.5 * -(-rows // 32)


@pytest.mark.parametrize("accept", [[0.75, 0.1], [0.6, 0.15, 0.05], [0.5, 0.15, 0.05]])
@pytest.mark.parametrize("verify_s", [stairs, slope_then_tile])
@pytest.mark.parametrize("measured_before", [False, True])
def test_passes_end_before_a_step_of_their_costs(
    verify_s: Callable[[int], float], accept: list[float], measured_before: bool
) -> None:
    """On a GPU passes get dearer in steps. At the edge of one, a draft step that brings better nodes in the place
    of worse ones pays, though one that brought more rows would not. Held against trees of every fixed size."""

    def world(policy: ThroughputPolicy | None = None) -> World:
        made = World(accept, accept, lambda rows: 0.05 + 0.0015 * (rows - 1), verify_s, jitter=0.03)
        made.policy = policy or made.policy
        return made

    own = world()
    if measured_before:  # as `tune` does
        for rows in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 24, 32, 33, 48, 64):
            own.policy.costs.verify.observe(rows, verify_s(rows))
    sizes: list[int] = []
    submit = own.policy.submit
    own.policy.submit = lambda tree: (chosen := submit(tree), sizes.append(len(chosen.tree)))[0]  # type: ignore[method-assign]
    own.run(2000)
    best = 0.0
    for nodes in (2, 3, 4, 5, 6, 8, 10, 12, 16, 32):
        fixed = world(forced(nodes))
        fixed.run(600)
        best = max(best, fixed.tokens / fixed.seconds)
    assert own.tokens / own.seconds >= 0.96 * best
    if verify_s is stairs:  # nearly all end where a step does, and not where one has begun
        assert sum(size in (4, 5, 10, 32) for size in sizes) > 0.95 * len(sizes)


def test_a_draft_that_becomes_useful_is_found_again() -> None:
    world = World([], [0.9], lambda rows: 0.1, dearer(0.05))
    world.run(300)
    world.accept = [0.95]
    world.run(3000)
    assert world.run(500) > 3


@pytest.mark.parametrize("times", [1, 5])
def test_a_price_once_measured_on_a_busy_machine_is_not_believed_for_ever(times: int) -> None:
    world = World([0.95], [0.9], lambda rows: 0.05, dearer(0.05))
    verify = world.policy.costs.verify
    for _ in range(5):
        verify.observe(1, 1.0)
    for _ in range(times):
        verify.observe(2, 4.0)
    world.run(300)
    assert world.run(300) > 3


def test_trees_grow_at_once_to_what_loading_hides() -> None:
    """No doubling from pass to pass where computing more rows would still end before reading."""
    world = World([0.9], [0.9], lambda rows: 0.05, lambda rows: 0.1 + 0.01 * rows, load_s=10.0)
    world.run(1)
    assert world.policy.costs.verify.hidden_rows > 64
    world.round()
    assert world.tested > 25
    world.run(1000)
    assert world.seconds < 0.2 * world.plain_seconds
    assert world.policy._schedule._since_plain > 50  # a plain pass is not measured again: it takes what all take


def test_trees_stay_small_where_loading_hides_few_rows() -> None:
    world = World([0.9], [0.9], lambda rows: 0.05, lambda rows: float(rows), load_s=3.0)
    world.run(600)
    assert world.tested / world.passes < 6
    assert world.seconds < 0.5 * world.plain_seconds


def test_a_draft_that_becomes_useless_is_given_up() -> None:
    world = World([0.95], [0.9], lambda rows: 0.2, dearer(0.05))
    assert world.run(500) > 3
    world.accept = []
    world.run(200)  # time to notice
    seconds = world.seconds
    world.run(600)
    assert world.seconds - seconds <= 1.05 * 600


# -- growth ------------------------------------------------------------------------------------------------


def confidences_below(path: Sequence[int], branching: int, seed: int) -> list[float]:
    """Confidences of the children of a path: fixed, all different, adding up to less than 1; best first."""
    random = np.random.default_rng([seed, *path])
    return sorted(random.dirichlet(np.full(branching + 1, 0.5))[:branching].tolist(), reverse=True)


def true_best(num_nodes: int, branching: int, seed: int) -> dict[tuple[int, ...], float]:
    """The `num_nodes` most likely paths of the unbounded tree, the root among them, by plain best-first search.

    No path is more likely than its parent, so what has been taken when `num_nodes` are is the best.
    """
    best: dict[tuple[int, ...], float] = {}
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    while heap and len(best) < num_nodes:
        negative, path = heapq.heappop(heap)
        best[path] = -negative
        for token, confidence in enumerate(confidences_below(path, branching, seed), 1):
            if confidence >= 1e-3:  # less likely children are not worth a place
                heapq.heappush(heap, (negative * confidence, (*path, token)))
    return best


def grow(policy: ThroughputPolicy, propose: Propose) -> tuple[TokenTree, list[list[int]]]:
    """One round's growth; the tree and the batches of leaves that were expanded."""
    tree = TokenTree(0)
    policy.begin(tree)
    batches = []
    while leaves := list(policy.next_leaves(tree, MODEL)):
        batches.append(leaves)
        for leaf in leaves:
            policy.add(tree, leaf, propose(tree.path_tokens(leaf)))
        assert len(batches) < 1000
    check_integrity(tree)
    return tree, batches


@settings(max_examples=60, deadline=None)
@given(
    num_nodes=st.integers(1, 70), branching=st.integers(1, 8), width=st.integers(1, 9), seed=st.integers(0, 10_000)
)
def test_forced_nodes_are_the_best_of_the_whole_tree(
    num_nodes: int, branching: int, width: int, seed: int
) -> None:
    policy = ThroughputPolicy(CostModel(), Calibration(), tree_nodes=num_nodes)
    policy.max_width = width
    tree, batches = grow(policy, lambda path: _candidates(path, branching, seed))
    selection = policy.submit(tree)
    selected = {tuple(selection.tree.path_tokens(n)): c for n, c in enumerate(selection.tree.cumulative)}
    best = true_best(num_nodes, branching, seed)
    assert selected == pytest.approx(best)
    expanded = [leaf for batch in batches for leaf in batch]
    assert len(set(expanded)) == len(expanded)  # none twice
    assert all(len(batch) <= width for batch in batches)
    # Where one leaf is expanded at a time, no step is wasted: each expanded node is among the best.
    if width == 1:
        assert {tuple(tree.path_tokens(leaf)) for leaf in expanded} <= set(best)


def _candidates(path: Sequence[int], branching: int, seed: int) -> Candidates:
    confidences = confidences_below(path, branching, seed)
    return Candidates(list(range(1, branching + 1)), confidences)


def test_growth_is_bounded_even_when_the_draft_is_certain() -> None:
    """A softmax of exactly 1.0 is common in repetitive text; more than `max_nodes` cannot be submitted."""
    costs = measured({1: 1.0, 8: 1.1, 64: 2.0}, {1: 0.05, 8: 0.06})
    policy = ThroughputPolicy(costs, Calibration(), max_nodes=20)
    tree, _ = grow(policy, lambda path: Candidates([1], [1.0]))
    assert len(policy.submit(tree).tree) <= 20
    assert len(tree) < 200


# -- what is submitted -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 40),
    times=st.lists(st.floats(0.0, 2.0), min_size=4, max_size=4),
    rate=st.floats(0.1, 10.0),
)
def test_as_many_nodes_are_submitted_as_gain_most(seed: int, size: int, times: list[float], rate: float) -> None:
    """Against trying every number of nodes, with a target pass that gets dearer in steps."""
    took = np.cumsum([1.0, *times])
    every = np.interp(range(1, 65), (1, 2, 8, 16, 64), took).tolist()
    costs = CostModel()
    for _ in range(8):  # so often that no size needs another trial
        for rows, seconds in enumerate(every, 1):
            costs.verify.observe(rows, seconds)
    policy = ThroughputPolicy(costs, Calibration())
    policy._prices.observe_round(1, 1 / rate)
    policy._draft_account.balance = 0.0  # nothing to spend on a trial
    random = np.random.default_rng(seed)
    tree = TokenTree(0)
    for token in range(1, size):
        tree.add(int(random.integers(0, len(tree))), token, float(random.random()))
    policy.begin(tree)
    ranked = sorted(tree.cumulative, reverse=True)
    worth_a_row = sum(probability >= 0.01 for probability in ranked)
    values = [sum(ranked[:n]) - policy._prices.rate * costs.verify.predict(n) for n in range(1, worth_a_row + 1)]
    submitted = policy.submit(tree).tree
    promised = sum(ranked[: values.index(max(values)) + 1]) - 1.0
    if promised < 0.05 or max(values) - values[0] < 0.12:
        assert len(submitted) == 1  # too little to gain, with or without the prices
        return
    assert values[len(submitted) - 1] == pytest.approx(max(values), abs=1e-6)
    assert sorted(submitted.cumulative, reverse=True) == pytest.approx(ranked[: len(submitted)])


def test_lookups_not_worth_a_row_are_left_out_but_learned_from() -> None:
    """The target's choice judges them all the same, so a lookup that becomes good is noticed for nothing."""
    world = World([], [], verify_s=dearer(0.8), ngram=0.4, ngram_accept=1.0)
    for rows in (1, 2) * 3:
        world.policy.costs.verify.observe(rows, world.verify_s(rows))
    world.run(2)
    assert world.tested == 0
    assert world.policy.calibration.probabilities([0.4], NGRAM)[0] > 0.4
    world.run(200)
    assert world.tested > 50  # it has turned out to be worth its row


def test_lookups_that_turn_wrong_cost_a_new_text_little() -> None:
    """Though what they said was nearly always right before, and still counts for more than what it costs."""
    world = World([], [], lambda rows: 9.0, dearer(0.2), ngram=0.8, ngram_accept=0.9)
    assert world.run(500) > 1.5
    world.ngram_accept = 0.0
    world.tokens += 1000  # another text
    passes, seconds = world.passes, world.seconds
    for _ in range(30):
        world.round()
    lost = world.seconds - seconds - (world.passes - passes)
    assert lost <= 0.01 * 30
    assert world.policy.calibration.probabilities([0.8], NGRAM)[0] > 0.5


def test_right_lookups_earn_dear_rows() -> None:
    """A row that costs more than a text's first balance is paid for once lookups were right without it."""
    world = World([], [], lambda rows: 9.0, dearer(0.6), ngram=0.95, ngram_accept=0.98)
    for _ in range(3):
        world.policy.costs.verify.observe(2, 1.6)
    world.run(200)
    world.tokens += 1000
    tested, passes = world.tested, world.passes
    world.round()
    assert world.tested == tested
    while world.passes < passes + 20:
        world.round()
    assert world.tested - tested >= 12


# -- while the target waits --------------------------------------------------------------------------------


def submitted_tree(policy: ThroughputPolicy) -> TokenTree:
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
