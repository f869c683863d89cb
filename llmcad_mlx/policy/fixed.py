"""Policies without judgement: plain decoding, and a chain of fixed length (mlx-lm's way), for comparison."""

from __future__ import annotations

from collections.abc import Sequence

from llmcad_mlx.policy import Candidates
from llmcad_mlx.tree.token_tree import MODEL, Selection, TokenTree
from llmcad_mlx.tree.walk import Walk


class ChainPolicy:
    """`source` drafts `length` tokens in a line, the most likely each time; 0 is plain decoding.

    It drafts nothing provisionally; `pipelined` lets the draft read the prompt while the target does.
    """

    def __init__(self, length: int, source: str = MODEL, pipelined: bool = True) -> None:
        if length < 0:
            raise ValueError(f"a chain cannot have {length} tokens")
        self.length = length
        self.pipelined = pipelined
        self.sources = frozenset({source}) if length else frozenset()
        self._tip: int | None = 0

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
            confidence = candidates.confidences[0]
            self._tip = tree.add(leaf, candidates.tokens[0], confidence, candidates.source)

    def provisional_leaves(self, tree: TokenTree, source: str, width: int) -> Sequence[int]:
        """None."""
        return []

    def submit(self, tree: TokenTree) -> Selection:
        """All of it."""
        return tree.select(len(tree))

    def verified(self, tree: TokenTree, walk: Walk) -> None:
        """Nothing to learn."""

    def finished(self, num_tokens: int, seconds: float) -> None:
        """Nothing to learn."""
