"""An mlx-lm model that forwards token trees, chains or single steps: whatever the probe found it can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from llmcad_mlx.models.cache import Capability, LazyKVCache, ModelCache, PlainCache
from llmcad_mlx.models.forward import Forward, body_of, run
from llmcad_mlx.models.probe import ProbeReport, probe

__all__ = ["Forward", "ModelCache", "TreeModel"]


class TreeModel:
    """Draft and target are both one of these.

    model: a loaded mlx-lm model. config: its config.json. report: what `probe` found (None: probe now).
    prefill_chunk: tokens that `prefill` forwards at a time. cache_options: `LazyKVCache` options such as
    ``max_dead_share``.
    """

    def __init__(
        self,
        model: Module,
        config: Mapping[str, Any],
        report: ProbeReport | None = None,
        prefill_chunk: int = 512,
        **cache_options: Any,
    ) -> None:
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.config = dict(config)
        self.report = report or probe(model)
        self._cache_options = cache_options
        self._prefill_call = (body_of(model) if self.report.body_prefills else None) or model

    @property
    def capability(self) -> Capability:
        """ "tree": any parents; "chain": a line whose rejected end can be dropped; "plain": append-only."""
        return self.report.capability

    @property
    def reason(self) -> str:
        """Why the capability is not "tree"."""
        return self.report.reason

    @property
    def vocab_size(self) -> int:
        """Columns of the logits; padded vocabularies have more than the tokenizer has tokens."""
        return self.report.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        leaves: Any = tree_flatten(self.model.parameters())
        return sum(array.nbytes for _, array in leaves)

    @property
    def context_length(self) -> int | None:
        """Tokens the model was made for, None when its config does not say."""
        for config in (self.config, self.config.get("text_config") or {}):
            for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
                if isinstance(config.get(name), int):
                    return int(config[name])
        return None

    @property
    def layers(self) -> list[Module]:
        """The decoder layers, in the order they run."""
        return list(self.model.layers)

    def new_cache(self) -> ModelCache:
        """An empty cache for one sequence; `PlainCache` for a "plain" model."""
        if self.capability == "plain":
            return PlainCache(lambda: make_prompt_cache(self.model))
        linear = self.capability == "chain"
        return LazyKVCache.like(make_prompt_cache(self.model), linear=linear, **self._cache_options)

    def forward(self, tokens: Sequence[int], cache: ModelCache, parents: Sequence[int] | None = None) -> Forward:
        """Append ``tokens`` below ``parents`` (see `SlotTable.append`; None: a chain); compute their logits.

        Nothing is evaluated yet, and nothing committed. Raises ValueError for parents that the capability
        excludes.
        """
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
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Append and commit ``tokens`` as a chain, ``chunk`` (None: `prefill_chunk`) at a time, without the head.

        Each chunk's keys and values are evaluated before the next. on_progress gets the number of tokens done
        so far; should_stop is asked before each chunk, and True ends the prefill there (``cache.length``
        tells where). An exception, Ctrl-C included, leaves the cache at the last finished chunk, or empty if
        it cannot roll back.
        """
        chunk = 1 if self.report.single_rows else chunk or self.prefill_chunk
        for start in range(0, len(tokens), chunk):
            if should_stop is not None and should_stop():
                return
            part = tokens[start : start + chunk]
            try:
                slots = run(self._prefill_call, part, cache, None, self.report.pad_single).slots
                mx.eval(cache.arrays())
            except BaseException:
                cache.rollback() if cache.can_rollback else cache.truncate(0)
                raise
            cache.commit(slots)
            if on_progress is not None:
                on_progress(start + len(part))
