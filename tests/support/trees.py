"""Checks of token trees, and costs to grow them by."""

from __future__ import annotations

from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.tree.token_tree import NO_PARENT, ROOT, TokenTree


def check_integrity(tree: TokenTree) -> None:
    """The fields of all nodes agree with each other."""
    nodes = range(1, len(tree))
    columns = (tree.tokens, tree.depths, tree.confidences, tree.raw_confidences, tree.cumulative, tree.sources)
    assert {len(column) for column in columns} == {len(tree.parents)}
    assert (tree.parents[ROOT], tree.depths[ROOT], tree.cumulative[ROOT]) == (NO_PARENT, 0, 1.0)
    for node in nodes:
        parent = tree.parents[node]
        assert 0 <= parent < node
        assert tree.depths[node] == tree.depths[parent] + 1
        assert tree.child(parent, tree.tokens[node]) == node
        assert tree.cumulative[node] == tree.cumulative[parent] * tree.confidences[node]
    assert sorted(child for node in range(len(tree)) for child in tree.children(node)) == list(nodes)


def measured(passes: dict[int, float], steps: dict[int, float] | None = None) -> CostModel:
    """Passes and draft steps of so many rows took so many seconds, once."""
    costs = CostModel()
    for times, observed in ((costs.verify, passes), (costs.draft, steps or {})):
        for rows, seconds in observed.items():
            times.observe(rows, seconds)
    return costs
