"""What a model can do, found out by trying it at load: token trees, chains, or plain decoding.

A small tree with branches, siblings, two appends, a commit in the middle and dead slots goes through the lazy
cache and is compared with the same tokens fed one at a time through the model's own mlx-lm cache. Nothing is
concluded from a model's name. What was found is kept: probing a streamed model reads its layers many times.

Models that keep an index beside keys and values start to select among slots at some thousand tokens, so both
caches of such a model first get a made-up history of that length.

In fp32 on a Linux CPU the two must be equal bit for bit. Elsewhere kernels for one and for several rows round
differently, so the largest difference may reach a share of the logits' range: 1/1000, or 1/250 on a GPU. In 16
bits that is 1/16, in which a slightly wrong position or mask can hide; so a model in 16 bits is judged with
activations in fp32 first, which takes no second copy of its weights, and may do in 16 bits what it can do in fp32.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.quantized import QuantizedEmbedding
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from llmcad_mlx.files import write_text
from llmcad_mlx.models import positions
from llmcad_mlx.models.adapt import Adaptation, adapt, computes_in_float32, own_class, restore
from llmcad_mlx.models.cache import Capability, LazyKVCache, UnsupportedCacheError
from llmcad_mlx.models.tree_model import ProbeReport, body_of, run

Call = Callable[..., mx.array]
Logits = dict[int, npt.NDArray[np.float32]]  # node -> (V,)

# The probe's tree. Nodes 0 and 1 are the prompt. Below 1 comes 2 with the children 3 and 4, extended by 5 and
# 6; committing 2, 4, 6 leaves 3 and 5 dead between them. Below 6 come 7, its children 8 and 9, and 10 below
# 9. Tokens are small ids that every vocabulary has.
_TOKENS = (5, 23, 11, 29, 8, 19, 2, 14, 31, 6, 27)
_PARENTS = (-1, 0, 1, 2, 2, 3, 4, 6, 7, 7, 9)
_PROMPT = (0, 1)
_TREE = ((2, 3, 4), (5, 6), (7, 8, 9), (10,))  # nodes of each forward
_DEPTH_FIRST = (0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10)
_SINGLES = tuple((node,) for node in range(2, 11))
_COMMIT_AFTER, _COMMIT = 6, (2, 4, 6)

_CAPABILITIES: tuple[Capability, ...] = ("plain", "chain", "tree")
_ROUNDING = 1e-3  # of the logits' range: larger differences are not rounding
# Several rows go through matrix units that round their input to 10 bits (TF32: M5, CUDA), one row does not. That
# is 3e-4 of a factor, some 6e-4 of the range after two layers. The least wrong model of mlx-lm is 1.5e-2 off.
_ROUNDING_ON_GPU = 4e-3
_TOLERANCE_16_BITS = 1 / 16
_LONG_HISTORY = 4096  # tokens
_FORMAT = 2  # of kept reports
_NUMBERING = ("idx", "index", "layer_id", "number")


def probe(model: Module) -> ProbeReport:
    """Find out what ``model`` can do. Its rope modules stay adapted (`positions.install`) if it takes trees.

    A model that takes trees costs 5 forwards of one to three tokens and 11 of one, 11 more where our cache
    has kernels of its own; the others a few more; one in 16 bits twice as many.
    """
    started = time.perf_counter()
    if _computes_in_16_bits(model):
        with _activations_in_float32(model):
            found = _Probe(model, _float32_tolerance()).best()
        report = _Probe(model, _TOLERANCE_16_BITS).at_most(found)
    else:
        report = _Probe(model, _float32_tolerance()).best()
    return replace(report, seconds=time.perf_counter() - started)


class _Probe:
    """The reference logits of one model and the trials compared with them. tolerance: of their range."""

    def __init__(self, model: Module, tolerance: float) -> None:
        self.model = model
        self.body = body_of(model)
        self.history = _made_up_history(model)
        self.reference = self._own_logits()
        self.plain: dict[bool, Logits] = {}  # by pad_single
        self.vocab_size = len(self.reference[2])
        finite = np.concatenate([row[np.isfinite(row)] for row in self.reference.values()])
        self.range = float(np.ptp(finite)) if len(finite) else 0.0
        self.tolerance = tolerance * self.range
        self.rounding = max(tolerance, _ROUNDING) * self.range

    def at_most(self, found: ProbeReport) -> ProbeReport:
        """`best`, but no more than was `found` in another precision. Adapts the rope modules."""
        if found.capability == "plain":
            own = self._plain(found.reason)
            return replace(own, single_rows=own.single_rows or found.single_rows)
        own = self.best(found.pad_single)
        if _CAPABILITIES.index(own.capability) <= _CAPABILITIES.index(found.capability):
            return replace(own, body_prefills=own.body_prefills and found.body_prefills)
        positions.uninstall(self.model)
        return replace(found, max_difference=own.max_difference)

    def best(self, pad_single: bool = False) -> ProbeReport:
        """All but the seconds. Adapts the rope modules. pad_single: known to be needed."""
        try:
            self._cache()
        except UnsupportedCacheError as error:
            return self._plain(f"rollback: {error}")
        positions.install(self.model)
        tree = self._attempt("tree", lambda prefill, pad: self._tree_logits(_TREE, prefill, pad), pad_single)
        if isinstance(tree, ProbeReport):
            return tree
        # One node at a time needs no vector of positions: does the mask alone work?
        single = self._attempt("tree", lambda prefill, pad: self._tree_logits(_SINGLES, prefill, pad))
        reason = f"{'positions' if isinstance(single, ProbeReport) else 'masks'}: {tree}"
        positions.uninstall(self.model)
        chain = self._attempt("chain", self._chain_logits, pad_single)
        if isinstance(chain, ProbeReport):
            return replace(chain, reason=reason)
        return self._plain(f"{reason}; chain: {chain}")

    def _plain(self, reason: str) -> ProbeReport:
        """Plain decoding alone; whether the model's own cache may be fed several tokens at once is tried here."""
        try:
            cache = make_prompt_cache(self.model)
            logits = self.model(mx.array([[_TOKENS[node] for node in (0, 1, 2)]]), cache=cache)
            difference = _largest_difference({2: _row(logits[0, -1])}, self.reference)
            single_rows = difference > self.rounding
        except Exception:  # whatever a model raises, it can be fed one token at a time
            single_rows = True
        return ProbeReport("plain", reason, 0.0, self.vocab_size, False, False, single_rows, 0.0)

    def _attempt(
        self, capability: Capability, script: Callable[[Call, bool], Logits], padded: bool = False
    ) -> ProbeReport | str:
        """The report of a script that passes, its prompt read by the body or the whole model; else the problem."""
        problem = ""
        for pad_single in (True,) if padded else (False, True):
            close = False
            for prefill in [self.model] if self.body is None else [self.body, self.model]:
                try:
                    found = script(prefill, pad_single)
                    difference = _largest_difference(found, self.reference)
                    if self.tolerance < difference <= self.rounding:
                        # Kernels that only our cache gets, and padded rows, round in their own way.
                        difference = _largest_difference(found, self._plain_logits(pad_single))
                except Exception as error:  # a model may raise anything when it meets a tree
                    problem = f"{type(error).__name__}: {error}".splitlines()[0]
                    continue
                if difference <= self.tolerance:
                    body = prefill is not self.model
                    return ProbeReport(capability, "", difference, self.vocab_size, pad_single, body, False, 0.0)
                problem = f"logits differ from sequential ones by {difference:.2g}"
                close = close or difference <= self.rounding
            if not close:
                break
        return problem

    def _own_logits(self) -> Logits:
        """One token at a time through the model's own cache, copied where the tree branches."""
        caches: dict[int, Any] = {-1: make_prompt_cache(self.model)}
        for store, (keys, values) in zip(_stores(caches[-1]), self.history, strict=False):
            store.keys, store.values, store.offset = keys, values, keys.shape[2]
        rows: Logits = {}
        for node, parent in enumerate(_PARENTS):
            caches[node] = copy.deepcopy(caches[parent])
            logits = self.model(mx.array([[_TOKENS[node]]]), cache=caches[node])
            if node not in _PROMPT:
                rows[node] = _row(logits[0, -1])
        return rows

    def _plain_logits(self, pad_single: bool) -> Logits:
        """One token at a time through the lazy cache, depth first, cut back where the tree branches."""
        if pad_single not in self.plain:
            cache = self._cache()
            start = cache.length
            rows = self.plain.setdefault(pad_single, {})
            for node in _DEPTH_FIRST:
                cache.truncate(start + _depth(node))
                forward = run(self.model, [_TOKENS[node]], cache, None, pad_single)
                cache.commit(forward.slots)
                rows[node] = _row(forward.logits[0])
        return self.plain[pad_single]

    def _tree_logits(self, batches: Sequence[Sequence[int]], prefill: Call, pad_single: bool) -> Logits:
        cache = self._prefilled(prefill)
        slots = {_PROMPT[-1]: -1}
        rows: Logits = {}
        for nodes in batches:
            slots.update({node: cache.num_slots + i for i, node in enumerate(nodes)})
            parents = [slots[_PARENTS[node]] for node in nodes]
            logits = run(self.model, [_TOKENS[node] for node in nodes], cache, parents, pad_single).logits
            rows.update({node: _row(logits[i]) for i, node in enumerate(nodes)})
            if nodes[-1] == _COMMIT_AFTER:
                cache.commit([slots[node] for node in _COMMIT])
        return rows

    def _chain_logits(self, prefill: Call, pad_single: bool) -> Logits:
        cache = self._prefilled(prefill, linear=True)
        rows: Logits = {}
        # Each step: nodes forwarded as one chain, and how many of them are accepted.
        for nodes, accepted in (((2, 4, 6), 2), ((6, 7, 8), 2), ((9,), 0), ((9, 10), 2)):
            forward = run(self.model, [_TOKENS[node] for node in nodes], cache, None, pad_single)
            rows.update({node: _row(forward.logits[i]) for i, node in enumerate(nodes)})
            if accepted:
                cache.commit(forward.slots[:accepted])
            else:
                cache.rollback()
        return rows

    def _prefilled(self, prefill: Call, linear: bool = False) -> LazyKVCache:
        cache = self._cache(linear)
        cache.commit(run(prefill, [_TOKENS[node] for node in _PROMPT], cache).slots)
        return cache

    def _cache(self, linear: bool = False) -> LazyKVCache:
        cache = LazyKVCache.like(make_prompt_cache(self.model), linear)
        if self.history:
            cache.commit(cache.append(None, _LONG_HISTORY))
            for store, (keys, values) in zip(cache.stores, self.history, strict=True):
                store.keys, store.values = keys, values
        return cache


