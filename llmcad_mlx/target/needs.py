"""What a pair needs memory for whatever the budget is, and what can be given up before a budget is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmcad_mlx.target.pinning import ModelSizes

_MIN_NODES = 16
_MIN_CHUNK = 64
_MIN_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Room:
    """What can be given up before a budget is refused."""

    max_nodes: int
    prefill_chunk: int
    num_buffers: int
    context: int
    min_context: int

    def less(self) -> Room | None:
        """A little less of it; None when there is nothing to give up."""
        if self.context > 2 * self.min_context:
            return replace(self, context=self.context // 2)
        if self.max_nodes > 4 * _MIN_NODES:
            return replace(self, max_nodes=self.max_nodes // 2)
        if self.prefill_chunk > 4 * _MIN_CHUNK:
            return replace(self, prefill_chunk=self.prefill_chunk // 2)
        if self.num_buffers > _MIN_BUFFERS:
            return replace(self, num_buffers=self.num_buffers - 1)
        if self.context > self.min_context:
            return replace(self, context=max(self.context // 2, self.min_context))
        if self.max_nodes > _MIN_NODES:
            return replace(self, max_nodes=max(self.max_nodes // 2, _MIN_NODES))
        if self.prefill_chunk > _MIN_CHUNK:
            return replace(self, prefill_chunk=max(self.prefill_chunk // 2, _MIN_CHUNK))
        return None


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What a budget is asked for, whatever it is. `runtime_bytes`: interpreter and libraries, as they are.
    `context`: tokens to make room for, `min_context`: what they may be cut to."""

    sizes: ModelSizes
    context: int
    min_context: int
    runtime_bytes: int
    draft_bytes: int = 0
    draft_kv_bytes_per_token: int = 0
    max_nodes: int = 256
    prefill_chunk: int = 512
    num_buffers: int = 3

    @property
    def without_draft(self) -> MemoryNeeds:
        """The same for the target alone."""
        return replace(self, draft_bytes=0, draft_kv_bytes_per_token=0)

    @property
    def most_room(self) -> Room:
        """What is made room for where memory allows."""
        return Room(self.max_nodes, self.prefill_chunk, self.num_buffers, self.context, self.min_context)

    @property
    def least_room(self) -> Room:
        """What is made room for where it does not."""
        return Room(_MIN_NODES, _MIN_CHUNK, _MIN_BUFFERS, self.min_context, self.min_context)
