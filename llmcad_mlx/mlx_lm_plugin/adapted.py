"""A user's mlx-lm model made ready for token trees, without changing it, and its part of a prompt cache."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, make_prompt_cache

from llmcad_mlx.cpu import prepare_for_device
from llmcad_mlx.mlx_lm_plugin.loading import check_reading
from llmcad_mlx.models.cache import LayerState, ModelCache
from llmcad_mlx.models.probe import probe
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.store.profile import PairProfile

UNKNOWN = -1  # a token of which only keys and values are there; nobody drafts from it or reads it
_TOKENS = "_llmcad_mlx_tokens"


class LeftToMlxLmError(Exception):
    """What only mlx-lm's own function can do; the message says why."""


class AdaptedModel:
    """A second set of modules, made ready for trees, over the weights of the user's model.

    `reason` says why the model can verify no draft, "" if it can. Only then are there `logits_dtype` of its head,
    and `states`, how the twin keeps each layer's rows; both are found out by a forward.
    """

    def __init__(self, model: Module) -> None:
        self._model = weakref.ref(model)
        self.parts = _parts(model)  # held, so that no new array can get an old one's identity
        self._profiles: weakref.WeakKeyDictionary[AdaptedModel, PairProfile] = weakref.WeakKeyDictionary()
        self._own_profile = PairProfile(None)
        shared = {id(part): part for part in self.parts if isinstance(part, mx.array)}
        try:
            twin = copy.deepcopy(model, shared)
        except Exception as error:  # a module may hold anything, and say anything when it is copied
            self.reason = f"its modules cannot be copied ({type(error).__name__}: {error})".splitlines()[0]
            return
        prepare_for_device(twin)
        self.tree = TreeModel(twin, {}, probe(twin))
        self.reason = self.tree.report.reason if self.tree.capability == "plain" else ""
        if self.reason:
            return
        cache = self.tree.new_cache()
        first = self.tree.forward([0], cache)
        cache.commit(first.slots)
        self.logits_dtype = first.logits.dtype
        self.states = list(cache.states(1))
        self.has_windows = any(window is not None for window, _ in cache.token_nbytes)

    def with_prefill_chunk(self, chunk: int | None) -> TreeModel:
        """The tree model, reading prompts `chunk` tokens at a time (None: as it likes)."""
        return TreeModel(self.tree.model, {}, self.tree.report, chunk or self.tree.prefill_chunk)

    def profile(self, draft: AdaptedModel | None) -> PairProfile:
        """What was learned about the pair in this process; the same object each time."""
        return self._own_profile if draft is None else self._profiles.setdefault(draft, PairProfile(None))

    @cached_property
    def rows_dtype(self) -> mx.Dtype:
        """What the user's model itself keeps keys and values in, found out by a forward of it."""
        model: Any = self._model()
        cache = make_prompt_cache(model)
        model(mx.array([[0]]), cache=cache)
        dtype: mx.Dtype = cache[0].keys.dtype
        return dtype


class AdaptedModels:
    """The adapted models of those in use; a model's is dropped with it."""

    def __init__(self) -> None:
        self._known: dict[int, AdaptedModel] = {}
        self._checked: set[int] = set()

    def check(self, model: Module, tokenizer: Any) -> None:
        """See `check_reading`; once for a model that passes."""
        if id(model) not in self._checked:
            check_reading(model, tokenizer)
            weakref.finalize(model, self._checked.discard, id(model))
            self._checked.add(id(model))

    def of(self, model: Module) -> AdaptedModel:
        """The model's, made at first use and again when its weights or modules are others than then.

        Raises LeftToMlxLmError for a model that can verify no draft.
        """
        adapted = self._known.get(id(model))
        if adapted is None:
            weakref.finalize(model, self._known.pop, id(model), None)
        if adapted is None or [*map(id, adapted.parts)] != [*map(id, _parts(model))]:
            self._known[id(model)] = adapted = AdaptedModel(model)
        if adapted.reason:
            raise LeftToMlxLmError(adapted.reason)
        return adapted


def _parts(model: Any) -> list[Any]:
    parts: list[Any] = []
    for module in model.modules():
        parts.append(type(module))
        parts.extend(value for value in module.values() if isinstance(value, mx.array))
    return parts


@dataclass(slots=True)
class ModelRows:
    """One model's part of the caller's prompt cache: mlx-lm's caches, one for each layer."""

    adapted: AdaptedModel
    entries: list[Any]

    def __post_init__(self) -> None:
        """Raises LeftToMlxLmError for entries that cannot be taken over."""
        kinds = {type(entry).__name__ for entry in self.entries if type(entry) is not KVCache}
        reason = ""
        if kinds:
            reason = f"holds {', '.join(sorted(kinds))}"
        elif self.adapted.has_windows:
            reason = "keeps all tokens in layers with a window"  # of which there will be the last ones only
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
