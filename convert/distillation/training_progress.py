"""How a training run reports: a bar on a terminal, and a line for each look at unseen texts."""

from __future__ import annotations

import math
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from .training import Progress


class Bars:
    """The bar of a run, on stderr where that is a terminal; the lines go to stdout.

    top-1, top-4: shares of the target's choices that are the student's first, or one of its first four.
    """

    def __init__(self, steps: int) -> None:
        """steps: of the whole run."""
        self.step = 0
        self.saved = 0
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bars = RichProgress(*columns, console=console, disable=not sys.stderr.isatty())
        self._task = self._bars.add_task("", total=steps)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Take in how the run stands."""
        self.step = progress.step
        known = math.isfinite(progress.loss)
        what = (
            f"loss {progress.loss:.3f}, {progress.tokens_per_s:,.0f} tokens/s" if known else "nothing learned yet"
        )
        self._bars.update(self._task, completed=progress.step, description=what)
        self.saved = progress.saved
        if progress.top1 is not None and progress.top4 is not None:
            first, four = 100 * progress.top1, 100 * progress.top4
            print(
                f"step {progress.step}: {what}; unseen texts: top-1 {first:.1f} %, top-4 {four:.1f} %", flush=True
            )
