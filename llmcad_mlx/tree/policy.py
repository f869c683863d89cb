"""How a tree is grown: the interface between the engine's round and a growth policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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


class GrowthPolicy(Protocol):
    """Decides which leaves the draft expands, when to fall back to the target, and what it is given.

    One round:

        policy.begin(tree)
        while leaves := policy.next_leaves(tree):
            for leaf, candidates in zip(leaves, drafter.expand(tree, leaves)):
                policy.add(tree, leaf, candidates)
        selection = policy.submit(tree)
        …the target verifies selection.tree…
        policy.verified(selection.tree, walk)

    A policy keeps what it learns from round to round, so one policy serves one session at a time.
    """

    def begin(self, tree: TokenTree) -> None:
        """Start a round. `tree` is a lone root, or already has nodes drafted while the target worked."""

    def next_leaves(self, tree: TokenTree) -> Sequence[int]:
        """Nodes for the draft to expand in one batched step; empty: fall back to the target.

        No node is asked for twice in a round.
        """

    def add(self, tree: TokenTree, leaf: int, candidates: Candidates) -> None:
        """Put the candidates worth having below `leaf` into the tree. No candidates: the leaf is done.

        Called once per leaf and drafter: where several drafters feed one tree, more than once for a leaf.
        """

    def submit(self, tree: TokenTree) -> Selection:
        """The part of the tree that the target checks; the root is always in it."""

    def verified(self, tree: TokenTree, walk: Walk) -> None:
        """Learn from the target's walk over `tree`, the tree that was submitted."""