def _stores(caches: Sequence[Any]) -> list[Any]:
    """The caches of all layers with CacheLists unpacked, in the order of `LazyKVCache.stores`."""
    return [store for cache in caches for store in (cache.caches if hasattr(cache, "caches") else [cache])]


def _made_up_history(model: Module) -> list[tuple[mx.array, mx.array]]:
    """Random keys and values of `_LONG_HISTORY` tokens if a layer has several stores, else nothing."""
    caches = make_prompt_cache(model)
    stores = _stores(caches)
    if len(stores) == len(caches) or any(type(store) is not KVCache for store in stores):
        return []
    model(mx.array([[_TOKENS[0]]]), cache=caches)  # tells the shapes
    return [(_random_like(store.keys, i), _random_like(store.values, -i)) for i, store in enumerate(stores)]


def _random_like(rows: mx.array, seed: int) -> mx.array:
    batch, heads, _, dim = rows.shape
    shape = (batch, heads, _LONG_HISTORY, dim)
    return mx.random.normal(shape, key=mx.random.key(seed % 2**32)).astype(rows.dtype)


def _depth(node: int) -> int:
    """Nodes above ``node``, the prompt's included."""
    return 0 if _PARENTS[node] < 0 else 1 + _depth(_PARENTS[node])


def _row(logits: mx.array) -> npt.NDArray[np.float32]:
    return np.array(logits.astype(mx.float32))


