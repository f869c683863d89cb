"""The acceptance walk: the target chooses every token, the tree only says how far one pass reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmcad_mlx.tree.token_tree import ROOT, TokenTree


@dataclass(frozen=True, slots=True)
class Walk:
    """What one target pass decided.

    `nodes`: accepted nodes top down, the root excluded.
    `tokens`: every emitted token: the accepted nodes' tokens, then the bonus token. There is no bonus
    token when `stop` ended the walk on a drafted child: the stop token is then the last of `nodes`.
    `last`: the node where the walk ended, 0 when nothing was accepted.
    `num_accepted`: len(nodes).
    `path_tested`: drafted tokens the walk could have accepted, the denominator of the acceptance rate:
    `num_accepted`, plus 1 if the target chose at `last` a token that none of its children holds.
    `stopped`: whether `stop` ended the walk.
    """

    nodes: Sequence[int]
    tokens: Sequence[int]
    last: int
    num_accepted: int
    path_tested: int
    stopped: bool

    @property
    def visited(self) -> Sequence[int]:
        """Nodes at which the target chose: `visited[i]` is where `tokens[i]` was chosen."""
        return [ROOT, *self.nodes][: len(self.tokens)]

    @property
    def refused(self) -> bool:
        """Whether drafted children were tested at the last visited node and none was right."""
        return self.path_tested > self.num_accepted


def walk(
    tree: TokenTree,
    choose: Callable[[int, Sequence[int]], int],
    stop: Callable[[int], bool] | None = None,
) -> Walk:
    """Follow the target's own choices down the tree (target-sampled verification, lossless for any tree).

    `choose(node, path_tokens)` returns the target's token after `node`, where `path_tokens` are the tokens
    from the root's child down to `node`: exactly what plain decoding would have emitted by then. It is
    called once per visited node, in order, and must neither keep nor change `path_tokens`.

    `stop(token)` is called once for each emitted token, in order; after the first true answer nothing more is
    emitted. The stop token itself is emitted; if it is a drafted child it is accepted and in `nodes`.
    """
    node = ROOT
    nodes: list[int] = []
    tokens: list[int] = []
    while True:
        token = choose(node, tokens)
        tokens.append(token)
        stopped = stop is not None and stop(token)
        child = tree.child(node, token)
        if child is None:
            missed = tree.has_children(node)
            return Walk(nodes, tokens, node, len(nodes), len(nodes) + missed, stopped)
        nodes.append(child)
        node = child
        if stopped:
            return Walk(nodes, tokens, node, len(nodes), len(nodes), True)
