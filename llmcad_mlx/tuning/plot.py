"""What tuning has measured, drawn. matplotlib is an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmcad_mlx.tuning.candidates import short_name
from llmcad_mlx.tuning.figures import CandidateFigures

# Okabe and Ito's colours, which differ for colour-blind eyes and in grey.
_BLUE, _ORANGE = "#0072B2", "#E69F00"
_DOMAINS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#BBBBBB")


def write_plot(lines: Sequence[CandidateFigures], winner: str | None, subtitle: str, file: Path) -> None:
    """Speed, predicted and measured, and tokens per pass by domain; without lines an earlier `file` is removed.

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib.figure import Figure

    if not lines:
        file.unlink(missing_ok=True)
        return
    names = list(dict.fromkeys(domain for line in lines for domain in line.domains))
    figure = Figure(figsize=(10.0, 2.0 + 0.75 * len(lines)), layout="constrained")
    figure.suptitle(f"Drafts measured by tune\n{subtitle}", fontsize=11)
    speed, per_pass = figure.subplots(1, 2, sharey=True)
    rows = range(len(lines))
    colours = [_ORANGE if line.name == winner else _BLUE for line in lines]
    bars = speed.barh(rows, [line.tokens_per_s or 0.0 for line in lines], 0.6, color=colours, label="measured")
    speed.bar_label(bars, fmt="%.1f", padding=6)
    known = [(line.predicted_tokens_per_s, row) for row, line in enumerate(lines) if line.predicted_tokens_per_s]
    if known:
        speed.plot(*zip(*known, strict=True), "k|", markersize=22, markeredgewidth=2, label="predicted")
    speed.set_xlabel("tokens/s; black line: predicted" + ("" if winner is None else "; orange: chosen"))
    speed.set_yticks(rows, [short_name(line.name) for line in lines])
    speed.invert_yaxis()
    height = 0.8 / max(len(names), 1)
    for index, domain in enumerate(names):
        at = [row + (index - (len(names) - 1) / 2) * height for row in rows]
        values = [line.domains[domain].tokens_per_pass or 0.0 for line in lines]
        per_pass.barh(at, values, height, color=_DOMAINS[index % len(_DOMAINS)], label=domain)
    per_pass.set_xlabel("tokens per pass of the target")
    for axes in (speed, per_pass):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(x=0.15)
    figure.legend(
        *per_pass.get_legend_handles_labels(), loc="outside lower center", ncols=max(len(names), 1), frameon=False
    )
    figure.savefig(file, dpi=150)
