"""Who proposes tokens: the interface of all drafters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.tree.policy import Candidates
from llmcad_mlx.tree.token_tree import TokenTree


class Drafter(Protocol):
    """Proposes children for nodes of a token tree. Keeps the state of one session.

    One round:

        drafter.begin(tokens, sampler)              # the whole sequence; the tree's root is its last token
        candidates = drafter.expand(tree, leaves)   # any number of times
        drafter.commit(tree, path)                  # the accepted nodes, top down; the rest is forgotten
    """

    @property
    def source(self) -> str:
        """What the nodes' `source` says, e.g. "model" or "ngram"."""

    @property
    def rows_fed(self) -> int | None:
        """What the time of the last `expand` is filed under: the rows of its forward, 0 when it did none,
        None when it did more than a usual step."""

    def prefill(
        self, tokens: Sequence[int], on_progress: Callable[[int], None], should_stop: Callable[[], bool]
    ) -> None:
        """Take in a prompt ahead of the first round, keeping the part that is known already."""

    def begin(self, tokens: Sequence[int], sampler: TargetSampler) -> None:
        """Start a round after `tokens`, prompt and output so far. Must be cheap: no forward yet."""

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        """Candidates for the children of each of `leaves`, best first. Empty ones: nothing to propose."""

    def commit(self, tree: TokenTree, path: Sequence[int]) -> None:
        """Nodes `path` of `tree` were accepted; all other nodes are gone."""

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens of the sequence are still true."""
