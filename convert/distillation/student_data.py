"""The corpus as batches: one shard in memory at a time, texts of like length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.errors import UsageError

from .corpus import shard_path
from .student import FrozenTarget, Ids

UNSEEN = 0
"""The shard that is never trained on."""

_LENGTH_STEP = 16  # tokens; texts whose lengths differ by less are mixed anew in each pass
_PAD_TO = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """`hidden` (B, T, H) float32; `rows` (M,) int32, places in (B * T) where a token was chosen; for each of them
    `final` (M, H) float32 and the chosen token's place in the head, `labels` (M,) int32, -1 for one outside.
    `num_tokens`: tokens of the texts, padding left out."""

    hidden: mx.array
    rows: mx.array
    final: mx.array
    labels: npt.NDArray[np.int32]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Shard:
    arrays: dict[str, Any]
    tokens: Ids
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    given: npt.NDArray[np.int64]

    @property
    def common(self) -> int:
        """With how many tokens all texts begin, the first of them at least."""
        texts = [self.tokens[start:end] for start, end in zip(self.starts, self.ends, strict=True)]
        shortest = min(map(len, texts)) - 1
        same = [all(text[at] == texts[0][at] for text in texts) for at in range(shortest)]
        return max(same.index(False) if False in same else shortest, 1)

    @classmethod
    def load(cls, path: Path, keys: Sequence[str]) -> _Shard:
        loaded: Any = mx.load(str(path))
        tokens, ends, given = (np.asarray(loaded[name]) for name in ("tokens", "ends", "given"))
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        arrays = {key: np.asarray(loaded[key]) for key in keys if key in loaded}
        return cls(arrays, tokens, starts, ends, given)


class Batches:
    """Batches of a corpus for one vocabulary of the head."""

    def __init__(
        self,
        folder: Path,
        depth: int,
        batch_tokens: int,
        tokens: Ids,
        target: FrozenTarget,
        prompts: bool = False,
    ) -> None:
        """batch_tokens: most tokens of a batch, padding included; a longer text is a batch of its own.
        target: computes what shards do not hold. prompts: rows are also those inside the prompts, from where
        the texts of a shard begin to differ."""
        self._folder = folder
        self._key = f"hidden_{depth}"
        self._batch_tokens = batch_tokens
        self._tokens = tokens
        self._target = target
        self._prompts = prompts

    def of_shard(self, number: int, seed: Sequence[int], start: int = 0) -> Iterator[Batch]:
        """The batches of shard `number` from the `start`th on. The same seed gives the same ones."""
        shard = _Shard.load(shard_path(self._folder, number), (self._key, "final"))
        rng = np.random.default_rng([*seed, number])
        order = rng.permutation(len(shard.ends))
        groups = self._groups(shard, order[[self._teaches(shard, i) for i in order.tolist()]])
        rng.shuffle(groups)
        for group in groups[start:]:
            yield self._batch(shard, group, known_only=True)

    def unseen(self, num_tokens: int) -> list[Batch]:
        """Batches of whole texts of the unseen shard, of at least so many tokens if it has them. Always the same.

        Their `labels` are -1 where the head has no row."""
        shard = _Shard.load(shard_path(self._folder, UNSEEN), (self._key, "final"))
        order = np.random.default_rng(0).permutation(len(shard.ends))
        sizes = np.cumsum((shard.ends - shard.starts)[order])
        order = order[: int(np.searchsorted(sizes, num_tokens)) + 1]
        return [self._batch(shard, group, known_only=False) for group in self._groups(shard, order)]

    def _teaches(self, shard: _Shard, index: int) -> bool:
        """Whether the target chose a token in this text that the head has a row for."""
        chosen = shard.tokens[shard.starts[index] + shard.given[index] : shard.ends[index]]
        return bool((self._places(chosen) >= 0).any())

    def _groups(self, shard: _Shard, order: npt.NDArray[Any]) -> list[list[int]]:
        """Texts of like length, so that padding is short."""
        lengths = shard.ends - shard.starts
        order = order[np.argsort(lengths[order] // _LENGTH_STEP, kind="stable")]
        groups: list[list[int]] = []
        longest = 0
        for index in order.tolist():
            longest = max(longest, int(lengths[index]))
            if not groups or (len(groups[-1]) + 1) * longest > self._batch_tokens:
                groups.append([])
                longest = int(lengths[index])
            groups[-1].append(index)
        return groups

    def _batch(self, shard: _Shard, group: Sequence[int], known_only: bool) -> Batch:
        """known_only: leave out positions whose token has no row in the head."""
        ids, rows, labels = self._choices(shard, group, known_only)
        hidden, final = self._activations(shard, group, ids)
        places = mx.array(rows)
        picked = final.reshape(-1, final.shape[-1])[places]
        return Batch(hidden, places, picked, labels, int(sum(shard.ends[i] - shard.starts[i] for i in group)))

    def _choices(self, shard: _Shard, group: Sequence[int], known_only: bool) -> tuple[Ids, Ids, Ids]:
        """Padded tokens (B, T); where the next token is the target's own choice, and which one it is."""
        longest = max(int(shard.ends[i] - shard.starts[i]) for i in group)
        length = -(-longest // _PAD_TO) * _PAD_TO
        ids = np.zeros((len(group), length), np.int32)
        rows, labels = [], []
        for row, i in enumerate(group):
            text = shard.tokens[shard.starts[i] : shard.ends[i]]
            ids[row, : len(text)] = text
            first = shard.common if self._prompts and known_only else int(shard.given[i])
            chosen = np.arange(first - 1, len(text) - 1)
            places = self._places(text[chosen + 1])
            keep = places >= 0 if known_only else np.ones(len(chosen), bool)
            rows.append(row * length + chosen[keep])
            labels.append(places[keep])
        return ids, np.concatenate(rows).astype(np.int32), np.concatenate(labels).astype(np.int32)

    def _places(self, ids: Ids) -> Ids:
        places = np.minimum(np.searchsorted(self._tokens, ids), len(self._tokens) - 1)
        return np.where(self._tokens[places] == ids, places, -1).astype(np.int32)

    def _activations(self, shard: _Shard, group: Sequence[int], ids: Ids) -> tuple[mx.array, mx.array]:
        """(B, T, H) float32 each: after the target's first layers, and before its head."""
        if len(shard.arrays) < 2:
            hidden, final = self._target(mx.array(ids))
            mx.eval(hidden, final)
            return hidden, final
        found = []
        for key in (self._key, "final"):
            padded = np.zeros((*ids.shape, shard.arrays[key].shape[1]), np.float32)
            for row, i in enumerate(group):
                start, end = shard.starts[i], shard.ends[i]
                padded[row, : end - start] = shard.arrays[key][start:end]
            found.append(mx.array(padded))
        return found[0], found[1]


def num_shards(folder: Path) -> int:
    """Raises UsageError for a corpus too small to keep a shard for testing."""
    number = 0
    while shard_path(folder, number).exists():
        number += 1
    if number < 2:
        raise UsageError(f"{folder}: fewer than two shards; run the corpus step first")
    return number


def token_counts(folder: Path, shards: int, vocab_size: int) -> npt.NDArray[np.int64]:
    """(vocab_size,): how often the target chose each token in the shards that are trained on."""
    counts = np.zeros(vocab_size, np.int64)
    for number in range(UNSEEN + 1, shards):
        shard = _Shard.load(shard_path(folder, number), ())
        for start, end, given in zip(shard.starts, shard.ends, shard.given, strict=True):
            counts += np.bincount(shard.tokens[start + given : end], minlength=vocab_size)
    return counts


def stored_depths(folder: Path) -> list[int]:
    """The depths whose activations the first shard holds."""
    loaded: Any = mx.load(str(shard_path(folder, 0)))
    return sorted(int(key.removeprefix("hidden_")) for key in loaded if key.startswith("hidden_"))
