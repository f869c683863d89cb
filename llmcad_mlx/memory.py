"""What a memory budget is spent on, and the speed to expect of that: pure arithmetic.

Everything the process holds is in the plan: interpreter and libraries, the draft, keys and values, logits and
activations, stream buffers, and as much of the target as there is room for. A pass reads every streamed byte once,
so only the number of bytes kept counts. Kept ("pinned") layers are spread over the depth: the disk stays busy.

With W bytes streamed per pass, B bytes read per second, A tokens per pass, C(N) seconds of computing with N nodes
and D seconds of a round outside the pass: tokens/s = A / (max(W/B, C(N)) + D), and no more than A·B/W. Without a
draft it is 1 / max(W/B, C(1)), and no more than B/W (DESIGN 3.7).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

from llmcad_mlx.errors import BudgetError
from llmcad_mlx.models.slots import most_capacity, most_window_capacity
from llmcad_mlx.policy.best_first import provisional_nodes
from llmcad_mlx.sizes import format_size

_CONTEXT_STEP = 64
_LOGIT_COPIES = 1.25  # the whole, and a piece of a streamed head
_RESERVE = 24 << 20  # the allocator's loose ends
_CACHE_SHARE = 32  # of a budget MLX may keep one part as freed memory, which a pass's temporaries are made of
LEAST_CACHE, _MOST_CACHE = 16 << 20, 256 << 20

# When MLX's Metal attention keeps no scores (mlx/backend/metal/scaled_dot_product_attention.cpp).
_VECTOR_ROWS, _VECTOR_HEADS = 8, 32  # up to so many rows, and rows times query heads of a key's head
_VECTOR_DIMS = frozenset((64, 96, 128, 256))
_TILED_DIMS = frozenset((64, 72, 80, 96, 128))


@dataclass(frozen=True, slots=True)
class Attention:
    """How a model attends with MLX's own operation, which keeps all scores where it has no kernel.

    `itemsize`: bytes of a score. `has_kernels`: on Metal, for usual shapes; elsewhere there are none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    has_kernels: bool

    def score_bytes(self, num_rows: int, num_keys: int) -> int:
        """The most that a layer's scores take in a forward of up to `num_rows` rows."""
        few = min(num_rows, _VECTOR_ROWS)
        if self.has_kernels:
            if self.head_dim in _TILED_DIMS:
                num_rows = few
            fits = few * self.heads <= _VECTOR_HEADS * max(self.kv_heads, 1)
            if num_rows == few and self.head_dim in _VECTOR_DIMS and fits:
                return 0
        return num_rows * num_keys * (self.heads * self.itemsize + 1)  # and the mask


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Bytes of one token's keys and values.

    `full`: in the layers that keep those of all tokens. `windowed`: pairs of a window and the bytes in the layers
    that have it.
    """

    full: int = 0
    windowed: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, layers: Iterable[tuple[int | None, int]]) -> TokenBytes:
        """layers: each one's window and bytes."""
        sums: dict[int | None, int] = {None: 0}
        for window, size in layers:
            sums[window] = sums.get(window, 0) + size
        return cls(sums.pop(None), tuple((window, size) for window, size in sums.items() if window is not None))

    def __add__(self, other: TokenBytes) -> TokenBytes:
        return TokenBytes(self.full + other.full, (*self.windowed, *other.windowed))

    def half(self) -> TokenBytes:
        return TokenBytes(self.full // 2, tuple((window, size // 2) for window, size in self.windowed))

    @property
    def total(self) -> int:
        return self.full + sum(size for _, size in self.windowed)

    def room(self, context: int, num_nodes: int, num_appended: int) -> int:
        """The most bytes for `context` tokens and `num_nodes` of a tree; num_appended: tokens read at once."""
        most = most_capacity(context + num_nodes)
        rows = max(num_nodes, num_appended)
        windowed = sum(size * min(most, most_window_capacity(window, rows)) for window, size in self.windowed)
        return self.full * most + windowed


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a target's parts.

    `layer_bytes`: what can be streamed of each decoder layer. `resident_bytes`: what always stays (norms, biases).
    `head_bytes`: 0 where the head is the embedding. `hidden`, `widest`: columns of residual stream and largest
    activation. `attention`: None where no layer keeps scores, as on the CPU kernels.
    """

    layer_bytes: tuple[int, ...]
    resident_bytes: int
    embedding_bytes: int
    head_bytes: int
    kv_bytes_per_token: TokenBytes
    logit_columns: int
    hidden: int
    widest: int
    attention: Attention | None = None

    @property
    def tied(self) -> bool:
        return self.head_bytes == 0

    @property
    def matrix_bytes(self) -> int:
        return self.embedding_bytes if self.tied else self.head_bytes

    @property
    def pass_bytes(self) -> int:
        """What a pass reads with nothing pinned."""
        return sum(self.layer_bytes) + self.matrix_bytes


@dataclass(frozen=True, slots=True)
class Pins:
    """What of a pass is kept: `num_layers` spread over the depth, and the head or not."""

    num_bytes: int
    num_layers: int
    head: bool

    @classmethod
    def all(cls, sizes: ModelSizes) -> Pins:
        return cls(sizes.pass_bytes, len(sizes.layer_bytes), True)

    @classmethod
    def of(cls, sizes: ModelSizes, allowance: int) -> Pins:
        """The choice that keeps the most bytes, `allowance` at most."""
        return max(
            (pins for pins in _choices(sizes) if pins.num_bytes <= allowance),
            key=lambda pins: pins.num_bytes,
            default=cls(0, 0, False),
        )


def _choices(sizes: ModelSizes) -> list[Pins]:
    """All that can be kept. Layers differ in size, so more of them need not be more bytes."""
    layers = sizes.layer_bytes
    counts = [(sum(layers[i] for i in spread(n, len(layers))), n) for n in range(len(layers) + 1)]
    with_head = (False, True) if sizes.matrix_bytes else (False,)
    return [Pins(size + sizes.matrix_bytes * head, n, head) for head in with_head for size, n in counts]


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` indices with gaps that differ by one at most."""
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


@dataclass(frozen=True, slots=True)
class Room:
    """What a plan makes room for. All of it can be made smaller before a budget is refused."""

    context: int
    max_nodes: int
    prefill_chunk: int
    num_buffers: int
    cache_bytes: int
    """Freed memory that MLX may keep."""

    def less(self, least: Room) -> Room | None:
        """A little less of it; None where nothing can be smaller. What costs little speed goes first."""
        if self.cache_bytes > least.cache_bytes:
            return replace(self, cache_bytes=max(self.cache_bytes // 2, least.cache_bytes))
        if self.context > 2 * least.context:
            return replace(self, context=self.context // 2)
        for name in ("max_nodes", "prefill_chunk"):
            if getattr(self, name) > 4 * getattr(least, name):
                return replace(self, **{name: getattr(self, name) // 2})
        if self.num_buffers > least.num_buffers:
            return replace(self, num_buffers=self.num_buffers - 1)
        for name in ("context", "max_nodes", "prefill_chunk"):
            size = getattr(least, name)
            if getattr(self, name) > size:
                return replace(self, **{name: max(getattr(self, name) // 2, size)})
        return None


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What a pair needs memory for.

    `runtime_bytes`: interpreter and libraries, as measured. `context`: tokens to make room for, or `min_context`.
    `loading_bytes`: the most the process takes while it loads, before there is a plan.
    """

    sizes: ModelSizes
    context: int
    min_context: int
    runtime_bytes: int
    draft_bytes: int = 0
    draft_kv_bytes_per_token: TokenBytes = TokenBytes()
    loading_bytes: int = 0

    def most_room(self, budget: int | None) -> Room:
        cache = _MOST_CACHE if budget is None else min(max(budget // _CACHE_SHARE, LEAST_CACHE), _MOST_CACHE)
        return Room(self.context, max_nodes=256, prefill_chunk=512, num_buffers=3, cache_bytes=cache)

    @property
    def least_room(self) -> Room:
        return Room(self.min_context, max_nodes=16, prefill_chunk=64, num_buffers=2, cache_bytes=LEAST_CACHE)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a budget is spent on, in bytes, and what follows from it.

    `streamed_bytes` are read on every pass, through `num_buffers` buffers. The head is cut into `head_pieces` no
    larger than a layer. An embedding that is not pinned is looked up on the disk row by row. `draft_kv_bytes` are
    those of `draft_bytes` that the draft's keys and values take, `cache_bytes` those of `work_bytes` that MLX may
    keep of what was freed.
    """

    budget_bytes: int | None
    runtime_bytes: int
    draft_bytes: int
    draft_kv_bytes: int
    resident_bytes: int
    kv_bytes: int
    work_bytes: int
    buffer_bytes: int
    pinned_bytes: int
    streamed_bytes: int
    pinned_layers: tuple[int, ...]
    pin_head: bool
    pin_embedding: bool
    head_pieces: int
    num_buffers: int
    max_nodes: int
    prefill_chunk: int
    context: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.runtime_bytes + self.draft_bytes + self.resident_bytes + self.kv_bytes + self.work_bytes
            + self.buffer_bytes + self.pinned_bytes
        )  # fmt: skip

    @property
    def spare_bytes(self) -> int:
        """What the budget leaves; negative where the plan does not fit."""
        return 0 if self.budget_bytes is None else self.budget_bytes - self.total_bytes


def make_plan(needs: MemoryNeeds, budget: int | None, pinned: int | None = None) -> MemoryPlan:
    """Spend `budget` bytes (None: no limit).

    pinned: bytes of the target's layers and head to keep, rounded down to whole ones; None: the plan decides. Then
    all are kept where the least room fits beside them. Otherwise half of what the budget has beyond the least room
    goes into more room, until it is the most, and the rest into pinned layers: more memory never streams more.

    Raises BudgetError naming the smallest budget that works.
    """
    sizes = needs.sizes
    if budget is not None and budget < needs.loading_bytes:
        raise _too_little(needs, budget, pinned)
    if pinned is None or pinned >= sizes.pass_bytes:
        for embedding in (False,) if sizes.tied else (True, False):
            plan = partial(_plan, needs, budget, Pins.all(sizes), embedding)
            room = _roomiest(needs, budget, plan)
            if room is not None:
                return _longest(needs, plan, room)
    if pinned is None:
        assert budget is not None
        streaming = partial(_plan, needs, None, Pins.of(sizes, 0), False)
        least, most = streaming(needs.least_room).total_bytes, streaming(needs.most_room(budget)).total_bytes
        extra = max(budget - least, 0)
        pins = Pins.of(sizes, extra - min(extra // 2, most - least))
    else:
        pins = Pins.of(sizes, pinned)
    room = _roomiest(needs, budget, partial(_plan, needs, budget, pins, False))
    if room is None:
        assert budget is not None
        raise _too_little(needs, budget, pinned)
    plan = partial(_plan, needs, budget, pins, not sizes.tied)
    if plan(room).spare_bytes < 0:
        plan = partial(_plan, needs, budget, pins, False)
    return _longest(needs, plan, room)


_SHARE = 0.70
_GPU_SHARE, _LEFT = 0.85, 0.35
"""Of the working set that Metal recommends: near it, models that are not wired ran 43 to 150 times slower. And
what stays for others: 16 GB Macs with more than that wired froze."""


def default_budget(
    weight_bytes: int, physical_bytes: int, working_set_bytes: int | None = None, runtime_bytes: int = 0
) -> int | None:
    """None where the weights fit into it, else 70 % of physical memory. Where a GPU recommends a working set, 85 %
    of that and what the process takes beside it, with 35 % of physical memory left over.

    runtime_bytes: what is taken beside the weights, outside the GPU's working set.
    """
    share = round(_SHARE * physical_bytes)
    if working_set_bytes is not None:
        share = min(round((1 - _LEFT) * physical_bytes), round(_GPU_SHARE * working_set_bytes) + runtime_bytes)
    return None if weight_bytes <= share else share


def wired_share(working_set_bytes: int) -> int:
    """The most of a GPU's working set to hold in memory whatever else wants it."""
    return round(_GPU_SHARE * working_set_bytes)


def _too_little(needs: MemoryNeeds, budget: int, pinned: int | None) -> BudgetError:
    sizes, choices = needs.sizes, [Pins.of(needs.sizes, pinned or 0)]
    if pinned is None or pinned >= sizes.pass_bytes:  # a model smaller than its buffers is better kept
        choices.append(Pins.all(sizes))
    running = min(_plan(needs, None, pins, False, needs.least_room).total_bytes for pins in choices)
    parts = f"interpreter and libraries {format_size(needs.runtime_bytes)}, draft {format_size(needs.draft_bytes)}"
    if needs.loading_bytes > running:
        parts = f"{parts}, more while they load"
    advice = "; a smaller draft, a shorter --context or --draft ngram lowers it" if needs.draft_bytes else ""
    least = -(-max(running, needs.loading_bytes) // 10**6)
    return BudgetError(
        f"memory: {format_size(budget)} is too little; the smallest that works is {least} MB ({parts}){advice}"
    )


def _roomiest(needs: MemoryNeeds, budget: int | None, plan: Callable[[Room], MemoryPlan]) -> Room | None:
    """The most room with which `plan` keeps to its budget."""
    room: Room | None = needs.most_room(budget)
    while room is not None and plan(room).spare_bytes < 0:
        room = room.less(needs.least_room)
    return room


def _longest(needs: MemoryNeeds, plan: Callable[[Room], MemoryPlan], room: Room) -> MemoryPlan:
    """`plan` with `room`, with which it fits, and as much more context as fits too."""

    def too_long(steps: int) -> bool:
        return plan(replace(room, context=room.context + steps * _CONTEXT_STEP)).spare_bytes < 0

    steps = range(-(-(needs.context - room.context) // _CONTEXT_STEP) + 1)
    context = room.context + (bisect_left(steps, True, key=too_long) - 1) * _CONTEXT_STEP
    return plan(replace(room, context=min(context, needs.context)))


def _plan(needs: MemoryNeeds, budget: int | None, pins: Pins, embedding: bool, room: Room) -> MemoryPlan:
    """The plan that keeps `pins`, whether or not it fits. embedding: keep one that is no head, too."""
    sizes = needs.sizes
    kv = sizes.kv_bytes_per_token.room(room.context, room.max_nodes, room.prefill_chunk)
    drafted = provisional_nodes(room.max_nodes)
    draft_kv = needs.draft_kv_bytes_per_token.room(room.context, drafted, room.prefill_chunk)
    logits = round(room.max_nodes * sizes.logit_columns * 4 * _LOGIT_COPIES)
    activations = room.prefill_chunk * (3 * sizes.widest + 6 * sizes.hidden) * 4
    if sizes.attention is not None:
        activations += sizes.attention.score_bytes(
            max(room.prefill_chunk, room.max_nodes), room.context + room.max_nodes
        )
    # A layer's rows are copied before they move.
    rows = sizes.kv_bytes_per_token.total * most_capacity(room.context + room.max_nodes)
    compacted = -(-rows // max(len(sizes.layer_bytes), 1))
    largest_layer = max(sizes.layer_bytes, default=0)
    head_pieces = max(-(-sizes.matrix_bytes // max(largest_layer, 1 << 20)), 1)
    # A piece of the head has a multiple of 64 rows, so it may be a little larger than a layer.
    piece = -(-sizes.matrix_bytes // head_pieces) + 64 * -(-sizes.matrix_bytes // max(sizes.logit_columns, 1))
    streamed = sizes.pass_bytes - pins.num_bytes
    return MemoryPlan(
        budget_bytes=budget,
        runtime_bytes=needs.runtime_bytes + _RESERVE,
        draft_bytes=needs.draft_bytes + draft_kv,
        draft_kv_bytes=draft_kv,
        resident_bytes=sizes.resident_bytes,
        kv_bytes=kv,
        work_bytes=logits + max(activations, compacted) + room.cache_bytes,
        buffer_bytes=room.num_buffers * max(largest_layer, piece) if streamed else 0,
        pinned_bytes=pins.num_bytes + sizes.embedding_bytes * embedding,
        streamed_bytes=streamed,
        pinned_layers=spread(pins.num_layers, len(sizes.layer_bytes)),
        pin_head=pins.head,
        pin_embedding=pins.head if sizes.tied else embedding,
        head_pieces=head_pieces,
        **asdict(room),
    )


@dataclass(frozen=True, slots=True)
class ReadRate:
    """`sampled_bytes`: how much was read to find out, 0 where the rate was given. `from_disk`: the page cache was
    emptied of the sample first."""

    bytes_per_s: float
    emulated: bool = False
    sampled_bytes: int = 0
    from_disk: bool = True


@dataclass(frozen=True, slots=True)
class Measured:
    """What rounds of the pair have been like. `streamed_bytes`: per pass, as measured; None: all in memory."""

    tokens_per_pass: float
    nodes: float
    pass_s: float
    """Computing of a pass with `nodes` nodes."""
    plain_pass_s: float
    """Computing of a pass with one node."""
    rest_s: float
    """A round without its pass."""
    draft_step_s: float | None
    """One token by the draft model; None without one."""
    streamed_bytes: int | None


@dataclass(frozen=True, slots=True)
class Speeds:
    """Predicted tokens per second; None: not known, for bounds also: nothing is read."""

    speculative: float | None
    speculative_bound: float | None
    plain: float | None
    plain_bound: float | None

    @classmethod
    def of(cls, streamed_bytes: int, rate: ReadRate | None, measured: Measured | None) -> Speeds:
        """By the formulas above. rate: None where nothing is read."""
        read_s = streamed_bytes / rate.bytes_per_s if rate is not None else 0.0
        bound = 1.0 / read_s if read_s else None
        if measured is None:
            return cls(None, None, None, bound)
        a = measured.tokens_per_pass
        return cls(
            speculative=_rate(a, max(read_s, measured.pass_s) + measured.rest_s),
            speculative_bound=bound and a * bound,
            plain=_rate(1.0, max(read_s, measured.plain_pass_s)),
            plain_bound=bound,
        )


def _rate(tokens: float, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0.0 else None


def larger_plans(needs: MemoryNeeds, plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Named plans of larger budgets, up to one with which nothing is read. What is pinned is up to the plan."""
    if not plan.streamed_bytes:
        return
    base = plan.budget_bytes or plan.total_bytes
    for more in (25, 50, 100):
        larger = make_plan(needs, base * (100 + more) // 100)
        yield f"+{more} %", larger
        if not larger.streamed_bytes:
            return
    yield "all resident", make_plan(needs, make_plan(needs, None).total_bytes)


def smaller_drafts(needs: MemoryNeeds, plan: MemoryPlan, pinned: int | None) -> Iterator[tuple[str, MemoryPlan]]:
    """Plans of the same budget for other drafts, each with its name; `pinned` as `make_plan` takes it."""
    budget = plan.budget_bytes
    if not needs.draft_bytes or budget is None or not plan.streamed_bytes:
        return
    half, half_kv = needs.draft_bytes // 2, needs.draft_kv_bytes_per_token.half()
    for name, weights, kv in (("draft half as large", half, half_kv), ("no draft model", 0, TokenBytes())):
        smaller = replace(needs, draft_bytes=weights, draft_kv_bytes_per_token=kv)
        yield name, make_plan(smaller, budget, pinned)
