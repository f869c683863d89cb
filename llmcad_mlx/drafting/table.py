"""Proposes what an n-gram table knows of the target's own text. Costs microseconds, and needs no prompt.

What followed what in text the target has written: a back-off n-gram model in sorted arrays.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.errors import ModelError
from llmcad_mlx.files import new_file
from llmcad_mlx.policy import Candidates
from llmcad_mlx.tree.token_tree import TABLE

FORMAT = "llmcad-ngram-table-1"

_NUM_CANDIDATES = 8  # of a node
_MOST_BUCKET_BITS = 24
_HEAD = 3  # numbers of a block before its entries
_SIZE_SHIFT, _KINDS_MASK = 16, 0xFFFF
_MIX, _STEP, _MASK = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xFFFFFFFFFFFFFFFF
_ARRAYS = ("keys", "starts", "totals", "kinds", "tokens", "counts", "single_keys", "single_tokens")


def context_hash(tokens: Sequence[int]) -> int:
    """32 bits of a context. Of a million contexts one in 4,000 has another's hash, which costs a row."""
    value = len(tokens)
    for token in tokens:
        value = ((value + token + 1) * _STEP) & _MASK
        value ^= value >> 32
    return ((value * _MIX) & _MASK) >> 32


def context_hashes(tokens: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """`context_hash` of each row of `tokens` (N, length) uint64."""
    columns: Any = tokens.T  # arithmetic with them is that of the hash, modulo 2^64
    hashes: Any = context_hash(columns)
    return hashes.astype(np.uint32)  # type: ignore[no-any-return]


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """The same for tokenizers with the same tokens."""
    pairs = sorted(vocabulary.items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


@dataclass(frozen=True)
class NgramCounts:
    """The arrays of an n-gram table, as in its file. Raises ValueError for some that do not fit together."""

    arrays: Mapping[str, npt.NDArray[Any]]
    order: int
    vocabulary: str

    def __post_init__(self) -> None:
        arrays, starts = self.arrays, self.arrays["starts"]
        sizes, kinds = np.diff(starts.astype(np.int64)), arrays["kinds"]  # which share a number in a block
        if not (
            len(starts) - 1 == len(arrays["keys"]) == len(arrays["totals"]) == len(kinds)
            and len(arrays["counts"]) == len(arrays["tokens"]) == int(starts[-1])
            and len(arrays["single_tokens"]) == len(arrays["single_keys"])
            and bool(((sizes >= 0) & (sizes <= _KINDS_MASK)).all())
            and bool(((kinds > 0) & (kinds <= _KINDS_MASK)).all())
            and self.order >= 2
        ):
            raise ValueError("the arrays of the n-gram table do not fit together")

    @classmethod
    def load(cls, path: Path) -> NgramCounts:
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
        metadata = {"format": FORMAT, "order": str(self.order), "vocabulary": self.vocabulary}
        with new_file(path) as temporary, temporary.open("wb") as file:
            mx.save_safetensors(file, {name: mx.array(a) for name, a in self.arrays.items()}, metadata)


class TableDrafter(Drafter):
    """Looks the last tokens of a branch up in a table that was made once, for this target.

    A lookup costs as much as the memory it touches, all of it cold after a pass over the target's weights. So
    all that is known of a context lies in one block of `_blocks` uint32: key, C, T with the number of entries
    in the upper half, then token and count of each entry. Blocks are in the order of their keys; `_buckets`
    tells where those begin whose keys have the same upper bits, one or two of them.
    """

    source = TABLE

    def __init__(self, counts: NgramCounts) -> None:
        self.order = counts.order
        num_contexts = len(counts.arrays["keys"]) + len(counts.arrays["single_keys"])
        bits = min(num_contexts.bit_length(), _MOST_BUCKET_BITS)
        self._shift = 32 - bits
        self._buckets, self._blocks = _blocks(counts.arrays, bits)

    @property
    def num_bytes(self) -> int:
        return self._buckets.nbytes + self._blocks.nbytes

    def _after(self, branch: list[int]) -> Candidates:
        context = [*self._tokens[-self.order :], *branch] if branch else self._tokens
        return Candidates(*self.candidates(context, _NUM_CANDIDATES), TABLE)

    def candidates(self, tokens: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """At most `count` tokens after the end of `tokens`, best first, and their probabilities."""
        # The interpolation from its longest context down: each leaves the shorter ones `rest` of the probability.
        probabilities: dict[int, float] = {}
        rest = 1.0
        for length in range(min(self.order - 1, len(tokens)), 0, -1):
            key = context_hash(tokens[-length:])
            bucket = key >> self._shift
            block = self._blocks[self._buckets[bucket] : self._buckets[bucket + 1]].tolist()
            at = 0
            while at < len(block):
                kinds = block[at + 2]
                end = at + _HEAD + 2 * (kinds >> _SIZE_SHIFT)
                if block[at] == key:
                    kinds &= _KINDS_MASK
                    share = rest / (block[at + 1] + kinds)
                    for entry in range(at + _HEAD, end, 2):
                        token = block[entry]
                        probabilities[token] = probabilities.get(token, 0.0) + share * block[entry + 1]
                    rest = share * kinds
                    break
                at = end
        best = sorted(probabilities, key=probabilities.__getitem__, reverse=True)[:count]
        return best, [probabilities[token] for token in best]


def _blocks(arrays: Mapping[str, npt.NDArray[Any]], bits: int) -> tuple[memoryview, memoryview]:
    """Buckets (2^bits + 1,) uint32 and blocks, see `TableDrafter`: a memoryview gives Python integers fastest."""
    keys = np.concatenate([arrays["keys"], arrays["single_keys"]])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    once = np.ones(len(arrays["single_keys"]), np.int64)
    sizes = np.concatenate([np.diff(arrays["starts"].astype(np.int64)), once])[order]
    firsts = np.concatenate([arrays["starts"][:-1], len(arrays["tokens"]) + np.arange(len(once))])[order]
    bounds = np.concatenate([[0], np.cumsum(_HEAD + 2 * sizes)])
    blocks = np.zeros(bounds[-1], np.uint32)
    blocks[bounds[:-1]] = keys
    blocks[bounds[:-1] + 1] = np.concatenate([arrays["totals"], once])[order]
    blocks[bounds[:-1] + 2] = np.concatenate([arrays["kinds"], once])[order] | sizes << _SIZE_SHIFT
    # The entries of each context, one after the other: where they come from and where they go.
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source = (np.repeat(firsts, sizes) + within).astype(np.int64)
    places = np.repeat(bounds[:-1] + _HEAD, sizes) + 2 * within
    blocks[places] = np.concatenate([arrays["tokens"], arrays["single_tokens"]])[source]
    blocks[places + 1] = np.concatenate([arrays["counts"], once])[source]
    prefixes = np.arange((1 << bits) + 1, dtype=np.uint64) << np.uint64(32 - bits)
    buckets = bounds[np.searchsorted(keys.astype(np.uint64), prefixes)].astype(np.uint32)
    return buckets.data, blocks.data
