"""Tables and notes on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmcad_mlx.measure.tables import Table


def print_tables(tables: Sequence[Table], notes: Sequence[str]) -> None:
    """A terminal gets drawn tables, a file or pipe Markdown."""
    from rich.console import Console

    from llmcad_mlx.measure.output import to_markdown

    if not sys.stdout.isatty():
        print(to_markdown(tables, notes))
        return
    console = Console(highlight=False)
    for table in tables:
        console.print(table.to_rich())
    for note in notes:
        console.print(note, style="dim", markup=False)
