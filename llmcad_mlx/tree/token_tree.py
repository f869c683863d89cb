"""The token tree: what the draft proposes and the target checks.

Node 0, the root, is the last committed token. Every other node is a drafted token with one parent,
and parents always have smaller indices than their children. The tree holds plain Python numbers:
a round handles tens of nodes, where lists are faster than arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROOT = 0
NO_PARENT = -1
DROPPED = -1

COMMITTED = "committed"
MODEL = "model"
NGRAM = "ngram"
TABLE = "table"


class TokenTree:
    """A growing tree of drafted tokens below the last committed one.

    Per-node lists, indexed by node and meant to be read only; `add` is the one way to write them:
    `tokens`, `parents` (root: -1), `depths` (root: 0), `confidences` (acceptance probability given the
    parent, root: 1.0), `raw_confidences` (what the drafter said before calibration), `cumulative` (the
    product of `confidences` along the branch), `sources` (who drafted it: "model", "ngram", "table";
    root: "committed").
    """

    def __init__(self, root_token: int, root_position: int = 0) -> None:
        """`root_position` is the root token's index in the whole sequence."""
        self.root_position = root_position
        self.tokens: list[int] = [root_token]
        self.parents: list[int] = [NO_PARENT]
        self.depths: list[int] = [0]
        self.confidences: list[float] = [1.0]
        self.raw_confidences: list[float] = [1.0]
        self.cumulative: list[float] = [1.0]
        self.sources: list[str] = [COMMITTED]
        self._children: list[dict[int, int]] = [{}]  # token → node, in order of creation

    def __len__(self) -> int:
        return len(self.tokens)

    def add(
        self, parent: int, token: int, confidence: float, source: str = MODEL, raw: float | None = None
    ) -> int:
        """Add `token` below `parent` and return its node.

        `confidence` is the probability in [0, 1] that the target accepts the token given its parent;
        `raw` is the drafter's own figure where calibration changed it. If `parent` already has a child
        with this token, that node is returned; a larger confidence replaces the smaller one, with its
        raw figure and source, all the way down to the descendants' cumulative confidences.

        Raises ValueError for a confidence outside [0, 1] or NaN, IndexError for an unknown parent.
        """
        if not 0.0 <= confidence <= 1.0:
            raise ValueError(f"confidence of token {token} is {confidence}; it must be in [0, 1]")
        if not 0 <= parent < len(self.tokens):
            raise IndexError(f"node {parent} is not in a tree of {len(self.tokens)} nodes")
        siblings = self._children[parent]
        node = siblings.get(token)
        raw = confidence if raw is None else raw
        if node is not None:
            if confidence > self.confidences[node]:
                self.confidences[node] = confidence
                self.raw_confidences[node] = raw
                self.sources[node] = source
                pending = [node]
                while pending:
                    below = pending.pop()
                    self.cumulative[below] = self.cumulative[self.parents[below]] * self.confidences[below]
                    pending.extend(self._children[below].values())
            return node
        node = len(self.tokens)
        siblings[token] = node
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.confidences.append(confidence)
        self.raw_confidences.append(raw)
        self.cumulative.append(self.cumulative[parent] * confidence)
        self.sources.append(source)
        self._children.append({})
        return node

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that holds `token`, or None."""
        return self._children[node].get(token)

    def children(self, node: int) -> Sequence[int]:
        """Children of `node` in order of creation."""
        return list(self._children[node].values())

    def has_children(self, node: int) -> bool:
        return bool(self._children[node])

    def position(self, node: int) -> int:
        """Index of the node's token in the whole sequence; siblings share it."""
        return self.root_position + self.depths[node]

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to `node`, the root excluded; [] for the root."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def path_tokens(self, node: int) -> list[int]:
        """Tokens of `path(node)`."""
        return [self.tokens[ancestor] for ancestor in self.path(node)]

    def leaves(self) -> list[int]:
        """Nodes without children, in order of creation; the root when it is alone."""
        return [node for node, children in enumerate(self._children) if not children]

    def best_branch(self) -> list[int]:
        """The branch with the largest summed cumulative confidence, root included, top down."""
        total = list(self.cumulative)
        for node in range(1, len(total)):
            total[node] += total[self.parents[node]]
        return [ROOT, *self.path(max(range(len(total)), key=total.__getitem__))]

    def select(self, num_nodes: int) -> Selection:
        """The `num_nodes` nodes with the highest cumulative confidence (all, if there are fewer).

        A child's cumulative confidence is at most its parent's and its index is larger, so ordering by
        (confidence down, index up) never takes a child before its parent: the set is prefix closed even
        among ties, and no other prefix-closed set of that size has a larger sum. Kept nodes stay in order
        of creation. Raises ValueError when `num_nodes` < 1: the root always stays.
        """
        if num_nodes < 1:
            raise ValueError(f"cannot select {num_nodes} nodes; the root alone is 1")
        size = len(self.tokens)
        if num_nodes == 1:
            return self.keep([ROOT])
        if num_nodes >= size:
            return self.keep(list(range(size)))
        cumulative = self.cumulative
        by_confidence = sorted(range(size), key=lambda node: -cumulative[node])  # sort is stable
        return self.keep(sorted(by_confidence[:num_nodes]))

    def reroot(self, node: int) -> Selection:
        """The subtree below `node` as a tree of its own, with `node` as its root.

        Depths shift, `root_position` moves to the node's position and cumulative confidences are
        multiplied anew from the node down. Order of creation is kept.
        """
        inside = [False] * len(self.tokens)
        inside[node] = True
        kept = [node]
        for descendant in range(node + 1, len(self.tokens)):
            if inside[self.parents[descendant]]:
                inside[descendant] = True
                kept.append(descendant)
        return self.keep(kept)

    def keep(self, nodes: Sequence[int]) -> Selection:
        """A tree of `nodes` alone: ascending, from the new root on; all others' parents must be among them."""
        root = nodes[0]
        tree = TokenTree(self.tokens[root], self.root_position + self.depths[root])
        old_to_new = [DROPPED] * len(self.tokens)
        old_to_new[root] = ROOT
        for node in nodes[1:]:
            old_to_new[node] = tree.add(
                old_to_new[self.parents[node]],
                self.tokens[node],
                self.confidences[node],
                self.sources[node],
                self.raw_confidences[node],
            )
        return Selection(tree, old_to_new, nodes)


@dataclass(frozen=True, slots=True)
class Selection:
    """Part of a tree as a tree of its own, with the nodes' old and new indices.

    `old_to_new` has one entry per old node, -1 where the node was dropped; `new_to_old` has one per node
    of `tree`, ascending.
    """

    tree: TokenTree
    old_to_new: Sequence[int]
    new_to_old: Sequence[int]
