"""The acceptance walk: lossless for any tree, and its counts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx.tree.token_tree import ROOT, TokenTree
from llmcad_mlx.tree.walk import Walk, walk

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


def random_tree(draw: st.DrawFn, root_token: int) -> TokenTree:
    tree = TokenTree(root_token)
    for _ in range(draw(st.integers(0, 12))):
        tree.add(draw(st.integers(0, len(tree) - 1)), draw(st.integers(0, VOCABULARY - 1)), 0.5)
    return tree


@given(st.integers(0, 1000), st.data())
def test_any_trees_give_plain_decoding(seed: int, data: st.DataObject) -> None:
    target = random_target(seed)
    length = 20
    plain = [0]
    while len(plain) < length:
        plain.append(target(plain))
    speculative = [0]
    while len(speculative) < length:
        tree = random_tree(data.draw, speculative[-1])
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
    tree = random_tree(data.draw, 0)
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


def chain(*tokens: int) -> TokenTree:
    tree = TokenTree(0)
    node = ROOT
    for token in tokens:
        node = tree.add(node, token, 0.5)
    return tree


def test_lone_root_is_plain_decoding() -> None:
    result = walk(TokenTree(0), lambda node, path: 9)
    assert result == Walk([], [9], ROOT, 0, 0, False)


def test_partly_right_chain() -> None:
    result = walk(chain(1, 2, 3), lambda node, path: [1, 2, 8, 9][len(path)])
    assert result == Walk([1, 2], [1, 2, 8], 2, 2, 3, False)
    assert list(result.visited) == [ROOT, 1, 2]
    assert result.refused


def test_stop_on_a_drafted_child_counts_it_and_gives_no_bonus() -> None:
    result = walk(chain(1, 2, 3), lambda node, path: len(path) + 1, stop=lambda token: token == 2)
    assert result == Walk([1, 2], [1, 2], 2, 2, 2, True)
    assert list(result.visited) == [ROOT, 1]


def test_stop_on_a_token_that_was_not_drafted() -> None:
    result = walk(chain(1, 2), lambda node, path: [1, 7][len(path)], stop=lambda token: token == 7)
    assert result == Walk([1], [1, 7], 1, 1, 2, True)
