"""The corpus as batches: one shard in memory at a time, texts of like length together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from distill.corpus import Ids, Shard, shard_path
from distill.student import FrozenTarget

UNSEEN = 0
"""The shard that is never trained on."""

_LENGTH_STEP = 16  # tokens; texts whose lengths differ by less are mixed anew each time
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
class Batches:
    """Batches of the corpus in `folder` for a head of the vocabulary `tokens` (V',).

    depth: layers that a student keeps. batch_tokens: most tokens of a batch, padding included; a longer text is a
    batch of its own. target: computes what shards do not hold. prompts: rows are also those inside the prompts,
    from where the texts of a shard begin to differ.
    """

    folder: Path
    depth: int
    batch_tokens: int
    tokens: Ids
    target: FrozenTarget
    prompts: bool = False

    def of_shard(self, number: int, seed: Sequence[int], start: int = 0) -> Iterator[Batch]:
        """The batches of shard `number` from the `start`th on. The same seed gives the same ones."""
        shard = self._load(number)
        rng = np.random.default_rng([*seed, number])
        order = rng.permutation(len(shard.ends))
        # Only texts in which the target chose a token that the head has a row for.
        teaches = np.array([bool((self._places(ids[given:]) >= 0).any()) for ids, given in shard.texts()])
        groups = self._groups(shard, order[teaches[order]])
        rng.shuffle(groups)
        for group in groups[start:]:
            yield self._batch(shard, group, known_only=True)

    def unseen(self, num_tokens: int) -> list[Batch]:
        """Batches of whole texts of the unseen shard, of at least so many tokens if it has them. Always the same.

        Their `labels` are -1 where the head has no row."""
        shard = self._load(UNSEEN)
        order = np.random.default_rng(0).permutation(len(shard.ends))
        sizes = np.cumsum(shard.lengths[order])
        order = order[: int(np.searchsorted(sizes, num_tokens)) + 1]
        return [self._batch(shard, group, known_only=False) for group in self._groups(shard, order)]

    def _load(self, number: int) -> Shard:
        return Shard.load(shard_path(self.folder, number), (f"hidden_{self.depth}", "final"))

    def _groups(self, shard: Shard, order: npt.NDArray[np.int64]) -> list[list[int]]:
        """Texts of like length, so that padding is short."""
        lengths = shard.lengths
        order = order[np.argsort(lengths[order] // _LENGTH_STEP, kind="stable")]
        groups: list[list[int]] = []
        longest = 0
        for index in order.tolist():
            longest = max(longest, int(lengths[index]))
            if not groups or (len(groups[-1]) + 1) * longest > self.batch_tokens:
                groups.append([])
                longest = int(lengths[index])
            groups[-1].append(index)
        return groups

    def _batch(self, shard: Shard, group: list[int], known_only: bool) -> Batch:
        """known_only: leave out positions whose token has no row in the head."""
        ids, rows, labels = self._choices(shard, group, known_only)
        hidden, final = self._activations(shard, group, ids)
        places = mx.array(rows)
        picked = final.reshape(-1, final.shape[-1])[places]
        return Batch(hidden, places, picked, labels, int(shard.lengths[group].sum()))

    def _choices(self, shard: Shard, group: list[int], known_only: bool) -> tuple[Ids, Ids, Ids]:
        """Padded tokens (B, T); where the next token is the target's own choice, and which one it is."""
        length = -(-int(shard.lengths[group].max()) // _PAD_TO) * _PAD_TO
        common = common_length(shard) if self.prompts and known_only else None
        ids = np.zeros((len(group), length), np.int32)
        rows, labels = [], []
        for row, i in enumerate(group):
            text = shard.tokens[shard.starts[i] : shard.ends[i]]
            ids[row, : len(text)] = text
            first = common or int(shard.given[i])
            chosen = np.arange(first - 1, len(text) - 1)
            places = self._places(text[chosen + 1])
            keep = places >= 0 if known_only else np.ones(len(chosen), bool)
            rows.append(row * length + chosen[keep])
            labels.append(places[keep])
        return ids, np.concatenate(rows).astype(np.int32), np.concatenate(labels).astype(np.int32)

    def _places(self, ids: Ids) -> Ids:
        places = np.minimum(np.searchsorted(self.tokens, ids), len(self.tokens) - 1)
        return np.where(self.tokens[places] == ids, places, -1).astype(np.int32)

    def _activations(self, shard: Shard, group: list[int], ids: Ids) -> tuple[mx.array, mx.array]:
        """(B, T, H) float32 each: after the target's first layers, and before its head."""
        if len(shard.arrays) < 2:
            hidden, final = self.target(mx.array(ids))
            mx.eval(hidden, final)
            return hidden, final
        found = []
        for array in shard.arrays.values():
            padded = np.zeros((*ids.shape, array.shape[1]), np.float32)
            for row, i in enumerate(group):
                padded[row, : shard.lengths[i]] = array[shard.starts[i] : shard.ends[i]]
            found.append(mx.array(padded))
        return found[0], found[1]


def common_length(shard: Shard) -> int:
    """With how many tokens all texts begin, the first of them at least."""
    texts = [tokens for tokens, _ in shard.texts()]
    shortest = min(map(len, texts)) - 1
    same = [all(text[at] == texts[0][at] for text in texts) for at in range(shortest)]
    return max(same.index(False) if False in same else shortest, 1)


def token_counts(shards: Iterable[Path], vocab_size: int) -> npt.NDArray[np.int64]:
    """(vocab_size,): how often the target chose each token."""
    counts = np.zeros(vocab_size, np.int64)
    for path in shards:
        for tokens, given in Shard.load(path).texts():
            counts += np.bincount(tokens[given:], minlength=vocab_size)
    return counts


def stored_depths(folder: Path) -> list[int]:
    """The depths whose activations the first shard holds."""
    loaded: Any = mx.load(str(shard_path(folder, 0)))
    return sorted(int(key.removeprefix("hidden_")) for key in loaded if key.startswith("hidden_"))
