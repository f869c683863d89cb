"""The caller's prompt cache: keys and values are taken over before, and written back after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache

from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.mlx_lm_plugin.adapted import AdaptedModel
from llmcad_mlx.models.cache import LayerState, ModelCache
from llmcad_mlx.models.tree_model import TreeModel

UNKNOWN = -1  # a token of which only keys and values are there; nobody drafts from it or reads it
_TOKENS = "_llmcad_mlx_tokens"


@dataclass(slots=True)
class ModelRows:
    """One model's part of a prompt cache."""

    model: Module
    adapted: AdaptedModel
    entries: list[Any]
    """mlx-lm's caches, one for each store."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.entries[0].offset)

    def why_not(self) -> str:
        """Why it cannot be taken over; "" if it can."""
        kinds = {type(entry).__name__ for entry in self.entries if type(entry) is not KVCache}
        if kinds:
            return f"prompt_cache holds {', '.join(sorted(kinds))}"
        if len(self.entries) != len(self.adapted.states):
            return f"prompt_cache has {len(self.entries)} entries for {len(self.adapted.states)} layers"
        if len({entry.offset for entry in self.entries}) != 1:
            return "prompt_cache has layers of different lengths"
        if any(entry.keys is not None and entry.keys.shape[0] != 1 for entry in self.entries):
            return "prompt_cache holds a batch"
        return ""

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
        dtype = self.adapted.rows_dtype(self.model) if first.keys is None else first.keys.dtype
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


class RowsDrafter(ModelDrafter):
    """A draft model whose cache comes from, and goes back into, the caller's."""

    def __init__(self, model: TreeModel, rows: ModelRows | None) -> None:
        super().__init__(model)
        self._rows = rows
        if rows is not None:
            rows.put_into(self.cache)

    def give_back(self, tokens: Sequence[int]) -> None:
        """Write the rows of `tokens` into the caller's entries, reading those that were never drafted from."""
        if self._rows is None:
            return
        self.truncate(len(tokens))
        cache = self.cache
        if self._start:  # the start of the text was given up; the caller still has the rows of it
            fresh = self.model.new_cache()
            self._rows.put_into(fresh)
            cache = fresh
        self.model.prefill(tokens[cache.length :], cache)
        self._rows.take_from(cache, tokens)