def _largest_difference(found: Logits, reference: Logits) -> float:
    """Over the nodes of ``found``; infinity where one is NaN."""
    worst = 0.0
    for node, row in found.items():
        other = reference[node]
        with np.errstate(invalid="ignore"):
            difference = np.where(row == other, 0.0, np.abs(row - other))
        worst = max(worst, float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max()))
    return worst


def _computes_in_16_bits(model: Module) -> bool:
    # Layers on the CPU kernels widen their 16-bit weights exactly and compute in fp32.
    modules: list[Any] = [module for module in model.modules() if not computes_in_float32(module)]
    arrays = [value for module in modules for value in module.values() if isinstance(value, mx.array)]
    return any(p.dtype != mx.float32 for p in arrays if mx.issubdtype(p.dtype, mx.floating))


def _float32_tolerance() -> float:
    """Share of the logits' range that tree and sequential logits may differ by in fp32."""
    if mx.default_device() != mx.Device(mx.cpu):
        return _ROUNDING_ON_GPU
    return 0.0 if sys.platform == "linux" else _ROUNDING


class _InFloat32(Adaptation):
    """An embedding whose rows come in fp32. The rest follows: MLX computes in the wider of two types, one matrix
    after the other, and mlx-lm's models in the type of their input."""

    def __call__(self, ids: mx.array) -> mx.array:
        return super().__call__(ids).astype(mx.float32)


