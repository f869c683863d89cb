"""LLMCad's policy with numbers worked out on paper."""

from __future__ import annotations

import pytest

from llmcad_mlx.policy import Candidates, GrowthPolicy
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.tree.token_tree import MODEL, ROOT, TokenTree
from llmcad_mlx.tree.walk import Walk

Table = dict[tuple[int, ...], Candidates]


def grow(policy: GrowthPolicy, tree: TokenTree, table: Table) -> list[int]:
    """Let a drafter whose candidates come from a table by path do its part. Returns expanded leaves."""
    policy.begin(tree)
    expanded = []
    while leaves := policy.next_leaves(tree, MODEL):
        for leaf in leaves:
            expanded.append(leaf)
            policy.add(tree, leaf, table.get(tuple(tree.path_tokens(leaf)), Candidates([], [])))
    return expanded


def chain(length: int) -> TokenTree:
    tree = TokenTree(0)
    node = ROOT
    for token in range(1, length + 1):
        node = tree.add(node, token, 0.9)
    return tree


def walk_along(tree: TokenTree, nodes: list[int], stopped: bool = False) -> Walk:
    last = nodes[-1] if nodes else ROOT
    missed = tree.has_children(last) and not stopped
    tokens = [tree.tokens[node] for node in nodes]
    return Walk(nodes, tokens if stopped else [*tokens, 99], last, len(nodes), len(nodes) + missed, stopped)


def test_branch_scheduling_on_paper() -> None:
    table = {
        # root: 1 continues; 2 is above 0.3 and opens a branch; 3 is not and is dropped.
        (): Candidates([1, 2, 3], [0.5, 0.4, 0.1]),
        # M = 2, C = (0.5, 0.4): deficits 2·5/9 − 1 = 0.11 and 2·4/9 − 1 = −0.11: branch 1.
        (1,): Candidates([4, 5], [0.8, 0.2]),
        # M = 3, C = (0.4, 0.4), T = (2, 1): deficits −0.5 and 0.5: branch 2.
        (2,): Candidates([6], [0.5]),
        # M = 4, C = (0.4, 0.2), T = (2, 2): deficits 4·2/3 − 2 = 0.67 and 4·1/3 − 2 = −0.67: branch 1.
        (1, 4): Candidates([7], [0.1]),
        # M = 5, C = (0.04, 0.2), T = (3, 2): deficits −2.17 and 2.17: branch 2.
        (2, 6): Candidates([8], [0.04]),
        # C = (0.04, 0.008), T = (3, 3): branch 1 again, after which max C = 0.004 < alpha = 0.01.
        (1, 4, 7): Candidates([9], [0.1]),
    }
    policy = PaperPolicy()
    tree = TokenTree(0)
    assert grow(policy, tree, table) == [0, 1, 2, 3, 4, 5]
    assert tree.tokens == [0, 1, 2, 4, 6, 7, 8, 9]
    assert tree.parents == [-1, 0, 0, 1, 2, 3, 4, 5]
    assert max(tree.cumulative[leaf] for leaf in tree.leaves()) == pytest.approx(0.008)
    selection = policy.submit(tree)
    assert selection.tree.tokens == tree.tokens


def test_best_candidate_continues_below_the_threshold_and_the_threshold_is_exclusive() -> None:
    policy = PaperPolicy(max_nodes=3)
    tree = TokenTree(0)
    grow(policy, tree, {(): Candidates([1, 2], [0.2, 0.1]), (1,): Candidates([3], [0.9])})
    assert tree.tokens == [0, 1, 3]
    tree = TokenTree(0)
    grow(policy, tree, {(): Candidates([1, 2], [0.7, 0.3])})
    assert tree.tokens == [0, 1]


@pytest.mark.parametrize(
    ("alpha", "confidences", "tokens"),
    [
        (0.3, [0.6] * 9, [0, 1, 1, 1]),  # 0.6 → 0.36 → 0.216 < 0.3: three expansions, then the target
        (1.0, [0.9, 0.9], [0, 1]),  # one token is drafted all the same
        (0.01, [], [0]),  # a drafter with nothing to say
        (0.0, [0.0, 0.5], [0, 1]),  # candidates without confidence
    ],
)
def test_falls_back_when_no_branch_is_above_alpha(
    alpha: float, confidences: list[float], tokens: list[int]
) -> None:
    policy, tree = PaperPolicy(), TokenTree(0)
    policy.alpha = alpha
    table = {(1,) * depth: Candidates([1], [confidence]) for depth, confidence in enumerate(confidences)}
    assert grow(policy, tree, table)[0] == ROOT
    assert tree.tokens == tokens


def test_alpha_update_is_the_printed_formula() -> None:
    policy = PaperPolicy()
    tree = TokenTree(0)
    policy.verified(tree, walk_along(tree, []))
    assert policy.alpha == 0.01  # nothing was drafted
    tree = chain(4)
    policy.verified(tree, walk_along(tree, [1, 2, 3, 4]))
    assert policy.alpha == 0.005
    policy.verified(tree, walk_along(tree, [1, 2], stopped=True))
    assert policy.alpha == 0.0025  # what the stop cut off was not wrong
    policy.verified(tree, walk_along(tree, [1]))
    assert policy.alpha == 0.75  # 3 of 4 wrong
    policy.verified(tree, walk_along(tree, []))
    assert policy.alpha == 1.0
    policy.verified(tree, walk_along(tree, [1, 2, 3]))
    assert policy.alpha == 0.25


def test_alpha_counts_the_branch_the_target_followed() -> None:
    tree = TokenTree(0)
    a = tree.add(ROOT, 1, 0.9)
    worse = tree.add(a, 2, 0.3)
    for token in (5, 6, 7):
        worse = tree.add(worse, token, 0.9)
    tree.add(a, 3, 0.6)
    policy = PaperPolicy()
    policy.verified(tree, walk_along(tree, [a]))
    assert policy.alpha == 0.5  # below node a the branch goes on with token 3: 1 of 2 wrong


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
    policy.max_nodes = 6
    assert [survivors.tree.path_tokens(leaf) for leaf in policy.next_leaves(survivors.tree, MODEL)] == [[7] * 4]
