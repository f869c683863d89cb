"""What a memory budget is spent on: pure arithmetic.

Everything the process holds is in the plan: interpreter and libraries, the draft, keys and values, logits and
activations, stream buffers, and as much of the target as is left room for. Pinned layers are spread evenly over
the depth, so that the disk is busy while they compute (DESIGN 3.5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmcad_mlx.errors import BudgetError
from llmcad_mlx.sizes import format_size
from llmcad_mlx.tree.throughput import provisional_nodes

_MIN_NODES = 16
_MIN_CHUNK = 64
_MIN_BUFFERS = 2
_LOGIT_COPIES = 1.25  # the whole, and a piece of a streamed head
_KV_GROWTH = 1.25  # buffers grow by a quarter
_RESERVE = 24 << 20  # the allocator's loose ends


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a target's parts. `layer_bytes`: what can be streamed of each decoder layer. `resident_bytes`: what
    always stays (norms, biases). `head_bytes` is 0 where the head is the embedding. `hidden`, `widest`: columns of
    the residual stream and of the largest activation."""

    layer_bytes: tuple[int, ...]
    resident_bytes: int
    embedding_bytes: int
    head_bytes: int
    kv_bytes_per_token: int
    logit_columns: int
    hidden: int
    widest: int

    @property
    def total_bytes(self) -> int:
        """All weights."""
        return sum(self.layer_bytes) + self.resident_bytes + self.embedding_bytes + self.head_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a budget is spent on, in bytes, and what follows from it.

    `streamed_bytes` are read on every pass, through `num_buffers` buffers. The head is cut into `head_pieces` no
    larger than a layer. An embedding that is not pinned is looked up on the disk row by row.
    """

    budget_bytes: int | None
    runtime_bytes: int
    draft_bytes: int
    resident_bytes: int
    kv_bytes: int
    work_bytes: int
    buffer_bytes: int
    pinned_layers: tuple[int, ...]
    pin_head: bool
    pin_embedding: bool
    pinned_bytes: int
    streamed_bytes: int
    head_pieces: int
    num_buffers: int
    max_nodes: int
    prefill_chunk: int
    context: int

    @property
    def total_bytes(self) -> int:
        """What the plan adds up to."""
        return (
            self.runtime_bytes + self.draft_bytes + self.resident_bytes + self.kv_bytes + self.work_bytes
            + self.buffer_bytes + self.pinned_bytes
        )  # fmt: skip

    @property
    def spare_bytes(self) -> int:
        """What the budget leaves."""
        return 0 if self.budget_bytes is None else self.budget_bytes - self.total_bytes

    @property
    def all_resident(self) -> bool:
        """Nothing is read while decoding."""
        return self.streamed_bytes == 0 and self.pin_embedding


@dataclass(frozen=True, slots=True)
class _Room:
    """What can be given up before a budget is refused."""

    max_nodes: int
    prefill_chunk: int
    num_buffers: int
    context: int
    min_context: int

    def less(self) -> _Room | None:
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
class _Needs:
    sizes: ModelSizes
    pinned: int | None
    runtime_bytes: int
    draft_bytes: int
    draft_kv_bytes_per_token: int


def make_plan(
    sizes: ModelSizes,
    *,
    budget: int | None,
    pinned: int | None = None,
    context: int,
    min_context: int | None = None,
    max_nodes: int = 256,
    prefill_chunk: int = 512,
    num_buffers: int = 3,
    runtime_bytes: int,
    draft_bytes: int = 0,
    draft_kv_bytes_per_token: int = 0,
) -> MemoryPlan:
    """Spend `budget` bytes (None: no limit).

    pinned: bytes of the target's layers and head to keep; None: as many as fit. min_context: what `context` may be
    cut to (None: nothing is cut). Context, trees, prompt chunks and buffers are made smaller before a budget is
    refused. Raises BudgetError naming the smallest budget that works.
    """
    needs = _Needs(sizes, pinned, runtime_bytes, draft_bytes, draft_kv_bytes_per_token)
    least_context = context if min_context is None else min(min_context, context)
    room: _Room | None = _Room(max_nodes, prefill_chunk, num_buffers, context, least_context)
    while room is not None:
        plan = _fill(needs, budget, room)
        if plan is not None:
            return plan
        room = room.less()
    least = _smallest_budget(needs, least_context)
    parts = f"interpreter and libraries {format_size(runtime_bytes)}, draft {format_size(draft_bytes)}"
    advice = "; a smaller draft, a shorter --context or --draft ngram lowers it" if draft_bytes else ""
    raise BudgetError(
        f"memory: {format_size(budget or 0)} is too little; the smallest that works is {_rounded_up(least)} "
        f"({parts}){advice}"
    )


def _smallest_budget(needs: _Needs, context: int) -> int:
    """The least bytes with which `make_plan` succeeds."""
    room = _Room(_MIN_NODES, _MIN_CHUNK, _MIN_BUFFERS, context, context)
    streamed = _fill(replace(needs, pinned=needs.pinned or 0), None, room)
    # A model smaller than its stream buffers is better kept.
    whole = _fill(replace(needs, pinned=None), None, room)
    assert streamed is not None  # without a limit everything fits
    assert whole is not None
    return streamed.total_bytes if needs.pinned is not None else min(streamed.total_bytes, whole.total_bytes)


def default_budget(weight_bytes: int, physical_bytes: int) -> int | None:
    """None where the weights fit into 70 % of physical memory, else that share of it."""
    share = physical_bytes * 7 // 10
    return None if weight_bytes <= share else share


def _fill(needs: _Needs, budget: int | None, room: _Room) -> MemoryPlan | None:
    """The plan with this much room, or None where it does not fit."""
    sizes, pinned = needs.sizes, needs.pinned
    tokens = room.context + room.max_nodes
    kv = round(sizes.kv_bytes_per_token * tokens * _KV_GROWTH)
    drafted = room.context + provisional_nodes(room.max_nodes)
    draft_kv = round(needs.draft_kv_bytes_per_token * drafted * _KV_GROWTH)
    logits = round(room.max_nodes * sizes.logit_columns * 4 * _LOGIT_COPIES)
    activations = room.prefill_chunk * (3 * sizes.widest + 6 * sizes.hidden) * 4
    layers, tied = sizes.layer_bytes, sizes.head_bytes == 0
    head = sizes.embedding_bytes if tied else sizes.head_bytes
    largest = max(layers, default=0)
    pieces = max(-(-head // max(largest, 1 << 20)), 1) if head else 1
    fixed = MemoryPlan(
        budget_bytes=budget,
        runtime_bytes=needs.runtime_bytes + _RESERVE,
        draft_bytes=needs.draft_bytes + draft_kv,
        resident_bytes=sizes.resident_bytes,
        kv_bytes=kv,
        work_bytes=logits + activations,
        buffer_bytes=0,
        pinned_layers=(),
        pin_head=False,
        pin_embedding=False,
        pinned_bytes=0,
        streamed_bytes=0,
        head_pieces=pieces,
        num_buffers=room.num_buffers,
        max_nodes=room.max_nodes,
        prefill_chunk=room.prefill_chunk,
        context=room.context,
    )
    whole = replace(
        fixed,
        pinned_layers=tuple(range(len(layers))),
        pin_head=True,
        pin_embedding=True,
        pinned_bytes=sum(layers) + sizes.embedding_bytes + sizes.head_bytes,
    )
    if (budget is None or whole.total_bytes <= budget) and (pinned is None or pinned >= sum(layers) + head):
        return whole
    # A piece of the head has a multiple of 64 rows, so it may be a little larger than a layer.
    unit = max(largest, -(-head // pieces) + 64 * -(-head // max(sizes.logit_columns, 1)))
    fixed = replace(fixed, buffer_bytes=room.num_buffers * unit)
    left = None if budget is None else budget - fixed.total_bytes
    if left is not None and (left < 0 or left < (pinned or 0)):
        return None
    allowance = left if pinned is None else pinned
    assert allowance is not None  # no limit and nothing said about pinning: the whole fits
    return _pin(fixed, sizes, allowance, left)


def _pin(plan: MemoryPlan, sizes: ModelSizes, allowance: int, left: int | None) -> MemoryPlan:
    """Pin up to `allowance` bytes of what is read on every pass, then the embedding if `left` has room for it."""
    layers, tied = sizes.layer_bytes, sizes.head_bytes == 0
    head = sizes.embedding_bytes if tied else sizes.head_bytes
    largest = max(layers, default=0)
    best: tuple[int, bool, int] = (0, False, 0)  # bytes pinned, the head among them, number of layers
    for with_head in (False, True):
        rest = allowance - head * with_head
        if rest < 0:
            continue
        count = min(rest // largest, len(layers)) if largest else len(layers)
        chosen = sum(layers[number] for number in _spread(count, len(layers)))
        if chosen + head * with_head > best[0]:
            best = (chosen + head * with_head, with_head, count)
    num_bytes, with_head, count = best
    embedding = tied and with_head
    extra = 0
    if not tied and (left is None or num_bytes + sizes.embedding_bytes <= left):
        embedding, extra = True, sizes.embedding_bytes
    return replace(
        plan,
        pinned_layers=_spread(count, len(layers)),
        pin_head=with_head,
        pin_embedding=embedding,
        pinned_bytes=num_bytes + extra,
        streamed_bytes=sum(layers) + head - num_bytes,
    )


def _spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` indices with gaps that differ by one at most."""
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


def _rounded_up(num_bytes: int) -> str:
    return f"{-(-num_bytes // 10**6)} MB"