@contextlib.contextmanager
def _activations_in_float32(model: Module) -> Iterator[None]:
    """Let the model compute as a copy of it in fp32 would, but for what it makes of small parameters alone."""
    modules: Any = model.modules()
    embeddings = [module for module in modules if issubclass(own_class(module), Embedding | QuantizedEmbedding)]
    for module in embeddings:
        adapt(module, _InFloat32)
    try:
        yield
    finally:
        for module in embeddings:
            restore(module, _InFloat32)


def cached_probe(
    model: Module, config: Mapping[str, Any], folder: Path, run: Callable[[Module], ProbeReport]
) -> ProbeReport:
    """What `run(model)` finds, kept in `folder` for the same model, versions and device."""
    leaves: Any = tree_flatten(model.parameters())
    facts = [
        _FORMAT,
        {name: version(name) for name in ("llmcad-mlx", "mlx", "mlx-lm")},
        str(mx.default_device()),
        any(map(computes_in_float32, model.modules())),
        sorted(config.items(), key=lambda item: item[0]),
        [(name, list(value.shape), str(value.dtype)) for name, value in leaves],
    ]
    key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]
    file = folder / f"{key}.json"
    try:
        report = replace(ProbeReport(**json.loads(file.read_text())), seconds=0.0)  # those of another load
    except (OSError, ValueError, TypeError):
        report = run(model)
        with contextlib.suppress(OSError):
            write_text(file, json.dumps(asdict(report)))
    if report.capability == "tree":
        positions.install(model)  # as probing has done
    return report


def layer_kind(layer: Module) -> Hashable:
    """Equal for layers with the same classes, parameter shapes and settings; their numbers do not count."""
    leaves: Any = tree_flatten(layer.parameters())
    parameters = tuple(
        (path, tuple(value.shape), str(value.dtype)) for path, value in leaves if isinstance(value, mx.array)
    )
    settings = []
    modules: Any = layer.named_modules()
    for path, module in modules:
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        plain = {k: v for k, v in plain.items() if not k.startswith("_") and not any(n in k for n in _NUMBERING)}
        # By name: a layer that runs on kernels of ours has a class of its own.
        ancestry = tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
        settings.append((path, ancestry, tuple(sorted(plain.items()))))
    return (parameters, tuple(settings))


def representative_layers(layers: list[Module]) -> int:
    """How many leading layers hold one of every kind; two at least, where there are two."""
    firsts = {layer_kind(layer): number for number, layer in reversed(list(enumerate(layers, 1)))}
    return max([min(2, len(layers)), *firsts.values()])
