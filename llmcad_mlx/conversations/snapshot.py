"""A conversation's caches as values: taken out of an engine, kept in memory, put back.

What is kept are the keys and values of the tokens that target and draft model have read, and nothing else: no
random state (noise is keyed by position) and nothing drafted. So going on after a `restore` gives the text that
going on without it would have given; of a next prompt, what follows the first difference is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmcad_mlx.engine.session import Session, reusable_prefix
from llmcad_mlx.loader import LoadedPair
from llmcad_mlx.models.cache import LayerState, ModelCache

TARGET, DRAFT = "target", "draft"


@dataclass(frozen=True, slots=True)
class CachePart:
    """The cache of TARGET or DRAFT in an engine, and how many of its tokens are worth keeping, all committed."""

    model: str
    cache: ModelCache
    length: int


@dataclass(frozen=True, slots=True)
class PartSnapshot:
    """Copies of one model's keys and values for the first `length` tokens; None: a layer that has none.

    `least_length`: see `ModelCache`.
    """

    model: str
    length: int
    least_length: int
    layers: tuple[LayerState | None, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One conversation's caches, apart from the engine they come from.

    `tokens`: what the target has read, prompt and output. The copies are tight, so `nbytes` is what keeping the
    snapshot costs. `owner` names the engine: only that one takes it back.
    """

    tokens: tuple[int, ...]
    parts: tuple[PartSnapshot, ...]
    owner: object

    def reusable(self, prompt: Sequence[int]) -> int:
        """How many tokens of `prompt` the target would not read again."""
        return reusable_prefix(self.tokens, prompt, self.parts[0].least_length)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for part in self.parts for layer in part.layers if layer is not None)


def cache_parts(pair: LoadedPair, tokens: Sequence[int]) -> list[CachePart]:
    """The caches that hold a beginning of `tokens`, the target's first; [] where it has read nothing, cannot be
    cut down to `tokens`, or keeps a state that cannot be copied layer by layer (capability "plain")."""
    cache = pair.target.cache
    length = min(cache.length, len(tokens))
    if cache.capability == "plain" or not length or length < cache.least_length:
        return []
    parts = [CachePart(TARGET, cache, length)]
    for drafter in pair.drafters:
        read = min(drafter.num_cached, length)
        if drafter.cache is not None and read and read >= drafter.cache.least_length:
            parts.append(CachePart(DRAFT, drafter.cache, read))
    return parts


def take_snapshot(pair: LoadedPair, tokens: Sequence[int], owner: object) -> Snapshot | None:
    """Copy the caches that hold `tokens`; None where `cache_parts` finds none. Changes nothing."""
    parts = cache_parts(pair, tokens)
    if not parts:
        return None
    taken = tuple(
        PartSnapshot(p.model, p.length, p.cache.least_length, tuple(p.cache.states(p.length))) for p in parts
    )
    return Snapshot(tuple(tokens[: parts[0].length]), taken, owner)


def put_snapshot(pair: LoadedPair, session: Session, snapshot: Snapshot | None) -> None:
    """Make `snapshot` all that the session's caches hold; None empties them."""
    session.forget()
    if snapshot is None:
        return
    for part in snapshot.parts:
        cache_of(pair, part.model).restore(part.layers, part.length)
    session.resume(snapshot.tokens)


def cache_of(pair: LoadedPair, model: str) -> ModelCache:
    """The cache of TARGET or DRAFT. Raises ValueError where there is none."""
    for cache in [pair.target.cache] if model == TARGET else [drafter.cache for drafter in pair.drafters]:
        if cache is not None:
            return cache
    raise ValueError(f"there is no {model} whose cache could be restored")
