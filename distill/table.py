"""From texts to an n-gram table, and how far trees from a table reach into text that it has not seen."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distill.corpus import Ids
from llmcad_mlx.drafting.table import NgramCounts, TableDrafter, context_hashes

_MOST_ENTRIES = 8  # kept of a context
_MOST_COUNT = 2**16 - 1
_CANDIDATES = 8  # that a table proposes below a node


def make_counts(texts: Sequence[Ids], order: int, vocabulary: str, drop_known: bool = True) -> NgramCounts:
    """Count what follows each context of 1 to `order` - 1 tokens inside each text.

    vocabulary: `vocabulary_hash` of the tokens. drop_known: leave a context out that was seen once where the one
    that is a token shorter says the same with certainty.
    """
    parts = [_counted(texts, length) for length in range(1, order)]
    if drop_known:
        pairs = itertools.pairwise(parts)
        parts = [*parts[:1], *(part.without_singles_known_by(shorter) for shorter, part in pairs)]
    return _merged(parts, order, vocabulary)


@dataclass(frozen=True, slots=True)
class _Counts:
    """Contexts of one length by ascending hash: `keys` (C,) uint32, `shorter` those without the first token, and
    entries `starts`[i]:`starts`[i + 1] of `tokens` and `counts`, most frequent first."""

    keys: npt.NDArray[np.uint32]
    shorter: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.uint32]
    counts: npt.NDArray[np.int64]

    @property
    def totals(self) -> npt.NDArray[np.int64]:
        return np.add.reduceat(self.counts, self.starts[:-1]) if len(self.keys) else self.counts

    def without_singles_known_by(self, other: _Counts) -> _Counts:
        if not len(self.keys):
            return self
        at = np.minimum(np.searchsorted(other.keys, self.shorter), len(other.keys) - 1)
        first, sizes = other.starts[:-1], np.diff(other.starts)
        same = (other.keys[at] == self.shorter) & (other.tokens[first[at]] == self.tokens[self.starts[:-1]])
        kept = ~(same & (sizes[at] == 1) & (self.totals == 1))
        entries = np.repeat(kept, np.diff(self.starts))
        starts = np.cumsum([0, *np.diff(self.starts)[kept]])
        return _Counts(self.keys[kept], self.shorter[kept], starts, self.tokens[entries], self.counts[entries])


def _counted(texts: Sequence[Ids], length: int) -> _Counts:
    windows = [np.lib.stride_tricks.sliding_window_view(text, length + 1) for text in texts if len(text) > length]
    rows = np.concatenate([np.zeros((0, length + 1), np.int32), *windows]).astype(np.uint64)
    hashes = context_hashes(rows[:, :length])
    shorter = context_hashes(rows[:, 1:length]) if length > 1 else np.zeros(len(rows), np.uint32)
    pairs = (hashes.astype(np.uint64) << np.uint64(32)) | rows[:, length]
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
    one, many = _first_of_each(totals == 1, keys), _first_of_each(totals != 1, keys)
    lengths = np.minimum(kinds[many], _MOST_ENTRIES)
    new_starts = np.concatenate([[0], np.cumsum(lengths)])
    entries = np.repeat(starts[many] - new_starts[:-1], lengths) + np.arange(new_starts[-1])
    arrays = {
        "keys": keys[many],
        "starts": new_starts.astype(np.uint32),
        "totals": np.minimum(totals[many], _MOST_COUNT).astype(np.uint16),
        "kinds": np.minimum(kinds[many], _MOST_COUNT).astype(np.uint16),
        "tokens": tokens[entries],
        "counts": np.minimum(counts[entries], _MOST_COUNT).astype(np.uint16),
        "single_keys": keys[one],
        "single_tokens": tokens[starts[one]],
    }
    return NgramCounts(arrays, order, vocabulary)


def _first_of_each(chosen: npt.NDArray[np.bool_], keys: npt.NDArray[np.uint32]) -> Any:
    """Places of the chosen contexts by ascending hash; of two with one hash the first stays."""
    places = np.flatnonzero(chosen)
    places = places[np.argsort(keys[places], kind="stable")]
    return places[np.diff(keys[places].astype(np.int64), prepend=-1) != 0]


def tokens_per_pass(table: TableDrafter, texts: Iterable[tuple[Ids, int]], num_nodes: int) -> float:
    """Generated tokens per pass with the best `num_nodes` nodes, root included, where the target chooses the text.

    texts: tokens, and how many of them were given.
    """
    tokens = passes = 0
    for text, place in ((ids.tolist(), given) for ids, given in texts):
        while place < len(text):
            paths = _best_paths(table, text[:place], num_nodes - 1)
            reach = 0
            while place + reach < len(text) and tuple(text[place : place + reach + 1]) in paths:
                reach += 1
            step = min(reach + 1, len(text) - place)
            tokens, passes, place = tokens + step, passes + 1, place + step
    return tokens / passes if passes else 0.0


def _best_paths(table: TableDrafter, tokens: Sequence[int], count: int) -> set[tuple[int, ...]]:
    """The `count` paths of the largest probability: best-first, as the policy grows its trees."""
    context = list(tokens[-table.order :])
    found: set[tuple[int, ...]] = set()
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    while heap and len(found) <= count:
        negative, path = heapq.heappop(heap)
        found.add(path)
        for token, probability in zip(*table.candidates([*context, *path], _CANDIDATES), strict=True):
            heapq.heappush(heap, (negative * probability, (*path, token)))
    return found
