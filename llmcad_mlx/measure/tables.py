"""Tables for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable

from llmcad_mlx.measure.summary import ALL, VariantSummary
from llmcad_mlx.measure.variants import MLX_LM, PLAIN

NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column is a name, the others are figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """A pipe table under its title in bold."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        rule = [("-" * width if i == 0 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
        lines = [
            "| "
            + " | ".join(_padded(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
            + " |"
            for row in (self.header, rule, *self.rows)
        ]
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
class _Column:
    header: str
    cell: Callable[[VariantSummary], str]


def number(value: float | None, digits: int = 1, suffix: str = "") -> str:
    """A figure, or a dash where there is none."""
    return NOTHING if value is None else f"{value:.{digits}f}{suffix}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def _mismatches(line: VariantSummary) -> str:
    return NOTHING if line.mismatches is None else f"{line.mismatches}/{line.num_compared}"


_SPEED = (_Column("tokens per s", lambda line: number(line.tokens_per_s)),)
_VS_PLAIN = (
    _Column("× plain", lambda line: number(line.tokens_per_s_vs_plain, 2)),
    _Column("worst prompt", lambda line: number(line.worst_prompt_vs_plain, 2)),
)
_VS_MLX_LM = (_Column("× mlx-lm", lambda line: number(line.tokens_per_s_vs_mlx_lm, 2)),)
_PER_PASS = (_Column("tokens per pass", lambda line: number(line.tokens_per_pass, 2)),)
_BREAK_EVEN = (_Column("break-even", lambda line: number(line.break_even, 2)),)
_DRAFTING = (
    _Column("accepted", lambda line: _percent(line.acceptance_rate)),
    _Column("draft", lambda line: _percent(line.draft_share)),
    _Column("verify", lambda line: _percent(line.verify_share)),
    _Column("other", lambda line: _percent(line.other_share)),
)
_STREAMING = (
    _Column("waits", lambda line: _percent(line.wait_share)),
    _Column("survived", lambda line: _percent(line.survival_rate)),
)
_BOUND = (_Column("of A·B/W", lambda line: _percent(line.bound_share)),)
_PROMPT = (_Column("prompt tokens per s", lambda line: number(line.prompt_tokens_per_s, 0)),)
_PROMPT_VS = (_Column("prompt × mlx-lm", lambda line: number(line.prompt_vs_mlx_lm, 1)),)
_LAST = (_Column("wrong tokens", _mismatches),)


def summary_tables(lines: Sequence[VariantSummary]) -> list[Table]:
    """A table for all domains together and one for each, a row per variant."""
    names = {line.variant for line in lines}
    columns = [
        *_SPEED,
        *(_VS_PLAIN if PLAIN in names else ()),
        *(_VS_MLX_LM if MLX_LM in names else ()),
        *_PER_PASS,
        *(_BREAK_EVEN if PLAIN in names else ()),
        *_DRAFTING,
        *(_STREAMING if any(line.wait_share for line in lines) else ()),
        *(_BOUND if any(line.bound_share for line in lines) else ()),
        *_PROMPT,
        *(_PROMPT_VS if MLX_LM in names else ()),
        *_LAST,
    ]
    header = ("variant", *(column.header for column in columns))
    tables = []
    for domain in dict.fromkeys(line.domain for line in lines):
        rows = tuple(
            (line.variant, *(column.cell(line) for column in columns)) for line in lines if line.domain == domain
        )
        tables.append(Table("all prompts" if domain == ALL else domain, header, rows))
    return tables


def _padded(cell: str, width: int, index: int) -> str:
    return cell.ljust(width) if index == 0 else cell.rjust(width)
