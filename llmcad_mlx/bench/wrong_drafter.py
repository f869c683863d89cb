"""A drafter that costs what another one costs and is always wrong: what "never slower" is tested with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmcad_mlx.drafting.drafter import Drafter
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.tree.calibration import ngram_confidence
from llmcad_mlx.tree.policy import Candidates
from llmcad_mlx.tree.token_tree import NGRAM, Selection, TokenTree

_SHIFT = 7  # any number: it only has to lead to another token


class WrongDrafter:
    """Asks another drafter and proposes other tokens with the same confidences.

    No proposed token is among the inner drafter's own candidates, so wherever the target agrees with any of
    those, all proposals are wrong. Prompt lookup, which is often silent, is made to propose below every leaf:
    with nothing found it claims what two matching tokens would.
    """

    def __init__(self, inner: Drafter, vocab_size: int) -> None:
        self.inner = inner
        self.vocab_size = vocab_size

    @property
    def source(self) -> str:
        return self.inner.source

    @property
    def rows_fed(self) -> int | None:
        return self.inner.rows_fed

    def prefill(
        self, tokens: Sequence[int], on_progress: Callable[[int], None], should_stop: Callable[[], bool]
    ) -> None:
        self.inner.prefill(tokens, on_progress, should_stop)

    def prefill_some(self, tokens: Sequence[int], limit: int) -> bool:
        return self.inner.prefill_some(tokens, limit)

    def begin(self, tokens: Sequence[int], sampler: TargetSampler, tree: TokenTree | None = None) -> None:
        self.inner.begin(tokens, sampler, tree)

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        proposals = self.inner.expand(tree, leaves)
        return [self._wrong(found, tree.tokens[leaf]) for leaf, found in zip(leaves, proposals, strict=True)]

    def _wrong(self, found: Candidates, leaf_token: int) -> Candidates:
        if not found.tokens and self.source == NGRAM:
            found = Candidates([leaf_token], [ngram_confidence(2)], NGRAM)
        taken = set(found.tokens)
        shifted = []
        for token in found.tokens[: self.vocab_size - len(taken)]:
            other = (token + _SHIFT) % self.vocab_size
            while other in taken:
                other = (other + 1) % self.vocab_size
            taken.add(other)
            shifted.append(other)
        return Candidates(shifted, found.confidences[: len(shifted)], found.source)

    def commit(self, tree: TokenTree, path: Sequence[int], survivors: Selection | None = None) -> None:
        self.inner.commit(tree, path, survivors)

    def truncate(self, length: int) -> None:
        self.inner.truncate(length)
