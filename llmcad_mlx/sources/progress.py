"""How long jobs report: a bar on a terminal, one line per stage elsewhere, always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""`with progress("what is done", total_bytes) as advance: advance(bytes_done_since_last_call)`"""


@contextmanager
def no_progress(what: str, num_bytes: int) -> Iterator[Advance]:
    """Report nothing."""
    yield lambda _: None


def stream_progress(stream: TextIO | None = None) -> Progress:
    """Progress on `stream` (default: stderr): a bar when it is a terminal, else one line per stage."""
    out = stream if stream is not None else sys.stderr

    @contextmanager
    def on_terminal(what: str, num_bytes: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=Console(file=out)) as bars:
            task = bars.add_task(what, total=num_bytes)
            yield lambda done: bars.update(task, advance=done)

    @contextmanager
    def as_line(what: str, num_bytes: int) -> Iterator[Advance]:
        print(f"{what} ({num_bytes / 1e6:,.0f} MB)", file=out, flush=True)
        yield lambda _: None

    return on_terminal if out.isatty() else as_line
