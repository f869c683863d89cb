"""Figures of a chat: the status line and the table of `/stats`."""

from __future__ import annotations

from rich.table import Table

from llmcad_mlx.api import Engine
from llmcad_mlx.machine import peak_rss_bytes
from llmcad_mlx.sizes import format_size
from llmcad_mlx.stats import GenerationStats


def status_line(engine: Engine, stats: GenerationStats | None) -> str:
    """Tokens/s, tokens per pass, and peak memory against the budget."""
    parts = (
        []
        if stats is None
        else [f"{stats.tokens_per_s:.1f} tokens/s", f"{stats.tokens_per_pass:.2f} tokens per pass"]
    )
    return " · ".join([*parts, f"memory {memory(engine)}"])


def memory(engine: Engine) -> str:
    """The process's peak, and what it may use where that is limited."""
    plan = engine.pair.plan
    budget = "" if plan is None or plan.budget_bytes is None else f" of {format_size(plan.budget_bytes)}"
    return format_size(peak_rss_bytes()) + budget


def stats_table(engine: Engine, stats: GenerationStats) -> Table:
    """What the last answer took."""
    table = Table(box=None, show_header=False, pad_edge=False)
    rate = engine.pair.options.read_bandwidth
    rows = [
        (
            "prompt",
            f"{stats.prompt_tokens} tokens, {stats.reused_tokens} of them read before; {stats.prompt_s:.2f} s",
        ),
        ("answer", f"{stats.generated_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s"),
        ("target passes", f"{stats.target_passes}, {stats.tokens_per_pass:.2f} tokens per pass"),
        (
            "draft",
            f"{stats.drafted} drafted, {stats.tested} tested, {stats.accepted} accepted; "
            f"acceptance rate {stats.acceptance_rate:.0%}",
        ),
        (
            "time",
            f"{stats.decode_s:.2f} s: drafting {stats.draft_s - stats.hidden_draft_s:.2f}, verifying "
            f"{stats.verify_s:.2f}, waiting for weights {stats.io_wait_s:.2f}",
        ),
        ("memory", f"{memory(engine)} at most"),
    ]
    if stats.streamed_bytes:
        emulated = "" if rate is None else f", reads emulated at {format_size(round(rate))}/s"
        rows.append(("streamed", f"{format_size(stats.streamed_bytes)}{emulated}"))
    for name, value in rows:
        table.add_row(name, value)
    return table
