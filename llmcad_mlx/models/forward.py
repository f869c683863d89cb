"""One forward of an mlx-lm model over the tokens announced to a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from llmcad_mlx.models.cache import ModelCache


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

    pad_single: a single token is forwarded twice and the second row dropped, for models whose arithmetic
    depends on whether one or several rows come together. Raises ValueError when the output is not one row
    per token.
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
    if not layers:
        return None
    paths = [path for path, module in model.named_modules() if module is layers[0]]
    if len(paths) != 1 or paths[0].count(".") < 2:
        return None
    body: Any = model
    for name in paths[0].split(".")[:-2]:
        body = body[int(name)] if isinstance(body, list) else getattr(body, name)
    return body if isinstance(body, Module) else None
