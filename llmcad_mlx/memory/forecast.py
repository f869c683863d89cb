"""The speed that a memory plan will give, and the plans for more memory or a smaller draft (DESIGN 3.7): pure
arithmetic.

With W bytes streamed per pass, B bytes read per second, A tokens per pass, C(N) seconds of computing with N nodes
and D seconds of a round outside the pass: tokens/s = A / (max(W/B, C(N)) + D), and no more than A·B/W. Without a
draft it is 1 / max(W/B, C(1)), and no more than B/W.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmcad_mlx.memory import MemoryNeeds, MemoryPlan, make_plan

_MORE = (25, 50, 100)  # per cent


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
    def of(
        cls, streamed_bytes: int, rate: ReadRate | None, measured: Measured | None, drafted: bool = True
    ) -> Speeds:
        """By the formulas above. rate: None where nothing is read. drafted: whether A is known for this
        draft."""
        read_s = streamed_bytes / rate.bytes_per_s if rate is not None else 0.0
        bound = 1.0 / read_s if read_s else None
        if measured is None:
            return cls(None, None, None, bound)
        a = measured.tokens_per_pass if drafted else None
        return cls(
            speculative=a and _rate(a, max(read_s, measured.pass_s) + measured.rest_s),
            speculative_bound=a and bound and a * bound,
            plain=_rate(1.0, max(read_s, measured.plain_pass_s)),
            plain_bound=bound,
        )


def _rate(tokens: float, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0.0 else None


def larger_plans(needs: MemoryNeeds, plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Plans of larger budgets, each with its name, up to one with which nothing is read. What is pinned is up to
    the plan."""
    if not plan.streamed_bytes:
        return
    base = plan.budget_bytes or plan.total_bytes
    for more in _MORE:
        larger = make_plan(needs, base * (100 + more) // 100)
        yield f"+{more} %", larger
        if not larger.streamed_bytes:
            return
    whole = make_plan(needs, None)
    yield "all resident", replace(whole, budget_bytes=whole.total_bytes)


def smaller_drafts(needs: MemoryNeeds, plan: MemoryPlan, pinned: int | None) -> Iterator[tuple[str, MemoryPlan]]:
    """Plans of the same budget for other drafts, each with its name; `pinned` as `make_plan` takes it."""
    budget = plan.budget_bytes
    if not needs.draft_bytes or budget is None or not plan.streamed_bytes:
        return
    half, half_kv = needs.draft_bytes // 2, needs.draft_kv_bytes_per_token // 2
    for name, weights, kv in (("draft half as large", half, half_kv), ("no draft model", 0, 0)):
        smaller = replace(needs, draft_bytes=weights, draft_kv_bytes_per_token=kv)
        yield name, make_plan(smaller, budget, pinned)
