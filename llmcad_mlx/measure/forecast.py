"""What speed a memory plan will give, and what more memory or a smaller draft would buy (DESIGN 3.7).

With W bytes streamed per pass, B bytes read per second, A tokens per pass, C(N) seconds of computing with N nodes
and D seconds of a round outside the pass: tokens/s = A / (max(W/B, C(N)) + D), and no more than A·B/W. Without a
draft it is 1 / max(W/B, C(1)), and no more than B/W. W comes from the plan; A, C, D and N are what this pair's own
rounds were like on this machine.

How fast a target's weights can be read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmcad_mlx.loader import PlannedPair
from llmcad_mlx.memory.plan import MemoryPlan, make_plan, streamed_choices
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.store.names import pair_profile_path
from llmcad_mlx.store.profile import PairProfile
from llmcad_mlx.streaming.storage import FileStorage, Storage
from llmcad_mlx.streaming.stream import Read

_SAMPLE_BYTES = 256 << 20
_SAMPLE_S = 2.0
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ReadRate:
    """`sampled_bytes`: how much was read to find out, 0 where the rate was given. `from_disk`: the page cache was
    emptied of the sample first."""

    bytes_per_s: float
    emulated: bool = False
    sampled_bytes: int = 0
    from_disk: bool = True


def measure_read_rate(reads: Sequence[Read]) -> ReadRate:
    """Read some of `reads`, up to 256 MB or 2 s. Raises StorageError for a file that cannot be read.

    Where the system lets go of cached pages on demand (Linux), the sample is read twice, and the second time
    counts. Elsewhere what the page cache holds comes from memory, and the disk may be slower.
    """
    can_drop = hasattr(os, "posix_fadvise")
    storage = FileStorage(drop_cache=can_drop)
    try:
        sample, rate = timed_read(reads, storage)
        if can_drop:
            sample, rate = timed_read(sample, storage)
    finally:
        storage.close()
    return ReadRate(rate, sampled_bytes=sum(read.num_bytes for read in sample), from_disk=can_drop)


def timed_read(
    reads: Sequence[Read], storage: Storage, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[Read], float]:
    """Read pieces of `reads` in order until there are enough; returns what was read, and bytes per second."""
    buffer, sample = memoryview(bytearray(_PIECE_BYTES)), []
    num_bytes, started = 0, clock()
    seconds = 0.0
    for piece in _pieces(reads):
        if num_bytes >= _SAMPLE_BYTES or seconds >= _SAMPLE_S:
            break
        storage.read_into(piece.file, piece.offset, buffer[: piece.num_bytes])
        sample.append(piece)
        num_bytes += piece.num_bytes
        seconds = clock() - started
    return sample, num_bytes / max(seconds, 1e-9)


def _pieces(reads: Sequence[Read]) -> Iterator[Read]:
    for read in reads:
        for start in range(0, read.num_bytes, _PIECE_BYTES):
            yield Read(read.file, read.offset + start, min(_PIECE_BYTES, read.num_bytes - start), 0)


_MORE = (25, 50, 100)  # per cent


@dataclass(frozen=True, slots=True)
class Measured:
    """What rounds of the pair have been like. Seconds. `streamed_bytes`: per pass when they were measured; None:
    all in memory."""

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
        """By the formulas of this module. rate: None where nothing is read."""
        read_s = streamed_bytes / rate.bytes_per_s if rate is not None else 0.0
        bound = 1.0 / read_s if read_s else None
        if measured is None:
            return cls(None, None, None, bound)
        a = measured.tokens_per_pass
        return cls(
            speculative=_per_second(a, max(read_s, measured.pass_s) + measured.rest_s),
            speculative_bound=None if bound is None else a * bound,
            plain=_per_second(1.0, max(read_s, measured.plain_pass_s)),
            plain_bound=bound,
        )


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan and its speeds. `name`: what is different."""

    name: str
    plan: MemoryPlan
    speeds: Speeds


