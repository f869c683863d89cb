"""Bar charts of a benchmark. matplotlib is an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcad_mlx.bench.summary import ALL, VariantSummary

MISSING = "plots: matplotlib is not installed; get it with: pip install 'llmcad-mlx[bench]'"


def write_plots(lines: Sequence[VariantSummary], folder: Path) -> list[Path]:
    """Draw tokens/s and the split of decoding time by variant, over all domains, into `folder`.

    Returns the files written. Raises ImportError where matplotlib is missing (`MISSING` says what to do).
    """
    from matplotlib.figure import Figure

    overall = [line for line in lines if line.domain == ALL]
    return [
        _save(Figure(figsize=(7, 0.9 + 0.4 * len(overall))), draw, overall, folder / name)
        for name, draw in (("tokens_per_s.png", _draw_speed), ("time_split.png", _draw_split))
    ]


def _save(figure: Any, draw: Any, lines: Sequence[VariantSummary], file: Path) -> Path:
    axes = figure.subplots()
    draw(axes, lines)
    axes.invert_yaxis()  # first variant on top
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    return file


def _draw_speed(axes: Any, lines: Sequence[VariantSummary]) -> None:
    bars = axes.barh([line.variant for line in lines], [line.tokens_per_s or 0.0 for line in lines])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("decoding, tokens/s (median)")


def _draw_split(axes: Any, lines: Sequence[VariantSummary]) -> None:
    known = [line for line in lines if line.verify_share is not None]
    names = [line.variant for line in known]
    left = [0.0] * len(known)
    for part in ("draft", "verify", "wait", "other"):
        shares = [100.0 * (getattr(line, f"{part}_share") or 0.0) for line in known]
        axes.barh(names, shares, left=left, label=part)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlabel("share of decoding time, %")
    axes.set_xlim(0, 100)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=4, frameon=False)
