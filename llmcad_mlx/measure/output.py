"""What a measuring command puts out: tables and notes, one JSON document, files, pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table as RichTable

from llmcad_mlx.errors import LlmcadError, UsageError
from llmcad_mlx.machine import Machine, this_machine
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import device_name

NOTHING = "–"
NO_PLOTS = "plots: matplotlib is not installed; get it with: pip install 'llmcad-mlx[bench]'"
FORMAT_VERSION = 1

# Okabe and Ito's colours, which differ for colour-blind eyes and in grey.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#BBBBBB"


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
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True, slots=True)
class Origin:
    """Where figures come from: `argv` is the whole command."""

    argv: Sequence[str] = ()
    device: str = field(default_factory=device_name)
    machine: Machine = field(default_factory=this_machine)

    def to_json(self) -> dict[str, Any]:
        """What every document of figures begins with."""
        return {
            "format": FORMAT_VERSION,
            "argv": list(self.argv),
            "device": self.device,
            "machine": asdict(self.machine),
        }

    def to_markdown(self) -> str:
        """Processor, cores, device, the versions that matter most, and the command."""
        machine = self.machine
        versions = ", ".join(f"{name} {machine.versions.get(name)}" for name in ("mlx", "mlx-lm", "numba"))
        return (
            f"{machine.cpu}, {machine.num_cores} cores, {self.device}; Python {machine.python}, {versions}\n\n"
            f"    {' '.join(self.argv)}\n\n"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What a command has found. `name`: of its files. `document`: one JSON object. `heading`: Markdown above the
    tables of the file.

    draw: writes pictures into a folder, and removes those of an earlier run that have nothing to show now; raises
    ImportError without Matplotlib. interrupted: Ctrl-C came before all was measured. problem: what else failed.
    """

    name: str
    tables: Sequence[Table]
    notes: Sequence[str]
    document: Mapping[str, Any]
    heading: str = ""
    draw: Callable[[Path], None] | None = None
    interrupted: bool = False
    problem: LlmcadError | None = None

    def to_markdown(self) -> str:
        """Tables, then the notes as a list."""
        return "\n".join([*(table.to_markdown() for table in self.tables), *(f"- {note}" for note in self.notes)])

    def write(self, folder: Path) -> str | None:
        """Write the JSON, Markdown and picture files; returns a message where there can be no pictures, else
        None."""
        make_folder(folder)
        text = json.dumps(self.document, indent=1) + "\n"
        (folder / f"{self.name}.json").write_text(text, encoding="utf-8")
        (folder / f"{self.name}.md").write_text(f"{self.heading}{self.to_markdown()}\n", encoding="utf-8")
        try:
            if self.draw is not None:
                self.draw(folder)
        except ImportError:
            return NO_PLOTS
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


def percent(share: float | None) -> str:
    """A share of 1, or a dash where there is none."""
    return NOTHING if share is None else f"{share:.0%}"


def milliseconds(seconds: float | None, digits: int = 1, suffix: str = " ms") -> str:
    """Seconds as milliseconds, or a dash where there are none."""
    return number(None if seconds is None else 1e3 * seconds, digits, suffix)


def emulated_rate(read_bandwidth: float | None, before: str = "") -> str:
    """At how many bytes per second reads are emulated, after `before`; nothing where they are not."""
    return "" if read_bandwidth is None else f"{before}emulated at {format_size(int(read_bandwidth))}/s"


def new_figure(title: str, subtitle: str) -> Any:
    """An empty Matplotlib figure; `subtitle` says what was measured. Raises ImportError."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}" if subtitle else title, fontsize=11)
    return figure


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
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=max(len(handles), 1), frameon=False
    )
