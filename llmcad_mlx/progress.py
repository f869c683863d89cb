"""How long jobs report: a bar on a terminal, one line per stage elsewhere, always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


class Progress(Protocol):
    """Where a long job reports."""

    @property
    def bars(self) -> bool:
        """Whether moving bars may be drawn on stderr."""

    def stage(self, what: str, num_bytes: int) -> AbstractContextManager[Advance]:
        """A part of the job that handles `num_bytes`: `with progress.stage(…) as advance`."""

    def note(self, text: str) -> None:
        """One line."""


class NoProgress:
    """Reports nothing."""

    bars = False

    @contextmanager
    def stage(self, what: str, num_bytes: int) -> Iterator[Advance]:
        yield lambda _: None

    def note(self, text: str) -> None:
        pass


class StreamProgress:
    """Reports on a text stream: bars when it is a terminal, else one line per stage."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream` defaults to stderr."""
        self._stream = stream if stream is not None else sys.stderr
        self.bars = self._stream.isatty()

    @contextmanager
    def stage(self, what: str, num_bytes: int) -> Iterator[Advance]:
        if not self.bars:
            self.note(f"{what} ({num_bytes / 1e6:,.0f} MB)")
            yield lambda _: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=Console(file=self._stream)) as bars:
            task = bars.add_task(what, total=num_bytes)
            yield lambda done: bars.update(task, advance=done)

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def progress_for(shown: bool) -> Progress:
    """Progress on stderr, or none."""
    return StreamProgress() if shown else NoProgress()
