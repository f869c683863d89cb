"""What the measuring commands share: a progress bar, and a report that is printed and written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmcad_mlx.measure.output import Report


def command_line() -> list[str]:
    """The command that was given."""
    return ["llmcad-mlx", *sys.argv[1:]]


def publish(report: Report, json_output: bool, out: Path | None = None) -> None:
    """Print the report, and write its files into the folder `out`.

    Raises what kept the command from its end: KeyboardInterrupt, or the report's problem.
    """
    if json_output:
        print(json.dumps(report.document))
    else:
        _print(report)
    without_plots = None if out is None else report.write(out)
    if without_plots is not None:
        print(without_plots, file=sys.stderr)
    if report.interrupted:
        raise KeyboardInterrupt
    if report.problem is not None:
        raise report.problem


def _print(report: Report) -> None:
    """A terminal gets drawn tables, a file or pipe Markdown."""
    if not sys.stdout.isatty():
        print(report.to_markdown())
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in report.tables:
        console.print(table.to_rich())
    for note in report.notes:
        console.print(note, style="dim", markup=False)


@contextmanager
def measuring(out: Path | None) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr while it is a terminal, from the first measured step on: before it, downloads draw theirs.
    The callback is called before each step with what it is, and the number of all steps.

    Creates the folder `out` first. Raises UsageError where that is not possible.
    """
    if out is not None:
        from llmcad_mlx.measure.output import make_folder

        make_folder(out)
    if not sys.stderr.isatty():
        yield lambda label, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Four redraws a second are enough, and take nothing from what is measured.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
    task = bar.add_task("", total=None)
    begun = False

    def on_step(label: str, total: int) -> None:
        nonlocal begun
        bar.update(task, description=label, total=total, advance=1 if begun else 0)
        if not begun:
            bar.start()
        begun = True

    try:
        yield on_step
    finally:
        if begun:
            bar.stop()
