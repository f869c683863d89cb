"""An mlx-lm model that forwards token trees, chains or single steps: whatever the probe found it can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_reduce
from mlx_lm.models.cache import make_prompt_cache

from llmcad_mlx.models.cache import Capability, LazyKVCache, ModelCache, PlainCache
from llmcad_mlx.models.config import context_length


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What `models.probe.probe` found."""

    capability: Capability
    reason: str
    """Why it is not "tree": what is missing (positions, masks, rollback) and what showed it."""
    max_difference: float
    """Largest difference to plain decoding of what was found (0.0: bit for bit)."""
    vocab_size: int
    """Columns of the logits, padding included."""
    pad_single: bool
    """The model computes one row differently from several, so single tokens are forwarded twice."""
    body_prefills: bool
    """The model's body, without its head, fills the cache as the whole model does."""
    single_rows: bool
    """Only with "plain": several tokens at once fail or give other logits than one at a time."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward returns; nothing is evaluated yet."""

    slots: range
    logits: mx.array
    """(N, V), row i belongs to slots[i]."""


def run(
    call: Callable[..., mx.array],
    tokens: Sequence[int],
    cache: ModelCache,
    parents: Sequence[int] | None = None,
    pad_single: bool = False,
) -> Forward:
    """Announce ``tokens`` to the cache and call the model (or its body) on them.

    pad_single: a single token is forwarded twice and the second row dropped, for models that compute one row in
    another way than several. Raises ValueError when the output is not one row per token.
    """
    rows = list(tokens)
    if pad_single and len(tokens) == 1:
        rows *= 2
        parents = [-1 if parents is None else parents[0], cache.num_slots]
    slots = cache.append(parents, len(rows))
    out = call(mx.array([rows]), cache=cache.layers)
    if out.ndim != 3 or out.shape[:2] != (1, len(rows)):
        raise ValueError(f"{len(rows)} tokens gave an output of shape {out.shape}")
    if len(rows) > len(tokens):
        cache.drop_appended(1)
    return Forward(slots[: len(tokens)], out[0, : len(tokens)])


def body_of(model: Module) -> Module | None:
    """The part of the model that holds the layers but not the head (``model.model`` in most), or None."""
    layers = getattr(model, "layers", None)
    modules: dict[str, Any] = dict(model.named_modules())
    paths = [path for path, module in modules.items() if layers and module is layers[0]]
    if len(paths) != 1 or paths[0].count(".") < 2:
        return None
    body = modules.get(paths[0].rsplit(".", 2)[0])
    return body if isinstance(body, Module) else None


class TreeModel:
    """Draft and target are both one of these.

    model: a loaded mlx-lm model. config: its config.json. report: what `probe` found.
    prefill_chunk: tokens that `prefill` forwards at a time.
    """

    def __init__(
        self, model: Module, config: Mapping[str, Any], report: ProbeReport, prefill_chunk: int = 512
    ) -> None:
        self.model = model
        self.config = dict(config)
        self.report = report
        self.prefill_chunk = prefill_chunk
        self._prefill_call = (body_of(model) if report.body_prefills else None) or model

    @property
    def capability(self) -> Capability:
        return self.report.capability

    @property
    def vocab_size(self) -> int:
        """Columns of the logits; padded vocabularies have more than the tokenizer has tokens."""
        return self.report.vocab_size

    @property
    def weight_bytes(self) -> int:
        total: int = tree_reduce(lambda total, array: total + array.nbytes, self.model.parameters(), 0)
        return total

    @property
    def context_length(self) -> int | None:
        """See `config.context_length`."""
        return context_length(self.config)

    def new_cache(self) -> ModelCache:
        """An empty cache for one sequence; `PlainCache` for a "plain" model."""
        if self.capability == "plain":
            return PlainCache(lambda: make_prompt_cache(self.model))
        return LazyKVCache.like(make_prompt_cache(self.model), linear=self.capability == "chain")

    def forward(self, tokens: Sequence[int], cache: ModelCache, parents: Sequence[int] | None = None) -> Forward:
        """Append ``tokens`` below ``parents`` (see `SlotTable.append`); compute their logits, unevaluated. Raises
        ValueError for parents that the capability excludes."""
        if self.report.single_rows and len(tokens) > 1:
            slots = cache.append(parents, len(tokens))
            rows = [self.model(mx.array([[token]]), cache=cache.layers)[0] for token in tokens]
            return Forward(slots, mx.concatenate(rows))
        return run(self.model, tokens, cache, parents, self.report.pad_single)

    def prefill(
        self,
        tokens: Sequence[int],
        cache: ModelCache,
        chunk: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Append and commit ``tokens`` as a chain, ``chunk`` (None: `prefill_chunk`) at a time, without the head.

        Each chunk is evaluated before the next. on_progress gets the number of tokens done so far. An exception,
        its own and Ctrl-C included, leaves the cache at the last finished chunk, or empty if it cannot roll back.
        """
        chunk = 1 if self.report.single_rows else chunk or self.prefill_chunk
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            try:
                slots = run(self._prefill_call, part, cache, None, self.report.pad_single).slots
                mx.eval(cache.arrays())
            except BaseException:
                cache.truncate(0) if cache.capability == "plain" else cache.rollback()
                raise
            cache.commit(slots)
            if on_progress is not None:
                on_progress(start + len(part))
