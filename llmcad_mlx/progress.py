"""How long jobs report, and how they are interrupted."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """A block that Ctrl-C ends for sure. What this gives is to be called now and then.

    KeyboardInterrupt is raised at once, as always. But where a library's C function has called Python just then,
    it may take that for a failed conversion and go on (seen in 2 of 96 answers): the next call raises it again.
    """
    came = False

    def handle(number: int, frame: Any) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield check
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, usual)


class Progress:
    """Where a long job reports: bars on a terminal, a line for each stage on another stream, nothing for None."""

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
