"""A user's mlx-lm model made ready for token trees, without changing it."""

from __future__ import annotations

import copy
import weakref
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from llmcad_mlx.cpu import prepare_for_device
from llmcad_mlx.models.cache import LayerState
from llmcad_mlx.models.probe import probe
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.store.profile import PairProfile


class AdaptedModel:
    """A second set of modules, made ready for trees, over the weights of the user's model.

    `reason` says why the model can verify no draft, "" if it can.
    """

    def __init__(self, model: Module) -> None:
        self.reason = ""
        self._parts = _parts(model)  # held, so that no new array can get an old one's identity
        self._profiles: weakref.WeakKeyDictionary[AdaptedModel, PairProfile] = weakref.WeakKeyDictionary()
        self._own_profile = PairProfile(None)
        self._rows_dtype: mx.Dtype | None = None
        try:
            twin = _twin(model)
        except Exception as error:  # a module may hold anything, and say anything when it is copied
            self.reason = f"its modules cannot be copied ({type(error).__name__}: {error})".splitlines()[0]
            return
        prepare_for_device(twin)
        self.tree = TreeModel(twin, {}, probe(twin))
        if self.tree.capability == "plain":
            self.reason = self.tree.report.reason

    def is_of(self, model: Module) -> bool:
        """Whether `model` still has the modules and weights it was adapted with."""
        now = _parts(model)
        return len(now) == len(self._parts) and all(a is b for a, b in zip(now, self._parts, strict=True))

    def with_prefill_chunk(self, chunk: int | None) -> TreeModel:
        """The tree model, reading prompts `chunk` tokens at a time (None: as it likes)."""
        if chunk is None:
            return self.tree
        return TreeModel(self.tree.model, {}, self.tree.report, prefill_chunk=chunk)

    def profile(self, draft: AdaptedModel | None) -> PairProfile:
        """What was learned about the pair in this process; the same object each time."""
        return self._own_profile if draft is None else self._profiles.setdefault(draft, PairProfile(None))

    def rows_dtype(self, model: Module) -> mx.Dtype:
        """What the user's `model` itself keeps keys and values in, found out by a forward of it."""
        if self._rows_dtype is None:
            cache = make_prompt_cache(model)
            model(mx.array([[0]]), cache=cache)
            self._rows_dtype = cache[0].keys.dtype
        return self._rows_dtype

    @cached_property
    def states(self) -> list[LayerState | None]:
        """How the twin keeps each layer's rows, found out by a forward; for models that are not "plain"."""
        cache = self.tree.new_cache()
        self.tree.prefill([0], cache)
        return list(cache.states(1))

    @cached_property
    def logits_dtype(self) -> mx.Dtype:
        """What the model's head gives."""
        return self.tree.forward([0], self.tree.new_cache()).logits.dtype


class AdaptedModels:
    """The adapted models of those in use; a model's is dropped with it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Module], AdaptedModel]] = {}

    def of(self, model: Module) -> AdaptedModel:
        """The model's, made at first use and again when its weights or modules are others than then."""
        key = id(model)
        known = self._known.get(key)
        if known is not None and known[0]() is model and known[1].is_of(model):
            return known[1]
        adapted = AdaptedModel(model)
        self._known[key] = (weakref.ref(model, lambda _: self._known.pop(key, None)), adapted)
        return adapted


def _parts(model: Module) -> list[Any]:
    """Every module's class and arrays, in order."""
    parts: list[Any] = []
    untyped: Any = model
    for module in untyped.modules():
        parts.append(type(module))
        parts.extend(value for value in module.values() if isinstance(value, mx.array))
    return parts


def _twin(model: Module) -> Module:
    """A copy of the modules that shares the arrays."""
    shared = {id(part): part for part in _parts(model) if isinstance(part, mx.array)}
    return copy.deepcopy(model, shared)
