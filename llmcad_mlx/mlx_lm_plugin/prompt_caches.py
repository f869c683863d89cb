"""The caller's prompt cache: keys and values are taken over before, and written back after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from llmcad_mlx.mlx_lm_plugin.adapted import AdaptedModel, LeftToMlxLmError
from llmcad_mlx.models.cache import LayerState, ModelCache

UNKNOWN = -1  # a token of which only keys and values are there; nobody drafts from it or reads it
_TOKENS = "_llmcad_mlx_tokens"


@dataclass(slots=True)
class ModelRows:
    """One model's part of a prompt cache: mlx-lm's caches, one for each layer."""

    adapted: AdaptedModel
    entries: list[Any]

    def __post_init__(self) -> None:
        """Raises LeftToMlxLmError for entries that cannot be taken over."""
        kinds = {type(entry).__name__ for entry in self.entries if type(entry) is not KVCache}
        reason = ""
        if kinds:
            reason = f"holds {', '.join(sorted(kinds))}"
        elif len(self.entries) != len(self.adapted.states):
            reason = f"has {len(self.entries)} entries for {len(self.adapted.states)} layers"
        elif len({entry.offset for entry in self.entries}) != 1:
            reason = "has layers of different lengths"
        elif any(entry.keys is not None and entry.keys.shape[0] != 1 for entry in self.entries):
            reason = "holds a batch"
        if reason:
            raise LeftToMlxLmError(f"prompt_cache {reason}")

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.entries[0].offset)

    def put_into(self, cache: ModelCache) -> None:
        """Fill an empty cache of the adapted model."""
        length = self.length
        if not length:
            return
        layers: list[LayerState | None] = []
        for entry, kind in zip(self.entries, self.adapted.states, strict=True):
            if kind is None:
                layers.append(None)
                continue
            keys, values = (rows[0, :, :length].astype(kind.keys.dtype) for rows in (entry.keys, entry.values))
            layers.append(LayerState(keys, values, kind.on_cpu_kernels))
        cache.restore(layers, length)

    def take_from(self, cache: ModelCache, tokens: Sequence[int]) -> None:
        """Make the caller's entries hold what `cache` does: `tokens`."""
        first = self.entries[0]
        dtype = self.adapted.rows_dtype if first.keys is None else first.keys.dtype
        for entry, layer in zip(self.entries, cache.states(len(tokens)), strict=True):
            if layer is not None:
                entry.keys, entry.values = layer.keys[None].astype(dtype), layer.values[None].astype(dtype)
                mx.eval(entry.keys, entry.values)
                entry.offset = len(tokens)
        # mlx-lm's caches do not know their tokens; the next turn drafts better when somebody does.
        setattr(self.entries[0], _TOKENS, list(tokens))

    def tokens(self) -> list[int]:
        """What the cache holds, as far as is known: a guess that only drafting builds on."""
        known: list[int] = getattr(self.entries[0], _TOKENS, [])
        return known[: self.length] if len(known) >= self.length else [UNKNOWN] * self.length