@dataclass(frozen=True, slots=True)
class Forecast:
    """A planned pair's future. `larger`: with more memory; `drafts`: with other drafts, whose tokens per pass are
    not known."""

    rate: ReadRate | None
    """None: nothing is read."""
    measured: Measured | None
    speeds: Speeds
    larger: tuple[Alternative, ...]
    drafts: tuple[Alternative, ...]


def make_forecast(pair: PlannedPair) -> Forecast:
    """Predict. Reads some of the streamed weights where no rate was given. Raises StorageError."""
    plan, rate = pair.plan, _rate(pair)
    measured = find_measured(pair)
    return Forecast(
        rate=rate,
        measured=measured,
        speeds=Speeds.of(plan.streamed_bytes, rate, measured),
        larger=tuple(
            Alternative(name, other, Speeds.of(other.streamed_bytes, rate, measured))
            for name, other in _larger(pair)
        ),
        drafts=tuple(
            Alternative(name, other, _undrafted(other, rate, measured)) for name, other in _other_drafts(pair)
        ),
    )


def find_measured(pair: PlannedPair) -> Measured | None:
    """From the saved profile of this way of running, or of the most similar one that has run."""
    plan, rate = pair.plan, pair.options.read_bandwidth
    near = sorted(streamed_choices(pair.needs.sizes), key=lambda size: abs(size - plan.streamed_bytes))
    ways: list[tuple[int | None, float | None]] = [(size, rate) for size in near]
    if rate is not None:
        ways += [(size, None) for size in near]
    for streamed, bandwidth in (*ways, (None, None)):
        path = pair_profile_path(pair.names, streamed, bandwidth)
        costs = PairProfile(path).costs
        if costs.totals.rounds and costs.computing:
            return _measured(costs, streamed)
    return None


def _measured(costs: CostModel, streamed: int | None) -> Measured:
    totals = costs.totals
    nodes = totals.rows / totals.rounds
    return Measured(
        tokens_per_pass=totals.tokens / totals.rounds,
        nodes=nodes,
        pass_s=costs.computing.predict(max(round(nodes), 1)),
        plain_pass_s=costs.computing.predict(1),
        rest_s=totals.rest_s / totals.rounds,
        draft_step_s=costs.draft.predict(1) if costs.draft else None,
        streamed_bytes=streamed,
    )


def _rate(pair: PlannedPair) -> ReadRate | None:
    if pair.options.read_bandwidth is not None:
        return ReadRate(pair.options.read_bandwidth, emulated=True)
    reads = pair.weights.streamed_reads(pair.plan)
    return measure_read_rate(reads) if reads else None


def _larger(pair: PlannedPair) -> Iterator[tuple[str, MemoryPlan]]:
    """Larger budgets up to one with which nothing is read. What is pinned is up to the plan."""
    if not pair.plan.streamed_bytes:
        return
    base = pair.plan.budget_bytes or pair.plan.total_bytes
    for more in _MORE:
        plan = make_plan(pair.needs, base * (100 + more) // 100)
        yield f"+{more} %", plan
        if not plan.streamed_bytes:
            return
    whole = make_plan(pair.needs, None)
    yield "all resident", replace(whole, budget_bytes=whole.total_bytes)


def _other_drafts(pair: PlannedPair) -> Iterator[tuple[str, MemoryPlan]]:
    needs, budget = pair.needs, pair.plan.budget_bytes
    if not needs.draft_bytes or budget is None or not pair.plan.streamed_bytes:
        return
    half = replace(
        needs,
        draft_bytes=needs.draft_bytes // 2,
        draft_kv_bytes_per_token=needs.draft_kv_bytes_per_token // 2,
    )
    yield "draft half as large", make_plan(half, budget, pair.options.pinned)
    yield "no draft model", make_plan(needs.without_draft, budget, pair.options.pinned)


def _undrafted(plan: MemoryPlan, rate: ReadRate | None, measured: Measured | None) -> Speeds:
    return replace(Speeds.of(plan.streamed_bytes, rate, measured), speculative=None, speculative_bound=None)


def _per_second(tokens: float, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0.0 else None
