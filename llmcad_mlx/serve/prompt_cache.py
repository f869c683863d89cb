"""The caches of several conversations: the engine keeps one, the others wait here as copies.

A request that goes on with one of them reads only what is new, whoever asked in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmcad_mlx.api import Engine
from llmcad_mlx.conversations.snapshot import Snapshot
from llmcad_mlx.engine.session import common_prefix
from llmcad_mlx.machine import physical_memory_bytes
from llmcad_mlx.sizes import parse_size

_SHARE = 0.05  # of the budget, or of the machine's memory
_MOST = 1 << 30
_WORTH_KEEPING = 32  # tokens; fewer are read again faster than they are copied there and back


def cache_limit(size: str, budget_bytes: int | None) -> int:
    """Bytes for copies: "auto" is a twentieth of the budget, else of the machine's memory, but not above 1 GiB.

    Raises UsageError for what is no size.
    """
    if size != "auto":
        return parse_size(size, "prompt-cache")
    memory = physical_memory_bytes() if budget_bytes is None else budget_bytes
    return min(round(memory * _SHARE), _MOST)


class PromptCache:
    """Snapshots of conversations, at most `limit_bytes` of them; the least recently used goes first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._kept: list[Snapshot] = []  # the latest last

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(snapshot.nbytes for snapshot in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def switch(self, engine: Engine, prompt: Sequence[int]) -> None:
        """Bring the engine to the conversation that `prompt` goes on with.

        What the engine would lose by it is kept, if there is room.
        """
        present = engine.tokens
        common = common_prefix(present, prompt)
        best = max(self._kept, key=lambda kept: common_prefix(kept.tokens, prompt), default=None)
        found = 0 if best is None else common_prefix(best.tokens, prompt)
        if best is not None and found < common + _WORTH_KEEPING:
            best = None
        lost = len(present) - (common if best is None else 0)
        if lost >= _WORTH_KEEPING:
            self._keep(engine, len(present), best)
        if best is None:
            return
        engine.restore(best)
        self._kept = [kept for kept in self._kept if kept is not best]
        if len(best.tokens) - found >= _WORTH_KEEPING:
            self._kept.append(best)  # another conversation that begins alike; it may go on too

    def _keep(self, engine: Engine, num_tokens: int, needed: Snapshot | None) -> None:
        """Copy the `num_tokens` that the engine holds; `needed` stays, whatever has to go for it."""
        size = _bytes_per_token(engine) * num_tokens
        if size + (0 if needed is None else needed.nbytes) > self._limit:
            return
        for oldest in [kept for kept in self._kept if kept is not needed]:
            if self.nbytes + size <= self._limit:
                break
            self._kept.remove(oldest)
        snapshot = engine.snapshot()
        if snapshot is None:
            return
        # A copy that begins another is the same conversation, earlier.
        tokens = snapshot.tokens
        self._kept = [kept for kept in self._kept if common_prefix(kept.tokens, tokens) < len(kept.tokens)]
        self._kept.append(snapshot)


def _bytes_per_token(engine: Engine) -> int:
    """What a copy of the target's and the draft's caches costs; known beforehand, so that the limit holds."""
    caches = [engine.pair.target.cache, *(drafter.cache for drafter in engine.pair.drafters)]
    return sum(cache.slot_nbytes for cache in caches if cache is not None and cache.can_rollback)
