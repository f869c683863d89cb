"""What commands print beside the text: a closing line of figures, a prompt progress line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmcad_mlx.sizes import format_size
from llmcad_mlx.stats import GenerationStats

if TYPE_CHECKING:
    from llmcad_mlx.loader import MemoryOptions
    from llmcad_mlx.target.plan import MemoryPlan

_SHOW_AFTER_S = 0.5


def closing_lines(
    stats: GenerationStats, plan: MemoryPlan | None = None, options: MemoryOptions | None = None
) -> list[str]:
    """Tokens/s, tokens per pass, acceptance and passes; under a plan also what was pinned, streamed and hidden."""
    lines = [_speed_line(stats)]
    if plan is not None:
        lines += _streaming_lines(stats, plan, options)
    return lines


def _streaming_lines(stats: GenerationStats, plan: MemoryPlan, options: MemoryOptions | None) -> list[str]:
    from llmcad_mlx.machine import peak_rss_bytes

    budget = f" of {format_size(plan.budget_bytes)}" if plan.budget_bytes is not None else ""
    rate = options.read_bandwidth if options is not None else None
    emulated = f"; reads emulated at {format_size(round(rate))}/s" if rate is not None else ""
    return [
        f"[memory {format_size(peak_rss_bytes())}{budget}; target: {format_size(plan.pinned_bytes)} pinned, "
        f"{format_size(plan.streamed_bytes)} streamed per pass, "
        f"{format_size(stats.streamed_bytes)} in all{emulated}]",
        f"[drafted {stats.drafted}, of them {stats.provisional} while weights loaded; tested {stats.tested}; "
        f"accepted {stats.accepted}; drafting survived {stats.survived} of {stats.target_passes} passes; "
        f"waited {stats.io_wait_s:.1f} of {stats.decode_s:.1f} s]",
    ]


def _speed_line(stats: GenerationStats) -> str:
    return (
        f"[prompt {stats.prompt_tokens} tokens, {stats.prompt_tokens_per_s:.0f} tokens/s; "
        f"generated {stats.generated_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s; "
        f"{stats.tokens_per_pass:.2f} tokens per pass, {stats.target_passes} target passes, "
        f"acceptance {stats.acceptance_rate:.0%}]"
    )


class PromptProgress:
    """A line on a terminal while a long prompt is processed; gone when the first token comes."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._started = time.monotonic()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if self._enabled and (self._shown or time.monotonic() - self._started > _SHOW_AFTER_S):
            self._shown = True  # before it is: Ctrl-C may come in between
            print(f"\rprompt: {done}/{total} tokens", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Take the line away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = self._enabled = False


@contextmanager
def prompt_progress(enabled: bool) -> Iterator[PromptProgress]:
    """A `PromptProgress` that is taken away whatever happens."""
    progress = PromptProgress(enabled)
    try:
        yield progress
    finally:
        progress.finish()
