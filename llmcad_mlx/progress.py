"""How long jobs report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


class Progress:
    """Where a long job reports: bars on a stream that is a terminal, a line for each stage on another one, nothing
    without a stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self.bars = stream is not None and stream.isatty()
        """Whether moving bars may be drawn."""

    @contextmanager
    def stage(self, what: str, num_bytes: int) -> Iterator[Advance]:
        """A part of the job that handles `num_bytes`: `with progress.stage(…) as advance`."""
        if not self.bars:
            self.note(f"{what} ({num_bytes / 1e6:,.0f} MB)")
            yield lambda _: None
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=Console(file=self._stream)) as bars:
            task = bars.add_task(what, total=num_bytes)
            yield lambda done: bars.update(task, advance=done)

    def note(self, text: str) -> None:
        """One line."""
        if self._stream is not None:
            print(text, file=self._stream, flush=True)


def progress_for(shown: bool) -> Progress:
    """Progress on stderr, or none."""
    return Progress(sys.stderr if shown else None)
