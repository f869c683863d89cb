"""From token sequences to the counts of an n-gram table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmcad_mlx.drafting.table import NgramCounts, context_hashes

_MOST_ENTRIES = 8  # kept of a context
_MOST_COUNT = 2**16 - 1


def make_counts(
    texts: Sequence[npt.NDArray[np.int32]], order: int, vocabulary: str, drop_known: bool = True
) -> NgramCounts:
    """Count what follows each context of 1 to `order` - 1 tokens inside each text.

    vocabulary: `vocabulary_hash` of the tokens. drop_known: leave a context out that was seen once where the one
    that is a token shorter says the same with certainty.
    """
    parts = [_counted(texts, length) for length in range(1, order)]
    kept: list[_Counts] = []
    for length, part in enumerate(parts):
        known = drop_known and length > 0
        kept.append(part.without_singles_known_by(parts[length - 1]) if known else part)
    return _merged(kept, order, vocabulary)


class _Counts:
    """Contexts of one length: entries grouped by context, most frequent first."""

    def __init__(self, keys: Any, shorter: Any, starts: Any, tokens: Any, counts: Any) -> None:
        self.keys, self.shorter = keys, shorter
        self.starts, self.tokens, self.counts = starts, tokens, counts

    @property
    def totals(self) -> Any:
        return np.add.reduceat(self.counts, self.starts[:-1]) if len(self.keys) else self.counts

    def without_singles_known_by(self, other: _Counts) -> _Counts:
        if not len(self.keys):
            return self
        at = np.searchsorted(other.keys, self.shorter)
        at = np.minimum(at, len(other.keys) - 1)
        same = other.keys[at] == self.shorter
        first, sizes = other.starts[:-1], np.diff(other.starts)
        certain = same & (sizes[at] == 1) & (other.tokens[first[at]] == self.tokens[self.starts[:-1]])
        drop = certain & (self.totals == 1)
        entries = np.repeat(~drop, np.diff(self.starts))
        lengths = np.diff(self.starts)[~drop]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return _Counts(self.keys[~drop], self.shorter[~drop], starts, self.tokens[entries], self.counts[entries])


def _counted(texts: Sequence[npt.NDArray[np.int32]], length: int) -> _Counts:
    windows = [np.lib.stride_tricks.sliding_window_view(text, length + 1) for text in texts if len(text) > length]
    rows = np.concatenate([np.zeros((0, length + 1), np.int32), *windows]).astype(np.uint64)
    hashes = context_hashes(rows[:, :length])
    shorter = context_hashes(rows[:, 1:length]) if length > 1 else np.zeros(len(rows), np.uint32)
    following = rows[:, length]
    pairs = (hashes.astype(np.uint64) << np.uint64(32)) | following
    unique, index, counts = np.unique(pairs, return_index=True, return_counts=True)
    keys = (unique >> np.uint64(32)).astype(np.uint32)
    tokens = (unique & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    order = np.lexsort((tokens, -counts, keys))
    keys, tokens, counts, shorter = keys[order], tokens[order], counts[order], shorter[index[order]]
    first = np.flatnonzero(np.diff(keys.astype(np.int64), prepend=-1))
    return _Counts(keys[first], shorter[first], np.append(first, len(keys)), tokens, counts)


def _merged(parts: Sequence[_Counts], order: int, vocabulary: str) -> NgramCounts:
    keys = np.concatenate([part.keys for part in parts])
    kinds = np.concatenate([np.diff(part.starts) for part in parts])
    totals = np.concatenate([part.totals for part in parts])
    offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])
    starts = np.concatenate([part.starts[:-1] + offset for part, offset in zip(parts, offsets, strict=False)])
    tokens = np.concatenate([part.tokens for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    single = totals == 1
    one, many = np.flatnonzero(single), np.flatnonzero(~single)
    one = one[np.argsort(keys[one], kind="stable")]
    many = many[np.argsort(keys[many], kind="stable")]
    # Two contexts with one hash: the first stays.
    one, many = (index[np.diff(keys[index].astype(np.int64), prepend=-1) != 0] for index in (one, many))
    lengths = np.minimum(kinds[many], _MOST_ENTRIES)
    new_starts = np.concatenate([[0], np.cumsum(lengths)])
    entries = np.repeat(starts[many] - new_starts[:-1], lengths) + np.arange(new_starts[-1])
    arrays = {
        "keys": keys[many],
        "starts": new_starts.astype(np.uint32),
        "totals": np.minimum(totals[many], _MOST_COUNT).astype(np.uint16),
        "kinds": np.minimum(kinds[many], _MOST_COUNT).astype(np.uint16),
        "tokens": tokens[entries].astype(np.uint32),
        "counts": np.minimum(counts[entries], _MOST_COUNT).astype(np.uint16),
        "single_keys": keys[one],
        "single_tokens": tokens[starts[one]].astype(np.uint32),
    }
    return NgramCounts(arrays, order, vocabulary)
