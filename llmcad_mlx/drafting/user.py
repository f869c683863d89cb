"""A drafter of the user's own: a function from the text so far to what may come next."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

from llmcad_mlx.drafting import LookupDrafter
from llmcad_mlx.errors import UsageError
from llmcad_mlx.policy import Candidates
from llmcad_mlx.tree.token_tree import TokenTree

Propose = Callable[[list[int]], Iterable[tuple[int, float]]]
"""From all tokens so far, prompt included, to (next token, how sure in 0 to 1), best first; none: no idea."""


class OwnDrafter(LookupDrafter):
    """Asks `propose` below every leaf, and checks what it says."""

    rows_fed = None  # its seconds are counted as drafting, but no model's step is priced by them

    def __init__(self, name: str, propose: Propose, vocab_size: int) -> None:
        self.source = name
        self._propose = propose
        self._vocab_size = vocab_size

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        """Raises UsageError naming the drafter for a proposal that is none."""
        return [self._ask([*self._tokens, *tree.path_tokens(leaf)]) for leaf in leaves]

    def _ask(self, tokens: list[int]) -> Candidates:
        found: dict[int, float] = {}
        for proposal in self._propose(tokens):
            token, confidence = self._checked(proposal)
            found.setdefault(token, confidence)
        ranked = sorted(found.items(), key=lambda item: -item[1])  # stable: ties stay as they came
        return Candidates([token for token, _ in ranked], [sure for _, sure in ranked], self.source)

    def _checked(self, proposal: object) -> tuple[int, float]:
        try:
            first, second = proposal  # type: ignore[misc]
            token, confidence = operator.index(first), float(second)  # type: ignore[has-type]
        except (TypeError, ValueError):
            raise UsageError(
                f"drafter {self.source}: {proposal!r} is no pair of token id and confidence"
            ) from None
        if not 0 <= token < self._vocab_size:
            raise UsageError(
                f"drafter {self.source}: token {token} is not in the vocabulary of {self._vocab_size}"
            )
        if not 0.0 <= confidence <= 1.0:
            raise UsageError(f"drafter {self.source}: confidence {confidence} is not from 0 to 1")
        return token, confidence
