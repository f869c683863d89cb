"""What a memory budget is spent on: pure arithmetic.

Everything the process holds is in the plan: interpreter and libraries, the draft, keys and values, logits and
activations, stream buffers, and as much of the target as is left room for (`pinning`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

from llmcad_mlx.errors import BudgetError
from llmcad_mlx.models.slots import most_capacity
from llmcad_mlx.sizes import format_size
from llmcad_mlx.target.needs import MemoryNeeds, Room
from llmcad_mlx.target.pinning import Pins, spread
from llmcad_mlx.tree.throughput import provisional_nodes

_CONTEXT_STEP = 64
_LOGIT_COPIES = 1.25  # the whole, and a piece of a streamed head
_RESERVE = 24 << 20  # the allocator's loose ends


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a budget is spent on, in bytes, and what follows from it.

    `streamed_bytes` are read on every pass, through `num_buffers` buffers. The head is cut into `head_pieces` no
    larger than a layer. An embedding that is not pinned is looked up on the disk row by row. `draft_kv_bytes` are
    those of `draft_bytes` that the draft's keys and values take.
    """

    budget_bytes: int | None
    runtime_bytes: int
    draft_bytes: int
    draft_kv_bytes: int
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


def make_plan(needs: MemoryNeeds, budget: int | None, pinned: int | None = None) -> MemoryPlan:
    """Spend `budget` bytes (None: no limit).

    pinned: bytes of the target's layers and head to keep, rounded down to whole ones; None: up to the plan. Then
    all is kept where that leaves the least room to work in. Otherwise half of what goes beyond the least room is
    given to more of it, until there is all that was asked for, and the rest pins: more memory never streams more.

    Raises BudgetError naming the smallest budget that works.
    """
    sizes = needs.sizes
    for with_embedding in (False,) if sizes.tied else (True, False):
        plan = _kept(needs, budget, pinned, with_embedding)
        if plan is not None:
            return plan
    least = _streaming(needs, needs.least_room).total_bytes
    if pinned is not None:
        allowance = pinned
    else:
        assert budget is not None  # without a limit all is kept
        extra = max(budget - least, 0)
        wanted = _streaming(needs, needs.most_room).total_bytes - least
        allowance = extra - min(extra // 2, wanted)
    pins = Pins.of(sizes, allowance)
    if budget is not None and budget < least + pins.num_bytes:
        raise _too_little(needs, budget, pinned)
    return _streamed(needs, budget, pins)


def _too_little(needs: MemoryNeeds, budget: int, pinned: int | None) -> BudgetError:
    least = [_streaming(needs, needs.least_room).total_bytes + Pins.of(needs.sizes, pinned or 0).num_bytes]
    if (
        pinned is None or pinned >= needs.sizes.pass_bytes
    ):  # a model smaller than its stream buffers is better kept
        least.append(_common(needs, needs.least_room).total_bytes + needs.sizes.pass_bytes)
    parts = f"interpreter and libraries {format_size(needs.runtime_bytes)}, draft {format_size(needs.draft_bytes)}"
    advice = "; a smaller draft, a shorter --context or --draft ngram lowers it" if needs.draft_bytes else ""
    return BudgetError(
        f"memory: {format_size(budget)} is too little; the smallest that works is {_rounded_up(min(least))} "
        f"({parts}){advice}"
    )


def default_budget(weight_bytes: int, physical_bytes: int) -> int | None:
    """None where the weights fit into 70 % of physical memory, else that share of it."""
    share = physical_bytes * 7 // 10
    return None if weight_bytes <= share else share


def _kept(needs: MemoryNeeds, budget: int | None, pinned: int | None, with_embedding: bool) -> MemoryPlan | None:
    """The plan under which a pass reads nothing; None where it is not wanted or does not fit.

    with_embedding: keep one that is no head, too.
    """
    sizes = needs.sizes
    if pinned is not None and pinned < sizes.pass_bytes:
        return None

    def plan(room: Room) -> MemoryPlan:
        return replace(
            _common(needs, room),
            budget_bytes=budget,
            pinned_layers=tuple(range(len(sizes.layer_bytes))),
            pin_head=True,
            pin_embedding=sizes.tied or with_embedding,
            pinned_bytes=sizes.pass_bytes + sizes.embedding_bytes * with_embedding,
        )

    room = _roomiest(needs, budget, plan)
    return None if room is None else plan(_longer(needs, plan(room), room))


def _streamed(needs: MemoryNeeds, budget: int | None, pins: Pins) -> MemoryPlan:
    """The plan that keeps `pins`, for which there is room."""
    sizes = needs.sizes

    def plan(room: Room, with_embedding: bool = False) -> MemoryPlan:
        return replace(
            _streaming(needs, room),
            budget_bytes=budget,
            pinned_layers=spread(pins.num_layers, len(sizes.layer_bytes)),
            pin_head=pins.head,
            pin_embedding=pins.head if sizes.tied else with_embedding,
            pinned_bytes=pins.num_bytes + sizes.embedding_bytes * with_embedding,
            streamed_bytes=sizes.pass_bytes - pins.num_bytes,
        )

    room = _roomiest(needs, budget, plan)
    assert room is not None
    embedding = not sizes.tied and (budget is None or plan(room, with_embedding=True).total_bytes <= budget)
    return plan(_longer(needs, plan(room, embedding), room), embedding)


def _roomiest(needs: MemoryNeeds, budget: int | None, plan: Callable[[Room], MemoryPlan]) -> Room | None:
    """The most room with which `plan` fits."""
    room: Room | None = needs.most_room
    while room is not None and budget is not None and plan(room).total_bytes > budget:
        room = room.less()
    return room


def _longer(needs: MemoryNeeds, plan: MemoryPlan, room: Room) -> Room:
    """`room` with as much more context as what `plan`, made with it, has left."""
    each = needs.sizes.kv_bytes_per_token + needs.draft_kv_bytes_per_token
    if plan.budget_bytes is None or not each:
        return replace(room, context=needs.context)

    def more_bytes(steps: int) -> int:
        return sum(_kv_bytes(needs, replace(room, context=room.context + steps * _CONTEXT_STEP))) - now

    now = sum(_kv_bytes(needs, room))
    steps = range(-(-(needs.context - room.context) // _CONTEXT_STEP) + 1)
    most = bisect_right(steps, plan.spare_bytes, key=more_bytes) - 1
    return replace(room, context=min(room.context + max(most, 0) * _CONTEXT_STEP, needs.context))


def _kv_bytes(needs: MemoryNeeds, room: Room) -> tuple[int, int]:
    """Keys and values of the target, and of the draft."""
    target, draft = room.context + room.max_nodes, room.context + provisional_nodes(room.max_nodes)
    return (
        needs.sizes.kv_bytes_per_token * most_capacity(target),
        needs.draft_kv_bytes_per_token * most_capacity(draft),
    )


def _streaming(needs: MemoryNeeds, room: Room) -> MemoryPlan:
    """The plan with buffers and nothing pinned."""
    plan, sizes = _common(needs, room), needs.sizes
    # A piece of the head has a multiple of 64 rows, so it may be a little larger than a layer.
    piece = -(-sizes.matrix_bytes // plan.head_pieces) + 64 * -(-sizes.matrix_bytes // max(sizes.logit_columns, 1))
    return replace(plan, buffer_bytes=room.num_buffers * max(sizes.largest_layer, piece))


def _common(needs: MemoryNeeds, room: Room) -> MemoryPlan:
    """What does not depend on what is pinned."""
    sizes = needs.sizes
    kv, draft_kv = _kv_bytes(needs, room)
    logits = round(room.max_nodes * sizes.logit_columns * 4 * _LOGIT_COPIES)
    activations = room.prefill_chunk * (3 * sizes.widest + 6 * sizes.hidden) * 4
    return MemoryPlan(
        budget_bytes=None,
        runtime_bytes=needs.runtime_bytes + _RESERVE,
        draft_bytes=needs.draft_bytes + draft_kv,
        draft_kv_bytes=draft_kv,
        resident_bytes=sizes.resident_bytes,
        kv_bytes=kv,
        work_bytes=logits + activations,
        buffer_bytes=0,
        pinned_layers=(),
        pin_head=False,
        pin_embedding=False,
        pinned_bytes=0,
        streamed_bytes=0,
        head_pieces=max(-(-sizes.matrix_bytes // max(sizes.largest_layer, 1 << 20)), 1),
        num_buffers=room.num_buffers,
        max_nodes=room.max_nodes,
        prefill_chunk=room.prefill_chunk,
        context=room.context,
    )


def _rounded_up(num_bytes: int) -> str:
    return f"{-(-num_bytes // 10**6)} MB"
