"""The figures of a generation: as the JSON object of the command line's contract, as lines, and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from rich.table import Table

from llmcad_mlx.api import Engine, Response
from llmcad_mlx.machine import peak_rss_bytes
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.settings import GenerationOptions
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import device_name

_FIGURES = (
    "target_passes", "drafted", "tested", "accepted", "tokens_per_pass", "acceptance_rate", "prompt_s", "decode_s",
    "tokens_per_s", "draft_s", "verify_s", "io_wait_s", "other_s", "streamed_bytes", "near_ties",
)  # fmt: skip


@dataclass(slots=True)
class Answer:
    """What was generated so far."""

    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str = "interrupted"
    stats: GenerationStats = field(default_factory=GenerationStats)

    def add(self, response: Response) -> None:
        self.tokens.append(response.token)
        self.pieces.append(response.text)
        self.finish_reason = response.finish_reason or self.finish_reason
        self.stats = response.stats or self.stats

    def report(self, engine: Engine, options: GenerationOptions) -> dict[str, Any]:
        """All keys of the contract. Bytes in bytes, times in seconds; a budget of null means no limit was set."""
        plan = engine.pair.plan
        return {
            "text": "".join(self.pieces),
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.stats.prompt_tokens,
            "generated_tokens": len(self.tokens),
            "seed": options.sampling.seed,
            "policy": options.speculation.policy,
            "device": device_name(),
            "emulated": engine.pair.options.read_bandwidth is not None,
            **{name: getattr(self.stats, name) for name in _FIGURES},
            "budget_bytes": None if plan is None else plan.budget_bytes,
            "pinned_bytes": engine.pair.target.model.weight_bytes if plan is None else plan.pinned_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_mlx_bytes": mx.get_peak_memory(),
        }


def closing_lines(engine: Engine, stats: GenerationStats, in_full: bool) -> list[str]:
    """One line of speeds; in_full: also passes, acceptance, times and memory, and under a plan what was pinned,
    streamed and hidden."""
    plan = engine.pair.plan
    lines = [
        f"[prompt {stats.prompt_tokens} tokens, {stats.prompt_tokens_per_s:.0f} tokens/s; "
        f"generated {stats.generated_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s, "
        f"{stats.tokens_per_pass:.2f} tokens per pass{_emulated(engine, ';')}]"
    ]
    if not in_full:
        return lines
    near = f"; {stats.near_ties} near-ties, which rounding decides" if stats.near_ties else ""
    passes = f"{stats.target_passes} target passes, acceptance {stats.acceptance_rate:.0%}"
    lines.append(f"[{passes}; {_times(stats)}{near}]")
    if plan is None:
        lines.append(
            f"[memory {_memory(engine)}; drafted {stats.drafted}; tested {stats.tested}; "
            f"accepted {stats.accepted}]"
        )
    else:
        lines += [
            f"[memory {_memory(engine)}; target: {format_size(plan.pinned_bytes)} pinned, "
            f"{format_size(plan.streamed_bytes)} streamed per pass, "
            f"{format_size(stats.streamed_bytes)} in all]",
            f"[drafted {stats.drafted}, of them {stats.provisional} while weights loaded; tested {stats.tested}; "
            f"accepted {stats.accepted}; drafting survived {stats.survived} of {stats.target_passes} passes; "
            f"waited {stats.io_wait_s:.1f} of {stats.decode_s:.1f} s]",
        ]
    return lines


def status_line(engine: Engine, stats: GenerationStats | None, width: int) -> str:
    """Tokens/s, tokens per pass, and peak memory against the budget: what of it fits into so many columns."""
    figures = [f"memory {_memory(engine)}"]
    if stats is not None:
        figures[:0] = [f"{stats.tokens_per_s:.1f} tokens/s", f"{stats.tokens_per_pass:.2f} tokens per pass"]
    while len(figures) > 1 and len(" · ".join(figures)) > width:
        figures.pop()
    return " · ".join(figures)


def stats_table(engine: Engine, stats: GenerationStats) -> Table:
    """What an answer took, a row for each subject."""
    rows = {
        "prompt": f"{stats.prompt_tokens} tokens, {stats.reused_tokens} of them read before; "
        f"{stats.prompt_s:.2f} s",
        "answer": f"{stats.generated_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s",
        "target passes": f"{stats.target_passes}, {stats.tokens_per_pass:.2f} tokens per pass",
        "draft": f"{stats.drafted} drafted, {stats.tested} tested, {stats.accepted} accepted; "
        f"acceptance rate {stats.acceptance_rate:.0%}",
        "time": _times(stats),
        "memory": f"{_memory(engine)} at most",
    }
    if stats.streamed_bytes:
        rows["streamed"] = f"{format_size(stats.streamed_bytes)}{_emulated(engine, ',')}"
    return rows_table(rows)


def rows_table(rows: Mapping[str, str]) -> Table:
    """Names and what is said of them, without a frame."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _times(stats: GenerationStats) -> str:
    return (
        f"{stats.decode_s:.2f} s: drafting {stats.draft_s - stats.hidden_draft_s:.2f}, verifying "
        f"{stats.verify_s:.2f}, waiting for weights {stats.io_wait_s:.2f}"
    )


def _memory(engine: Engine) -> str:
    """The process's peak, and what it may use where that is limited."""
    plan = engine.pair.plan
    budget = "" if plan is None or plan.budget_bytes is None else f" of {format_size(plan.budget_bytes)}"
    return format_size(peak_rss_bytes()) + budget


def _emulated(engine: Engine, mark: str) -> str:
    """That slower storage was emulated, after a `mark`; "" where it was not."""
    rate = engine.pair.options.read_bandwidth
    return "" if rate is None else f"{mark} reads emulated at {format_size(round(rate))}/s"
