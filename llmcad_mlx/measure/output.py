"""What a measuring command puts out: tables and notes, one JSON document, files, pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table as RichTable

from llmcad_mlx.errors import LlmcadError, UsageError
from llmcad_mlx.machine import this_machine
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import device_name

NOTHING = "–"
NO_PLOTS = "plots: matplotlib is not installed; get it with: pip install 'llmcad-mlx[bench]'"

# Okabe and Ito's colours, which differ for colour-blind eyes and in grey.
BLUE, ORANGE, SKY, GREY = "#0072B2", "#E69F00", "#56B4E9", "#BBBBBB"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", SKY, "#D55E00", "#F0E442", GREY)


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column is a name, the others are figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, title: str, rows: Sequence[Mapping[str, str]]) -> Table:
        """From rows of cells by header, one at least, all with the same headers."""
        return cls(title, tuple(rows[0]), tuple(tuple(row.values()) for row in rows))

    def to_markdown(self) -> str:
        """A pipe table under its title in bold."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = []
        for row in (self.header, rule, *self.rows):
            figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append(f"| {' | '.join([row[0].ljust(widths[0]), *figures])} |")
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"

    def to_rich(self) -> RichTable:
        """The same for a terminal; narrow ones wrap the header, which is why it is in short words."""
        table = RichTable(
            title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
        )
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture. `draw` gets an empty Matplotlib figure; None: there is nothing to show."""

    name: str
    title: str
    draw: Callable[[Any], None] | None


@dataclass(frozen=True, slots=True)
class Report:
    """What a command has found. `name`: of its files. `document`: one JSON object. `heading`: Markdown above the
    tables of the file. `subtitle`: of the plots. `interrupted`: Ctrl-C came before all was measured. `problem`:
    what else failed."""

    name: str
    tables: Sequence[Table]
    notes: Sequence[str]
    document: Mapping[str, Any]
    heading: str = ""
    plots: Sequence[Plot] = field(default=(), kw_only=True)
    subtitle: str = field(default="", kw_only=True)
    interrupted: bool = field(default=False, kw_only=True)
    problem: LlmcadError | None = field(default=None, kw_only=True)

    @classmethod
    def of_runs(
        cls,
        name: str,
        subject: str,
        read_bandwidth: float | None,
        tables: Sequence[Table],
        notes: Sequence[str],
        document: Mapping[str, Any],
        interrupted: bool = False,
        **more: Any,
    ) -> Report:
        """Of what was measured: machine, versions and the command that runs are added. subject: for headings.
        read_bandwidth: emulated, in bytes per second. more: further fields."""
        machine, device, argv = this_machine(), device_name(), ["llmcad-mlx", *sys.argv[1:]]
        origin = {"format": 1, "argv": argv, "device": device, "machine": asdict(machine)}
        known = {"emulated": read_bandwidth is not None, "interrupted": interrupted, "notes": notes}
        versions = ", ".join(f"{name} {machine.versions[name]}" for name in ("mlx", "mlx-lm", "numba"))
        heading = (
            f"# {subject}\n\n"
            f"{machine.cpu}, {machine.num_cores} cores, {device}; Python {machine.python}, {versions}\n\n"
            f"    {' '.join(argv)}\n\n"
        )
        subtitle = f"{subject}{emulated_rate(read_bandwidth, '; reads ')}"
        whole = {**origin, **document, **known}
        return cls(name, tables, notes, whole, heading, subtitle=subtitle, interrupted=interrupted, **more)

    def to_markdown(self) -> str:
        """Tables, then the notes as a list."""
        return "\n".join([*(table.to_markdown() for table in self.tables), *(f"- {note}" for note in self.notes)])

    def write(self, folder: Path) -> str | None:
        """Write the JSON, Markdown and picture files, and remove the pictures of an earlier run that have nothing
        to show now; returns a message where there can be no pictures, else None."""
        make_folder(folder)
        text = json.dumps(self.document, indent=1) + "\n"
        (folder / f"{self.name}.json").write_text(text, encoding="utf-8")
        (folder / f"{self.name}.md").write_text(f"{self.heading}{self.to_markdown()}\n", encoding="utf-8")
        for plot in self.plots:
            try:
                from matplotlib.figure import Figure
            except ImportError:
                return NO_PLOTS
            file = folder / f"{plot.name}.png"
            if plot.draw is None:
                file.unlink(missing_ok=True)
                continue
            figure = Figure(layout="constrained")
            figure.suptitle(f"{plot.title}\n{self.subtitle}", fontsize=11)
            plot.draw(figure)
            figure.savefig(file, dpi=150)
        return None


def make_folder(folder: Path) -> None:
    """Create the output folder. Raises UsageError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out: {folder}: {error.strerror}; choose another folder") from None


def share(part: float, whole: float) -> float | None:
    """`part` of `whole`, None where that is nothing."""
    return part / whole if whole > 0 else None


def number(value: float | None, digits: int = 1, suffix: str = "") -> str:
    """A figure, or a dash where there is none."""
    return NOTHING if value is None else f"{value:.{digits}f}{suffix}"


def milliseconds(seconds: float | None, digits: int = 1, suffix: str = " ms") -> str:
    """Seconds as milliseconds, or a dash where there are none."""
    return number(None if seconds is None else 1e3 * seconds, digits, suffix)


def emulated_rate(read_bandwidth: float | None, before: str = "") -> str:
    """At how many bytes per second reads are emulated, after `before`; nothing where they are not."""
    return "" if read_bandwidth is None else f"{before}emulated at {format_size(int(read_bandwidth))}/s"


def bar_panels(figure: Any, height: float, num_panels: int = 1, width: float = 7.5) -> Any:
    """Axes for horizontal bars, the first bar on top. Sizes in inches."""
    figure.set_size_inches(width, height)
    panels = figure.subplots(1, num_panels, sharey=True, squeeze=False)[0]
    panels[0].invert_yaxis()
    for axes in panels:
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(x=0.12, y=0.03)
    return panels


def legend_below(figure: Any) -> None:
    """One legend for all panels, each label once."""
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {label: handle for pairs in found for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
