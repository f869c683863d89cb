"""What followed what in text the target has written: a back-off n-gram model in sorted arrays.

A context is the last 1 to `order - 1` tokens. Probabilities are interpolated from the shortest context to the
longest by Witten and Bell's rule: with c the count of a token after a context, C the context's and T the number of
different tokens after it, p = (c + T·p') / (C + T), where p' is the probability after one token less of context.

File: safetensors. `keys` (C,) uint32, ascending: hashes of contexts; `starts` (C + 1,) uint32: where each one's
entries begin; `totals` and `kinds` (C,) uint16: C and T; `tokens` (E,) uint32 and `counts` (E,) uint16: entries,
most frequent first. `single_keys` (S,) uint32, ascending, and `single_tokens` (S,) uint32: contexts that
were seen once. Metadata: `format`, `order`, `vocabulary` (see `vocabulary_hash`).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.errors import ModelError

FORMAT = "llmcad-ngram-table-1"

_BUCKET_BITS = 20  # of a key, which tell the contexts of a bucket apart
_MIX, _STEP, _MASK = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xFFFFFFFFFFFFFFFF
_ARRAYS = ("keys", "starts", "totals", "kinds", "tokens", "counts", "single_keys", "single_tokens")


def context_hash(tokens: Sequence[int]) -> int:
    """32 bits of a context. Of a million contexts one in 4,000 shares its hash with another, and then proposes a
    wrong token, which costs a row."""
    value = len(tokens)
    for token in tokens:
        value = ((value + token + 1) * _STEP) & _MASK
        value ^= value >> 32
    return ((value * _MIX) & _MASK) >> 32


def context_hashes(tokens: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """`context_hash` of each row of `tokens` (N, length) uint64."""
    value = np.full(len(tokens), tokens.shape[1], np.uint64)
    with np.errstate(over="ignore"):
        for column in tokens.T:
            value = (value + column + np.uint64(1)) * np.uint64(_STEP)
            value ^= value >> np.uint64(32)
        mixed: npt.NDArray[np.uint64] = (value * np.uint64(_MIX)) >> np.uint64(32)
    return mixed.astype(np.uint32)


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """The same for tokenizers with the same tokens."""
    pairs = sorted(vocabulary.items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


class NgramTable:
    """Candidates after a context, with probabilities."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], order: int, vocabulary: str) -> None:
        """arrays: as in the file. Raises ValueError for arrays that do not fit together."""
        contexts, singles = len(arrays["keys"]), len(arrays["single_keys"])
        entries = len(arrays["tokens"])
        starts = arrays["starts"]
        if not (
            len(starts) == contexts + 1
            and len(arrays["totals"]) == len(arrays["kinds"]) == contexts
            and len(arrays["counts"]) == entries
            and len(arrays["single_tokens"]) == singles
            and int(starts[-1]) == entries
            and bool((starts[1:] >= starts[:-1]).all())
            and order >= 2
        ):
            raise ValueError("the arrays of the n-gram table do not fit together")
        self.order = order
        self.vocabulary = vocabulary
        self._arrays = arrays
        self._index = _Index.of(arrays)

    @classmethod
    def load(cls, path: Path) -> NgramTable:
        """Raises ModelError naming the file when it is not a whole n-gram table."""
        try:
            loaded: Any = mx.load(str(path), return_metadata=True)
            found, metadata = loaded
            arrays = {name: np.array(found[name]) for name in _ARRAYS}
            if metadata.get("format") != FORMAT:
                raise ValueError("another format")
            return cls(arrays, int(metadata["order"]), metadata["vocabulary"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{path}: not an n-gram table ({error}); make it again, or choose another draft"
            ) from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        temporary = path.with_name(path.name + ".part.safetensors")
        metadata = {"format": FORMAT, "order": str(self.order), "vocabulary": self.vocabulary}
        mx.save_safetensors(str(temporary), {name: mx.array(a) for name, a in self._arrays.items()}, metadata)
        temporary.replace(path)

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return sum(array.nbytes for array in self._arrays.values()) + self._index.num_bytes

    def candidates(self, tokens: Sequence[int], count: int) -> list[tuple[int, float]]:
        """At most `count` tokens after the end of `tokens`, with their probabilities, best first."""
        found = [self._entries(tokens[-length:]) for length in range(1, min(self.order, len(tokens) + 1))]
        probabilities: dict[int, float] = {}
        for entries in found:
            if entries is not None:
                probabilities.update(dict.fromkeys(entries[0], 0.0))
        for entries in found:
            if entries is None:
                continue
            counts, total, kinds = entries
            for token, lower in probabilities.items():
                probabilities[token] = (counts.get(token, 0) + kinds * lower) / (total + kinds)
        return sorted(probabilities.items(), key=lambda item: -item[1])[:count]

    def _entries(self, context: Sequence[int]) -> tuple[dict[int, int], int, int] | None:
        """Counts by token, their total and the number of kinds; None for a context never seen."""
        key, index = context_hash(context), self._index
        bucket = key >> _BUCKET_BITS
        end = index.buckets[bucket + 1]
        at = bisect_left(index.keys, key, index.buckets[bucket], end)
        if at == end or index.keys[at] != key:
            return None
        first, last = index.starts[at], index.starts[at + 1]
        counts = dict(zip(index.tokens[first:last], index.counts[first:last], strict=True))
        return counts, index.totals[at], index.kinds[at]


@dataclass(frozen=True, slots=True)
class _Index:
    """A table's arrays for looking up: those of contexts seen once among the others, in the order of the keys.

    Read as Python integers, which for a few of them is faster than numpy. `buckets` (4097,): where the keys with
    the same upper 12 bits begin; looking for one in all of them would touch more memory than all else in a lookup.
    """

    keys: memoryview
    starts: memoryview
    totals: memoryview
    kinds: memoryview
    tokens: memoryview
    counts: memoryview
    buckets: memoryview

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> _Index:
        keys = np.concatenate([arrays["keys"], arrays["single_keys"]])
        order = np.argsort(keys, kind="stable")
        once = np.ones(len(arrays["single_keys"]), np.uint16)
        sizes = np.concatenate([np.diff(arrays["starts"].astype(np.int64)), once])
        firsts = np.concatenate([arrays["starts"][:-1], len(arrays["tokens"]) + np.arange(len(once))])
        starts = np.concatenate([[0], np.cumsum(sizes[order])])
        # The entries of the contexts, one after the other in their new order.
        entries = np.repeat(firsts[order] - starts[:-1], sizes[order]) + np.arange(starts[-1])
        bounds = np.arange((1 << (32 - _BUCKET_BITS)) + 1, dtype=np.uint64) << np.uint64(_BUCKET_BITS)
        return cls(
            keys=keys[order].data,
            starts=starts.astype(np.uint32).data,
            totals=np.concatenate([arrays["totals"], once])[order].data,
            kinds=np.concatenate([arrays["kinds"], once])[order].data,
            tokens=np.concatenate([arrays["tokens"], arrays["single_tokens"]])[entries.astype(np.int64)].data,
            counts=np.concatenate([arrays["counts"], once])[entries.astype(np.int64)].data,
            buckets=np.searchsorted(keys[order].astype(np.uint64), bounds).astype(np.uint32).data,
        )
