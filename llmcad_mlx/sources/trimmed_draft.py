"""Drafts with a trimmed output vocabulary, made from drafts with a full one.

A draft step spends much of its time on the head: a row for each of 50,000 to 150,000 tokens, of which a few
thousand make up most of any text. The copy keeps the rows of those; what it cannot propose the target writes
itself, so the text stays the same. The format is that of `models.trimmed_head`. Copies are kept in
`trimmed-drafts/` of the cache folder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.models.loading import LoadedModel, load_model_folder
from llmcad_mlx.models.trimmed_head import (
    TokenList,
    check_token_list,
    head_path,
    parent_of,
    untied,
    untied_head_path,
)
from llmcad_mlx.sources.kept_copy import digest, kept_copy
from llmcad_mlx.sources.mlx_folder import weights_of, write_weights
from llmcad_mlx.sources.new_folder import check_destination
from llmcad_mlx.sources.progress import NoProgress, Progress

KIND = "trimmed-drafts"


def trimmed_draft(draft: Path, tokens: Iterable[int], progress: Progress | None = None) -> Path:
    """The folder of a copy of the model in `draft` that proposes only `tokens`, made where it is not there yet.

    tokens: full ids in any order. See `token_counts.most_frequent` for a choice of them. What the folder holds is
    as `write_trimmed_draft` writes it; it can be given as a draft. A copy of what the model was before it changed
    is removed. Raises the errors of `write_trimmed_draft`.
    """
    wanted = _token_list(tokens)
    what = f"{len(wanted)}tokens-{digest(str(wanted.tolist()))}"
    return kept_copy(draft, KIND, what, lambda folder: write_trimmed_draft(draft, folder, wanted, progress))


def write_trimmed_draft(
    source: Path, dest: Path, tokens: Iterable[int], progress: Progress | None = None
) -> TokenList:
    """Write a copy of the model in the folder `source` to the new folder `dest`, with the head's rows of `tokens`.

    Where the head is the embedding, its rows are copied from there, quantised ones bit for bit; the embedding
    stays whole. `dest` appears complete or not at all. Returns the tokens in ascending order.
    Raises UsageError for an empty list and a destination that is not free, ModelError for a model that cannot be
    trimmed and tokens it does not have, DiskError when the copy does not fit the disk.
    """
    wanted = _token_list(tokens)
    check_destination(dest)
    loaded = load_model_folder(source, lazy=True, alone=True)
    if loaded.draft_tokens is not None:
        raise ModelError(f"{source}: is trimmed already; trim the model that it was made from")
    config = _trim(loaded, wanted)
    weights = weights_of(replace(loaded, draft_tokens=wanted), loaded.model, config)
    name = f"{source.resolve().name} with {len(wanted)} output tokens"
    del loaded  # its arrays must be in `weights` alone
    write_weights(source, dest, weights, name, progress or NoProgress())
    return wanted


def _token_list(tokens: Iterable[int]) -> TokenList:
    wanted = np.unique(np.array([int(token) for token in tokens], np.int64))
    if not len(wanted):
        raise UsageError("tokens: the list is empty; give the tokens that the draft may propose")
    if wanted[0] < 0 or wanted[-1] > np.iinfo(np.int32).max:
        raise UsageError(f"tokens: {wanted[0] if wanted[0] < 0 else wanted[-1]} is not a token id")
    return wanted.astype(np.int32)


def _trim(loaded: LoadedModel, tokens: TokenList) -> dict[str, Any]:
    """Give the lazily loaded model a head of the rows `tokens`; returns the config that goes with it."""
    real = max(loaded.tokenizer.get_vocab().values(), default=-1) + 1
    check_token_list(tokens, real, str(loaded.path))
    config = copy.deepcopy(loaded.config)
    path = head_path(loaded.model)
    if path is not None:
        parent, name = parent_of(loaded.model, path)
        parent[name] = _rows(parent[name], tokens)
        return config
    path, embedding = untied_head_path(config), loaded.embedding
    if path is None or embedding is None:
        raise ModelError(
            f"{loaded.path}: {config['model_type']!r} has no head of its own, so its vocabulary cannot be "
            "trimmed; choose another draft"
        )
    parent, name = parent_of(loaded.model, path)
    parent[name] = _rows(embedding.module, tokens)
    config = untied(config)
    for key in ("quantization", "quantization_config"):
        settings = config.get(key)
        if isinstance(settings, dict) and embedding.path in settings:
            settings[path] = settings[embedding.path]
    return config


def _rows(module: Any, tokens: TokenList) -> Module:
    """The arrays of a matrix's rows `tokens`, under their names."""
    num_rows = module["weight"].shape[0]
    chosen = Module()  # type: ignore[no-untyped-call]
    ids = mx.array(tokens)
    for name, value in module.items():
        if isinstance(value, mx.array):
            per_row = value.ndim > 0 and value.shape[0] == num_rows
            chosen[name] = mx.take(value, ids, axis=0) if per_row else value
    return chosen
