"""Saved caches back into an engine, where they fit.

They are trusted only after all of this fits: versions, device, both models' files, token ids, sha256, shapes and
types, and at last the keys and values of the first tokens, which are computed again: other weights give others.
Else they are left out, and why is said; the conversation is then read again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from llmcad_mlx.conversations.file import (
    SavedConversation,
    belongings,
    draft_digest,
    has_right_digest,
    saved_layers,
)
from llmcad_mlx.conversations.snapshot import DRAFT, TARGET, cache_of
from llmcad_mlx.engine.session import Session
from llmcad_mlx.loader import LoadedPair
from llmcad_mlx.models.cache import LayerState

_COMPARED = 8  # first tokens, computed again


class CacheMismatchError(ValueError):
    """Saved caches that are not those of this conversation with these models."""


def restore_caches(saved: SavedConversation, pair: LoadedPair, session: Session) -> list[str]:
    """Put a file's caches into the session where they fit; returns one line for each that is left out, and why.

    Whatever the file holds, the engine works afterwards, and its text is that of a conversation read afresh.
    """
    session.forget()
    if saved.cache is None:
        return []
    try:
        tokens = _checked_tokens(saved, pair)
        _restore(saved, TARGET, pair, tokens)
    except Exception as error:  # whatever a damaged or made-up file leads to
        session.forget()
        return [f"the saved cache is not used: {_reason(error)}; the conversation is read again"]
    session.resume(tokens)
    if DRAFT not in saved.cache["lengths"]:
        return []
    try:
        if saved.cache["belongs_to"]["draft"] != draft_digest(pair):
            raise CacheMismatchError("it is from another draft")
        _restore(saved, DRAFT, pair, tokens)
    except Exception as error:
        for drafter in pair.drafters:
            drafter.truncate(0)
        return [f"the draft's saved cache is not used: {_reason(error)}; the draft reads the conversation again"]
    return []


def _checked_tokens(saved: SavedConversation, pair: LoadedPair) -> list[int]:
    """All that can be checked before the bytes are looked at, then the bytes' digest."""
    facts: dict[str, Any] = saved.cache or {}
    for name, value in belongings(pair).items():
        if name != "draft" and facts["belongs_to"][name] != value:
            raise CacheMismatchError(f"it is from another {name}")
    tokens = facts["tokens"]
    if not all(type(token) is int and 0 <= token < pair.vocab_size for token in tokens) or not tokens:
        raise CacheMismatchError("its tokens are not the model's")
    if len(tokens) != facts["lengths"][TARGET] or len(tokens) > (pair.context_length or math.inf):
        raise CacheMismatchError("it is longer than the model's context")
    if not has_right_digest(saved.path):
        raise CacheMismatchError("its checksum is wrong, the file is damaged")
    return list(tokens)


def _restore(saved: SavedConversation, model: str, pair: LoadedPair, tokens: Sequence[int]) -> None:
    facts: dict[str, Any] = saved.cache or {}
    length, on_kernels = facts["lengths"][model], facts["on_host"][model]
    if type(length) is not int or not 0 < length <= len(tokens):
        raise CacheMismatchError(f"{length!r} is not a number of tokens")
    cache = cache_of(pair, model)
    count = min(_COMPARED, length)
    _read_again(pair, model, tokens[:count])
    computed = list(cache.states(count))
    if len(on_kernels) != len(computed):
        raise CacheMismatchError("it has another number of layers")
    for ours, stored in zip(computed, saved_layers(saved.path, model, on_kernels), strict=True):
        _compare(ours, stored, count)
    cache.restore(saved_layers(saved.path, model, on_kernels), length)


def _read_again(pair: LoadedPair, model: str, tokens: Sequence[int]) -> None:
    """Let the model read the first tokens into its empty cache."""
    if model == TARGET:
        pair.target.prefill(tokens, lambda done: None, lambda: False)
        return
    for drafter in pair.drafters:
        if drafter.cache is not None:  # it leaves the last token for its first round
            drafter.prefill([*tokens, tokens[-1]], lambda done: None, lambda: False)


def _compare(computed: LayerState | None, stored: LayerState | None, count: int) -> None:
    """Raise CacheMismatchError unless `stored` begins with `computed`, but for rounding."""
    if computed is None or stored is None:
        if computed is not stored:
            raise CacheMismatchError("its layers are of another kind")
        return
    if not computed.fits(stored):
        raise CacheMismatchError("its layers have other shapes or types")
    for ours, theirs in ((computed.keys, stored.keys), (computed.values, stored.values)):
        tolerance = 1e-3 if ours.dtype == mx.float32 else 5e-2
        a, b = ours.astype(mx.float32), theirs[:, :count].astype(mx.float32)
        if not bool(mx.all(mx.abs(a - b) <= tolerance * mx.max(mx.abs(a))).item()):  # NaN fails, too
            raise CacheMismatchError("the model computes other values")


def _reason(error: Exception) -> str:
    """The middle of a one-line message."""
    if isinstance(error, CacheMismatchError):
        return str(error)
    return f"it cannot be read ({type(error).__name__})"
