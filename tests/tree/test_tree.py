"""The token tree: building, selecting, re-rooting; the walk over it: lossless for any tree, and its counts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx.tree.token_tree import DROPPED, MODEL, NGRAM, ROOT, TokenTree
from llmcad_mlx.tree.walk import Walk, walk
from tests.support.trees import check_integrity

# Few distinct values, so that ties, certainties and zeros are common.
CONFIDENCES = st.sampled_from([0.0, 1e-9, 0.25, 0.5, 0.5, 0.9, 1.0, 1.0])


@st.composite
def trees(draw: st.DrawFn, num_tokens: int = 6, max_adds: int = 12) -> TokenTree:
    tree = TokenTree(draw(st.integers(0, 9)), draw(st.integers(0, 100)))
    for _ in range(draw(st.integers(0, max_adds))):
        parent = draw(st.integers(0, len(tree) - 1))
        tree.add(
            parent, draw(st.integers(0, num_tokens - 1)), draw(CONFIDENCES), draw(st.sampled_from([MODEL, NGRAM]))
        )
    return tree


def is_prefix_closed(tree: TokenTree, nodes: set[int]) -> bool:
    return ROOT in nodes and all(node == ROOT or tree.parents[node] in nodes for node in nodes)


def node_facts(tree: TokenTree, node: int) -> tuple[object, ...]:
    return (
        tree.tokens[node],
        tree.confidences[node],
        tree.raw_confidences[node],
        tree.sources[node],
        tree.position(node),
    )


def test_small_tree_on_paper() -> None:
    tree = TokenTree(0, root_position=10)
    a = tree.add(ROOT, 5, 0.5)
    b = tree.add(a, 6, 0.5, NGRAM, raw=0.8)
    c = tree.add(ROOT, 7, 0.25)
    assert (a, b, c) == (1, 2, 3)
    assert tree.cumulative == [1.0, 0.5, 0.25, 0.25]
    assert tree.depths == [0, 1, 2, 1]
    assert tree.raw_confidences == [1.0, 0.5, 0.8, 0.25]
    assert tree.sources[b] == NGRAM
    assert tree.child(ROOT, 7) == c
    assert tree.child(ROOT, 6) is None
    assert list(tree.children(ROOT)) == [a, c]
    assert tree.leaves() == [b, c]
    assert (tree.path(b), tree.path_tokens(b)) == ([a, b], [5, 6])
    assert (tree.position(ROOT), tree.position(b)) == (10, 12)
    assert tree.path(ROOT) == []


def test_adding_a_known_child_keeps_the_larger_confidence() -> None:
    tree = TokenTree(0)
    a = tree.add(ROOT, 5, 0.5, MODEL)
    b = tree.add(a, 6, 0.5)
    c = tree.add(b, 7, 0.5)
    assert tree.add(ROOT, 5, 0.25, NGRAM) == a
    assert (tree.confidences[a], tree.sources[a]) == (0.5, MODEL)
    assert tree.add(ROOT, 5, 1.0, NGRAM, raw=0.7) == a
    assert (tree.confidences[a], tree.sources[a], tree.raw_confidences[a]) == (1.0, NGRAM, 0.7)
    assert [tree.cumulative[node] for node in (a, b, c)] == [1.0, 0.5, 0.25]
    assert len(tree) == 4


@pytest.mark.parametrize("confidence", [-0.1, 1.0000001, float("nan"), float("inf")])
def test_confidence_that_is_no_probability_is_refused(confidence: float) -> None:
    tree = TokenTree(0)
    with pytest.raises(ValueError, match="confidence of token 5"):
        tree.add(ROOT, 5, confidence)
    assert len(tree) == 1


@pytest.mark.parametrize("parent", [-1, 1])
def test_unknown_parent_is_refused(parent: int) -> None:
    with pytest.raises(IndexError, match="is not in a tree of 1 nodes"):
        TokenTree(0).add(parent, 5, 0.5)


@given(trees(max_adds=30))
def test_fields_agree_however_nodes_were_added(tree: TokenTree) -> None:
    check_integrity(tree)


@given(trees(max_adds=9), st.integers(1, 10))
def test_select_is_prefix_closed_and_optimal(tree: TokenTree, num_nodes: int) -> None:
    selection = tree.select(num_nodes)
    kept = set(selection.new_to_old)
    size = min(num_nodes, len(tree))
    assert len(kept) == len(selection.tree) == size
    assert is_prefix_closed(tree, kept)
    best = max(
        sum(tree.cumulative[node] for node in nodes)
        for nodes in combinations(range(len(tree)), size)
        if is_prefix_closed(tree, set(nodes))
    )
    assert sum(tree.cumulative[node] for node in kept) == pytest.approx(best, abs=1e-12)


@given(trees(max_adds=30), st.integers(1, 31))
def test_select_keeps_nodes_and_order(tree: TokenTree, num_nodes: int) -> None:
    selection = tree.select(num_nodes)
    new = selection.tree
    check_integrity(new)
    assert list(selection.new_to_old) == sorted(selection.new_to_old)
    for old, index in enumerate(selection.old_to_new):
        assert (index == DROPPED) == (old not in selection.new_to_old)
    for index, old in enumerate(selection.new_to_old):
        assert selection.old_to_new[old] == index
        assert node_facts(new, index) == node_facts(tree, old)
        assert new.path_tokens(index) == tree.path_tokens(old)
        assert new.cumulative[index] == tree.cumulative[old]


def test_select_without_the_root_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot select 0 nodes"):
        TokenTree(0).select(0)


def test_selection_is_a_copy() -> None:
    tree = TokenTree(0)
    tree.add(ROOT, 5, 0.5)
    copy = tree.select(2).tree
    copy.add(ROOT, 6, 0.5)
    assert (len(tree), len(copy)) == (2, 3)


@given(trees(max_adds=30), st.data())
def test_reroot_is_the_subtree(tree: TokenTree, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, len(tree) - 1))
    selection = tree.reroot(root)
    new = selection.tree
    check_integrity(new)
    inside = [node for node in range(len(tree)) if node == root or root in tree.path(node) or root == ROOT]
    assert list(selection.new_to_old) == inside
    assert new.root_position == tree.position(root)
    assert new.cumulative[ROOT] == 1.0
    for index, old in enumerate(selection.new_to_old):
        assert selection.old_to_new[old] == index
        assert tree.path_tokens(old) == tree.path_tokens(root) + new.path_tokens(index)
        assert new.position(index) == tree.position(old)
        if index != ROOT:
            assert node_facts(new, index) == node_facts(tree, old)
    assert sum(index != DROPPED for index in selection.old_to_new) == len(inside)


# -- the walk ----------------------------------------------------------------------------------------------

VOCABULARY = 3  # small, so that random trees often guess right

Target = Callable[[Sequence[int]], int]


def random_target(seed: int) -> Target:
    """A deterministic 'model': the next token depends on everything before it."""
    return lambda tokens: zlib.crc32(repr((seed, list(tokens))).encode()) % VOCABULARY


def walk_with(tree: TokenTree, target: Target, history: Sequence[int], **kwargs: object) -> Walk:
    def choose(node: int, path_tokens: Sequence[int]) -> int:
        assert list(path_tokens) == tree.path_tokens(node)
        return target([*history, *path_tokens])

    return walk(tree, choose, **kwargs)  # type: ignore[arg-type]


@given(st.integers(0, 1000), st.data())
def test_any_trees_give_plain_decoding(seed: int, data: st.DataObject) -> None:
    target = random_target(seed)
    length = 20
    plain = [0]
    while len(plain) < length:
        plain.append(target(plain))
    speculative = [0]
    while len(speculative) < length:
        tree = data.draw(trees(VOCABULARY))
        speculative += walk_with(tree, target, speculative).tokens
    assert speculative[:length] == plain


@given(st.integers(0, 1000), st.integers(0, 12))
def test_a_perfect_draft_is_accepted_whole(seed: int, depth: int) -> None:
    target = random_target(seed)
    tree = TokenTree(0)
    node, tokens = ROOT, [0]
    for _ in range(depth):
        tokens.append(target(tokens))
        tree.add(node, (tokens[-1] + 1) % VOCABULARY, 0.9)
        node = tree.add(node, tokens[-1], 0.1)
    result = walk_with(tree, target, [0])
    assert result.num_accepted == result.path_tested == depth
    assert list(result.tokens) == [*tokens[1:], target(tokens)]
    assert not result.refused


@given(st.integers(0, 1000), st.data())
def test_counts(seed: int, data: st.DataObject) -> None:
    tree = data.draw(trees(VOCABULARY))
    stop_token = data.draw(st.none() | st.integers(0, VOCABULARY - 1))
    stop = None if stop_token is None else (lambda token: token == stop_token)
    result = walk_with(tree, random_target(seed), [0], stop=stop)
    assert result.num_accepted == len(result.nodes)
    assert list(result.nodes) == tree.path(result.last)
    assert list(result.tokens[: result.num_accepted]) == tree.path_tokens(result.last)
    assert len(result.visited) == len(result.tokens)
    assert result.stopped == (result.tokens[-1] == stop_token)
    assert stop_token not in result.tokens[:-1]
    tested = sum(tree.has_children(node) for node in result.visited)
    assert result.path_tested == tested


@pytest.mark.parametrize(
    ("drafted", "says", "stop", "expected", "visited"),
    [
        ([], [9], None, Walk([], [9], ROOT, 0, 0, False), [ROOT]),  # plain decoding
        ([1, 2, 3], [1, 2, 8], None, Walk([1, 2], [1, 2, 8], 2, 2, 3, False), [ROOT, 1, 2]),
        # A stop at a drafted child counts it, and there is no token of the target's own.
        ([1, 2, 3], [1, 2, 3], 2, Walk([1, 2], [1, 2], 2, 2, 2, True), [ROOT, 1]),
        ([1, 2], [1, 7], 7, Walk([1], [1, 7], 1, 1, 2, True), [ROOT, 1]),
    ],
)
def test_walks_of_chains_on_paper(
    drafted: list[int], says: list[int], stop: int | None, expected: Walk, visited: list[int]
) -> None:
    tree, node = TokenTree(0), ROOT
    for token in drafted:
        node = tree.add(node, token, 0.5)
    result = walk(tree, lambda node, path: says[len(path)], stop=lambda token: token == stop)
    assert (result, list(result.visited)) == (expected, visited)
    assert result.refused == (drafted != [] and says[-1] not in drafted)
