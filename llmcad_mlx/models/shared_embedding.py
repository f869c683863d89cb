"""A draft without an embedding of its own: it looks tokens up in the target's, which is in memory anyway.

config.json says so: `"llmcad": {"shares_embedding": true}`. It is the target's object that is called, so that it
works whatever the target does with it: in memory, or read from the disk row by row. Its bytes count as the
target's. Such a folder may also leave the tokenizer out, and says by `"vocabulary"` beside it, a
`vocabulary_hash`, which tokens it was made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.quantized import QuantizedEmbedding

from llmcad_mlx.errors import ModelError
from llmcad_mlx.models.trimmed_head import parent_of

_STAND_IN_ROWS = 64


@dataclass(frozen=True, slots=True)
class TokenEmbedding:
    """Where a model looks tokens up. The sizes are kept because a streamed module does not know them."""

    module: Any
    path: str
    num_rows: int
    width: int


def shares_embedding(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that the model uses its target's embedding."""
    own = config.get("llmcad")
    return isinstance(own, Mapping) and own.get("shares_embedding") is True


def token_embedding(model: Module) -> TokenEmbedding | None:
    """The model's embedding with the most rows (others are of positions or token types); None: it has none."""
    modules: Any = model.named_modules()
    found = [
        TokenEmbedding(module, path, int(module["weight"].shape[0]), _width(module))
        for path, module in modules
        if isinstance(module, Embedding | QuantizedEmbedding)
    ]
    return max(found, key=lambda embedding: embedding.num_rows, default=None)


def share(model: Module, shared: TokenEmbedding | None, what: str) -> None:
    """Let a freshly built model use `shared` in place of its own embedding.

    None: a made-up one, enough to examine the model. Raises ModelError, beginning with `what`, for an embedding
    of another width.
    """
    own = token_embedding(model)
    if own is None:
        raise ModelError(f"{what}: the model has no embedding that could be shared; choose another draft")
    if shared is not None and shared.width != own.width:
        raise ModelError(
            f"{what}: uses its target's embedding and needs one {own.width} wide, not {shared.width}; "
            "choose the target that it was made for"
        )
    parent, name = parent_of(model, own.path)
    parent[name] = _StandIn(own.width) if shared is None else _Shared(shared.module)


class _Shared(Module):
    def __init__(self, embedding: Any) -> None:
        super().__init__()
        # In a function, so that it is neither a parameter nor a module of this model: nothing prepares, counts or
        # writes it twice. Its class is looked up at each call, because streaming changes it.
        self._look_up = lambda ids: embedding(ids)

    def __call__(self, ids: mx.array) -> mx.array:
        return self._look_up(ids)


class _StandIn(Module):
    """Random rows, always the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rows = mx.random.normal((_STAND_IN_ROWS, width), key=mx.random.key(0))
        self._look_up = lambda ids: rows[ids % _STAND_IN_ROWS]

    def __call__(self, ids: mx.array) -> mx.array:
        return self._look_up(ids)


def _width(module: Any) -> int:
    return int(module.dims) if isinstance(module, QuantizedEmbedding) else int(module["weight"].shape[1])
