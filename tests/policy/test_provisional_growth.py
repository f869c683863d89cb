"""Which nodes policies draft below while the target waits, and what they remember of it in the next round."""

from __future__ import annotations

from llmcad_mlx.policy import Candidates, GrowthPolicy
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.tree.token_tree import MODEL, NGRAM, ROOT, TokenTree
from llmcad_mlx.tree.walk import walk
from tests.support.rounds import forced


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
