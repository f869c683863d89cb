"""What commands print beside the text: a closing line of figures, a prompt progress line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from llmcad_mlx.stats import GenerationStats

_SHOW_AFTER_S = 0.5


def closing_line(stats: GenerationStats) -> str:
    """Tokens/s, tokens per pass, acceptance and passes, in one line."""
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
