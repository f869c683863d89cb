"""What a draft's folder may leave out of the model that its config.json describes: head rows, the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from llmcad_mlx.errors import ModelError
from llmcad_mlx.models.shared_embedding import TokenEmbedding, share, shares_embedding
from llmcad_mlx.models.trimmed_head import FILE, TokenList, give_rows


class DraftParts:
    """Makes a freshly built model fit the weights of a draft's folder."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], tokens: TokenList | None, shared: TokenEmbedding | None
    ) -> None:
        """tokens: of a trimmed head. shared: the target's embedding, for a draft that uses it; see `share`."""
        self.tokens = tokens
        self._folder = folder
        self._config = config
        self._shared = shared
        self._head = ""

    def fit(self, model: Module) -> None:
        """Change the model before weights are loaded into it. Raises ModelError where it cannot be."""
        if shares_embedding(self._config):
            share(model, self._shared, str(self._folder))
        if self.tokens is not None:
            self._head = give_rows(model, len(self.tokens), str(self._folder / FILE))

    def check(self, weights: Mapping[str, mx.array]) -> None:
        """Raise ModelError unless the head has as many rows as there are tokens."""
        head = weights.get(f"{self._head}.weight")
        if self.tokens is not None and head is not None and head.shape[0] != len(self.tokens):
            raise ModelError(
                f"{self._folder / FILE}: lists {len(self.tokens)} tokens for a head of {head.shape[0]} rows; "
                "make the draft again"
            )


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the full embedding by config.json, None where it does not say."""
    for place in (config, config.get("text_config") or {}):
        size = place.get("vocab_size")
        if isinstance(size, int):
            return size
    return None


def drafts_only(config: Mapping[str, Any], tokens: TokenList | None) -> str:
    """Why a model can only draft; "" for one that can also be a target."""
    reasons = []
    if tokens is not None:
        size = vocabulary_size(config)
        reasons.append(f"its head has {len(tokens):,} of {f'{size:,}' if size else 'all'} tokens")
    if shares_embedding(config):
        reasons.append("it uses its target's embedding")
    return " and ".join(reasons)
