"""Prompt lookup: propose what followed the last time the text looked like this. Costs microseconds."""

from __future__ import annotations

from collections.abc import Sequence

from llmcad_mlx.drafting import LookupDrafter
from llmcad_mlx.policy import Candidates
from llmcad_mlx.policy.calibration import ngram_confidence
from llmcad_mlx.tree.token_tree import NGRAM, TokenTree

_MIN_MATCH = 2  # a single token says too little about the next
_MAX_MATCH = 32  # longer matches are not surer
_MAX_PLACES = 8  # most recent earlier places that are compared


class NgramDrafter(LookupDrafter):
    """Looks the last tokens of a branch up in prompt and output, and proposes what came next there.

    An index from each pair of tokens to the places after it grows with the sequence. Of the latest places,
    each is matched backwards as far as it goes; candidates are ranked by match length, then recency.
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

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        return [self._lookup(tree, leaf) for leaf in leaves]

    def _lookup(self, tree: TokenTree, leaf: int) -> Candidates:
        """Candidates below `leaf`; their confidence is `ngram_confidence` of the match length."""
        branch = self._tokens[-_MAX_MATCH:] + tree.path_tokens(leaf)
        places = self._places.get(tuple(branch[-_MIN_MATCH:]))
        if not places or len(branch) < _MIN_MATCH:
            return Candidates((), (), NGRAM)
        best: dict[int, int] = {}
        for place in reversed(places[-_MAX_PLACES:]):
            token, length = self._tokens[place], self._match_length(branch, place)
            if length > best.get(token, 0):
                best[token] = length
        ranked = sorted(best.items(), key=lambda item: -item[1])
        return Candidates([token for token, _ in ranked], _shares([length for _, length in ranked]), NGRAM)

    def _match_length(self, branch: Sequence[int], place: int) -> int:
        """How many tokens before `place` equal the end of `branch`."""
        length, limit = _MIN_MATCH, min(len(branch), place, _MAX_MATCH)
        while length < limit and branch[-1 - length] == self._tokens[place - 1 - length]:
            length += 1
        return length

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        for end in range(len(self._tokens) - 1, max(length, _MIN_MATCH) - 1, -1):
            pair = tuple(self._tokens[end - _MIN_MATCH : end])
            self._places[pair].pop()
        del self._tokens[length:]


def _shares(lengths: Sequence[int]) -> list[float]:
    """Confidences of competing matches: the surest as `ngram_confidence` says, the others share the rest."""
    confidences, left = [], 1.0
    for length in lengths:
        confidences.append(ngram_confidence(length) * left)
        left -= confidences[-1]
    return confidences
