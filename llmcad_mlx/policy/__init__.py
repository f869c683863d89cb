"""How a tree is grown: the interface between the engine's round and a growth policy, and the simplest policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmcad_mlx.tree.token_tree import MODEL, Selection, TokenTree
from llmcad_mlx.tree.walk import Walk


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a drafter proposes below one leaf, best first.

    `tokens` (k,) are token ids, `confidences` (k,) the drafter's raw probabilities in [0, 1]: Python
    numbers (`tolist()` of an array), k may be 0. `source` names the drafter.
    """

    tokens: Sequence[int]
    confidences: Sequence[float]
    source: str = MODEL


class GrowthPolicy:
    """Decides which leaves the draft expands, when to fall back to the target, and what it is given.

    One round:

        policy.begin(tree)
        for drafter in drafters:
            while leaves := policy.next_leaves(tree, drafter.source):
                for leaf, candidates in zip(leaves, drafter.expand(tree, leaves)):
                    policy.add(tree, leaf, candidates)
        selection = policy.submit(tree)
        …the target verifies selection.tree; while it waits for its weights, drafters go on below `tree`:
            leaves = policy.provisional_leaves(tree, drafter.source, width), then expand and add as above…
        policy.verified(selection.tree, walk)
        policy.finished(len(walk.tokens), seconds)

    A policy keeps what it learns from round to round, so one policy serves one session at a time.
    """

    pipelined: bool
    """Whether drafters work while the target waits for weights, and nodes that survive a round are used."""

    def wants(self, source: str) -> bool:
        """Whether the drafter `source` is to work at present; others are not even given the prompt."""
        raise NotImplementedError

    def begin(self, tree: TokenTree, survivors: Selection | None = None) -> None:
        """Start a round. `tree` is a lone root, or what survived: the last round's tree below its bonus token.
        `survivors`, whose tree it is then, says how its nodes were called in that round."""

    def next_leaves(self, tree: TokenTree, source: str, free_seconds: float = 0.0) -> Sequence[int]:
        """Nodes for the drafter `source` to expand in one batched step; empty: it is done for this round. No
        drafter is asked for a node twice in a round.

        free_seconds: how long drafting delays nothing, because the target's weights are still being read.
        """
        raise NotImplementedError

    def add(self, tree: TokenTree, leaf: int, candidates: Candidates) -> None:
        """Put the candidates worth having below `leaf`, which was asked for, into the tree; maybe none."""

    def provisional_leaves(self, tree: TokenTree, source: str, width: int) -> Sequence[int]:
        """At most `width` nodes for `source` to expand in one step while the target waits for weights; maybe none.

        So wide a step delays nothing, and the target will not see these nodes in this pass: what counts is how
        likely the text passes through a node, whether or not it was submitted.
        """
        return []

    def submit(self, tree: TokenTree) -> Selection:
        """The part of the tree that the target checks; the root is always in it."""
        raise NotImplementedError

    def verified(self, tree: TokenTree, walk: Walk) -> None:
        """Learn from the target's walk over `tree`, the tree that was submitted."""

    def finished(self, num_tokens: int, seconds: float) -> None:
        """Learn from the round's outcome: `num_tokens` emitted in `seconds` of wall time, all included."""


class ChainPolicy(GrowthPolicy):
    """mlx-lm's way, for comparison: `source` drafts a line of `length` tokens, the likeliest each time; 0: none.

    It drafts nothing provisionally; `pipelined` lets the draft read the prompt while the target does.
    """

    def __init__(self, length: int, source: str = MODEL, pipelined: bool = True) -> None:
        self.length = length
        self.source = source
        self.pipelined = pipelined
        self._tip: int | None = 0

    def wants(self, source: str) -> bool:
        return source == self.source and self.length > 0

    def begin(self, tree: TokenTree, survivors: Selection | None = None) -> None:
        self._tip = len(tree) - 1

    def next_leaves(self, tree: TokenTree, source: str, free_seconds: float = 0.0) -> Sequence[int]:
        """The tip of the chain, until it is long enough."""
        if self._tip is None or tree.depths[self._tip] >= self.length:
            return []
        leaf, self._tip = self._tip, None
        return [leaf]

    def add(self, tree: TokenTree, leaf: int, candidates: Candidates) -> None:
        if candidates.tokens:
            self._tip = tree.add(leaf, candidates.tokens[0], candidates.confidences[0], candidates.source)

    def submit(self, tree: TokenTree) -> Selection:
        return tree.select(len(tree))
