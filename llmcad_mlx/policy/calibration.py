"""From what a drafter says to how often the target agrees."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from llmcad_mlx.tree.token_tree import NGRAM, ROOT, TokenTree

FORMAT_VERSION = 1
# Fine near 0 and near 1, where a small difference in confidence is a large one in odds.
BUCKET_EDGES = (0.002, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95, 0.99)
NUM_BUCKETS = len(BUCKET_EDGES) + 1
HALF_LIFE = 500
PRIOR_STRENGTH = 8.0
NGRAM_PRIOR_STRENGTH = 4.0


def ngram_confidence(match_length: int) -> float:
    """Prior acceptance of a token that followed an earlier copy of the last `match_length` tokens.

    `m/(m + 1.5)`: 0.40, 0.57, 0.67, 0.73, 0.77 for 1 to 5, 0.87 for 10. A guess with the right shape, so
    it weighs only 4 pseudo-observations and `Calibration` replaces it with what it sees.
    """
    return match_length / (match_length + 1.5)


class Calibration:
    """Acceptance probability by source and confidence bucket, Beta-smoothed, with forgetting.

    With `tested` and `accepted` the decayed counts of a bucket, confidence c and prior strength s,
    `probability = (accepted + s·c)/(tested + s)`: the posterior mean under a Beta(s·c, s·(1 − c)) prior.
    s is 8 for models, whose probabilities mean something by themselves, and 4 for the n-gram drafter.
    Each observation first fades its bucket's counts so that one 500 observations older weighs half.
    """

    def __init__(self) -> None:
        self._tested: dict[str, list[float]] = {}
        self._accepted: dict[str, list[float]] = {}
        self._decay = 0.5 ** (1.0 / HALF_LIFE)

    def probabilities(self, confidences: Sequence[float], source: str) -> Sequence[float]:
        """Calibrated acceptance probabilities in [0, 1] of candidates with raw `confidences` in [0, 1]."""
        tested = self._tested.get(source)
        if tested is None:
            return confidences
        accepted, strength = self._accepted[source], NGRAM_PRIOR_STRENGTH if source == NGRAM else PRIOR_STRENGTH
        buckets = [bisect_right(BUCKET_EDGES, confidence) for confidence in confidences]
        return [
            min((accepted[bucket] + strength * confidence) / (tested[bucket] + strength), 1.0)  # or 1 + 1e-16
            for bucket, confidence in zip(buckets, confidences, strict=True)
        ]

    def observe(self, confidence: float, source: str, accepted: bool) -> None:
        """Count one candidate that the target tested. `confidence` is the drafter's raw figure, in [0, 1]."""
        if source not in self._tested:
            self._tested[source], self._accepted[source] = [0.0] * NUM_BUCKETS, [0.0] * NUM_BUCKETS
        bucket = bisect_right(BUCKET_EDGES, confidence)
        tested, accepts = self._tested[source], self._accepted[source]
        tested[bucket] = tested[bucket] * self._decay + 1.0
        accepts[bucket] = accepts[bucket] * self._decay + accepted

    def observe_choices(self, tree: TokenTree, tokens: Sequence[int]) -> None:
        """Count every child, in the drafted `tree`, of the nodes at which the target chose `tokens`.

        `tokens`: from below the root on. They may lead out of the tree; what comes then judges nobody.
        """
        node: int | None = ROOT
        for token in tokens:
            if node is None:
                return
            for child in tree.children(node):
                self.observe(tree.raw_confidences[child], tree.sources[child], tree.tokens[child] == token)
            node = tree.child(node, token)

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON-able data; `from_dict` reads it back."""
        return {
            "version": FORMAT_VERSION,
            "edges": list(BUCKET_EDGES),
            "sources": {
                source: {"tested": list(tested), "accepted": list(self._accepted[source])}
                for source, tested in self._tested.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Any) -> Calibration:
        """Read what `to_dict` wrote. Raises ValueError, TypeError, KeyError or AttributeError for others."""
        if data["version"] != FORMAT_VERSION or data["edges"] != list(BUCKET_EDGES):
            raise ValueError("another format, or other confidence buckets")
        calibration = cls()
        for source, counts in data["sources"].items():
            tested, accepted = list(counts["tested"]), list(counts["accepted"])
            if len(tested) != NUM_BUCKETS or not all(isinstance(number, float) for number in tested + accepted):
                raise ValueError(f"{source}: not {NUM_BUCKETS} numbers")
            if not all(0.0 <= right <= both < math.inf for right, both in zip(accepted, tested, strict=True)):
                raise ValueError(f"{source}: not numbers of tested and accepted candidates")
            calibration._tested[source], calibration._accepted[source] = tested, accepted
        return calibration
