"""Which decoder layers of a model are alike, so that one can stand for the others in a load-time check."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

_NUMBERING = ("idx", "index", "layer_id", "number")


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


def representative_layers(layers: list[Module], at_least: int = 2) -> int:
    """How many leading layers hold one of every kind."""
    seen: set[Hashable] = set()
    count = min(at_least, len(layers))
    for number, layer in enumerate(layers, 1):
        kind = layer_kind(layer)
        if kind not in seen:
            seen.add(kind)
            count = max(count, number)
    return count
