"""Drafters without a model that look only at the sequence: prompt lookup, and a function of the user's own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.errors import UsageError
from llmcad_mlx.policy import Candidates
from llmcad_mlx.policy.calibration import ngram_confidence
from llmcad_mlx.tree.token_tree import NGRAM

_MIN_MATCH = 2  # a single token says too little about the next
_MAX_MATCH = 32  # longer matches are not surer
_MAX_PLACES = 8  # most recent earlier places that are compared


class NgramDrafter(Drafter):
    """Looks the last tokens of a branch up in prompt and output, and proposes what came next there.

    An index from each pair of tokens to the places after it grows with the sequence. Of the latest places, each is
    matched backwards as far as it goes; candidates are ranked by match length, then recency. Costs microseconds.
    """

    source = NGRAM

    def __init__(self) -> None:
        self._tokens: list[int] = []  # a copy, indexed up to its end
        self._places: dict[tuple[int, ...], list[int]] = {}

    def _read(self, tokens: Sequence[int]) -> None:
        for end in range(len(self._tokens), len(tokens)):
            if end >= _MIN_MATCH:
                # The place is the index of the token that followed the pair.
                self._places.setdefault(tuple(self._tokens[end - _MIN_MATCH : end]), []).append(end)
            self._tokens.append(tokens[end])

    def _after(self, branch: list[int]) -> Candidates:
        """The surest as `ngram_confidence` of its match says, others share the rest."""
        branch = self._tokens[-_MAX_MATCH:] + branch
        places = self._places.get(tuple(branch[-_MIN_MATCH:]))
        if not places or len(branch) < _MIN_MATCH:
            return Candidates((), (), NGRAM)
        best: dict[int, int] = {}
        for place in reversed(places[-_MAX_PLACES:]):
            token, length, limit = self._tokens[place], _MIN_MATCH, min(len(branch), place, _MAX_MATCH)
            while length < limit and branch[-1 - length] == self._tokens[place - 1 - length]:
                length += 1
            if length > best.get(token, 0):
                best[token] = length
        ranked = sorted(best, key=best.__getitem__, reverse=True)  # stable: ties stay as they came
        confidences, left = [], 1.0
        for token in ranked:
            confidences.append(ngram_confidence(best[token]) * left)
            left -= confidences[-1]
        return Candidates(ranked, confidences, NGRAM)

    def truncate(self, length: int) -> None:
        for end in range(len(self._tokens) - 1, max(length, _MIN_MATCH) - 1, -1):
            self._places[tuple(self._tokens[end - _MIN_MATCH : end])].pop()
        del self._tokens[length:]


Propose = Callable[[list[int]], Iterable[tuple[int, float]]]
"""From all tokens so far, prompt included, to (next token, how sure in 0 to 1), best first; none: no idea."""


class OwnDrafter(Drafter):
    """Asks `propose` below every leaf. Raises UsageError naming the drafter for a proposal that is none."""

    rows_fed = None  # its seconds are counted as drafting, but no model's step is priced by them

    def __init__(self, name: str, propose: Propose, vocab_size: int) -> None:
        self.source = name
        self._propose = propose
        self._vocab_size = vocab_size

    def _after(self, branch: list[int]) -> Candidates:
        found: dict[int, float] = {}
        for proposal in self._propose([*self._tokens, *branch]):
            try:
                first, second = proposal
                token, confidence = operator.index(first), float(second)
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
            found.setdefault(token, confidence)
        ranked = sorted(found, key=found.__getitem__, reverse=True)
        return Candidates(ranked, [found[token] for token in ranked], self.source)
