"""Plots of a benchmark. matplotlib is an optional dependency."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcad_mlx.measure.summary import ALL, VariantSummary
from llmcad_mlx.measure.variants import PLAIN, ablated, forced_nodes

MISSING = "plots: matplotlib is not installed; get it with: pip install 'llmcad-mlx[bench]'"

# Okabe and Ito's colours, which differ for colour-blind eyes and in grey.
_BLUE, _ORANGE, _SKY, _GREY = "#0072B2", "#E69F00", "#56B4E9", "#BBBBBB"
_PARTS = (
    ("verify", "verify", _BLUE, "white"),
    ("draft", "draft", _ORANGE, "black"),
    ("wait", "wait for weights", _SKY, "black"),
    ("other", "other", _GREY, "black"),
)
_NARROW = 7.0  # per cent; a narrower part has no room for its figure
_LONG_NAME = 22  # letters

Lines = Sequence[VariantSummary]


@dataclass(frozen=True, slots=True)
class Curve:
    """One panel: medians `y` at `x`, from `low` to `high`, and the `computing` part of them; `bound`, where
    there is one, is the least to expect. All but x in milliseconds."""

    title: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    computing: Sequence[float]
    bound: Sequence[float] | None = None


def write_plots(lines: Lines, folder: Path, subtitle: str = "") -> list[Path]:
    """Draw what there is to see of `lines`, over all domains, into `folder`; `subtitle` says what was measured.

    Plots with nothing to show are not written, and removed where an earlier run left them. Returns the files
    written. Raises ImportError where matplotlib is missing (`MISSING` says what to do).
    """
    overall = [line for line in lines if line.domain == ALL]
    written = []
    for plot in _PLOTS:
        file, chosen, figure = folder / plot.file, plot.choose(overall), _figure(plot.title, subtitle)
        if not chosen:
            file.unlink(missing_ok=True)
            continue
        plot.draw(figure, chosen)
        figure.savefig(file, dpi=150)
        written.append(file)
    return written


def write_curves(curves: Sequence[Curve], subtitle: str, file: Path) -> None:
    """Milliseconds of a target pass, a panel for each curve. Without any, an earlier `file` is removed."""
    figure = _figure("Time of one target pass", subtitle)
    if not curves:
        file.unlink(missing_ok=True)
        return
    figure.set_size_inches(0.8 + 3.4 * len(curves), 3.8)
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        spread = [
            [y - low for y, low in zip(curve.y, curve.low, strict=True)],
            [high - y for y, high in zip(curve.y, curve.high, strict=True)],
        ]
        axes.errorbar(
            curve.x, curve.y, spread, fmt="o-", color=_BLUE, ecolor="black", capsize=3, markersize=4,
            label="measured: median, min to max",
        )  # fmt: skip
        if list(curve.computing) != list(curve.y):
            axes.plot(curve.x, curve.computing, "s:", color=_SKY, markersize=4, label="computing: waits left out")
        if curve.bound is not None:
            axes.plot(curve.x, curve.bound, "--", color=_ORANGE, label="bytes / rate")
        axes.set_title(curve.title, fontsize=9)
        axes.set(xlabel=curve.label, ylabel="ms per pass")
        axes.set(xlim=(0, 1.05 * max(curve.x)), ylim=(0, 1.1 * max([*curve.high, *(curve.bound or ())])))
        axes.grid(alpha=0.3)
    named = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
    figure.savefig(file, dpi=150)


def _figure(title: str, subtitle: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}" if subtitle else title, fontsize=11)
    return figure


def _rows(figure: Any, num_rows: int, num_panels: int = 1) -> Any:
    """Axes for horizontal bars, the first on top."""
    figure.set_size_inches(7.5 if num_panels == 1 else 10.0, 1.6 + 0.4 * num_rows)
    panels = figure.subplots(1, num_panels, sharey=True, squeeze=False)[0]
    panels[0].invert_yaxis()
    for axes in panels:
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(x=0.12, y=0.03)
    return panels


def _short(variant: str) -> str:
    """A long name on two lines."""
    head, dash, rest = variant.partition("-no-")
    return f"{head}\n{dash}{rest}" if len(variant) > _LONG_NAME else variant


def _draw_speed(figure: Any, lines: Lines) -> None:
    (axes,) = _rows(figure, len(lines))
    bars = axes.barh([_short(line.variant) for line in lines], [line.tokens_per_s for line in lines], color=_BLUE)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("tokens/s (median over runs)")


def _draw_split(figure: Any, lines: Lines) -> None:
    (axes,) = _rows(figure, len(lines))
    names = [_short(line.variant) for line in lines]
    left = [0.0] * len(lines)
    for part, label, colour, ink in _PARTS:
        shares = [100.0 * (getattr(line, f"{part}_share") or 0.0) for line in lines]
        bars = axes.barh(names, shares, left=left, label=label, color=colour)
        figures = [f"{share:.0f}" if share >= _NARROW else "" for share in shares]
        axes.bar_label(bars, figures, label_type="center", color=ink, fontsize=9)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlabel("share of decoding time, %")
    axes.set_xlim(0, 100)
    figure.legend(loc="outside lower center", ncols=len(_PARTS), frameon=False)


def _draw_nodes(figure: Any, lines: Lines) -> None:
    figure.set_size_inches(6.0, 4.0)
    axes = figure.subplots()
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        points = curves.setdefault(line.variant.partition(":")[0], [])
        points.append((forced_nodes(line.variant) or 0, line.tokens_per_pass or 0.0))
    for (kind, points), colour in zip(sorted(curves.items(), reverse=True), (_BLUE, _ORANGE), strict=False):
        nodes, tokens = zip(*sorted(points), strict=True)
        axes.plot(nodes, tokens, "o-", color=colour, label=f"{kind}:N")
        for x, y in points:
            axes.annotate(f"{y:.2f}", (x, y), xytext=(5, -11), textcoords="offset points", fontsize=9)
    most = [max(figures) for figures in zip(*itertools.chain(*curves.values()), strict=True)]
    axes.set(xlabel="nodes in every pass", ylabel="tokens per pass, bonus included")
    axes.set(xlim=(0, 1.15 * most[0]), ylim=(0, 1.15 * most[1]))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)


def _draw_ablation(figure: Any, lines: Lines) -> None:
    """Each policy whole and without its parts: speed, and what a pass yields, which no machine disturbs."""
    found: dict[str, dict[str, VariantSummary]] = {}
    plain = None
    for line in lines:
        parts = ablated(line.variant)
        if parts is None:
            plain = line
        else:
            found.setdefault(_without(parts.missing), {})[parts.policy] = line
    policies = list(dict.fromkeys(policy for row in found.values() for policy in row))
    panels = _rows(figure, 2 * len(found), 2)
    height = 0.8 / len(policies)
    for axes, attribute, label in zip(
        panels,
        ("tokens_per_s", "tokens_per_pass"),
        ("tokens/s (median over runs)", "tokens per pass"),
        strict=True,
    ):
        for index, (policy, colour) in enumerate(zip(policies, (_ORANGE, _BLUE), strict=False)):
            rows = [(place, row[policy]) for place, row in enumerate(found.values()) if policy in row]
            at = [place + (index - (len(policies) - 1) / 2) * height for place, _ in rows]
            values = [getattr(line, attribute) or 0.0 for _, line in rows]
            bars = axes.barh(at, values, height, color=colour, label=policy)
            axes.bar_label(bars, fmt="%.1f" if attribute == "tokens_per_s" else "%.2f", padding=3, fontsize=9)
        if plain is not None and getattr(plain, attribute):
            axes.axvline(getattr(plain, attribute), color="black", linestyle="--", linewidth=1, label=PLAIN)
        axes.set_xlabel(label)
    panels[0].set_yticks(range(len(found)), list(found))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def _without(missing: Sequence[str]) -> str:
    return "no " + ",\nno ".join(missing) if missing else "whole"


def _draw_bound(figure: Any, lines: Lines) -> None:
    (axes,) = _rows(figure, len(lines))
    shares = [100.0 * (line.bound_share or 0.0) for line in lines]
    bars = axes.barh([_short(line.variant) for line in lines], shares, color=_BLUE)
    # Inside the bars where there is room: the line at 100 would cross them.
    for inside, place, ink in ((True, "center", "white"), (False, "edge", "black")):
        figures = [f"{share:.0f}" if (share >= _NARROW) is inside else "" for share in shares]
        axes.bar_label(bars, figures, label_type=place, color=ink, fontsize=9)
    axes.axvline(100, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.05 * max(100.0, *shares))
    axes.set_xlabel("%; at 100, reading weights takes all the time")


def _with(attribute: str, lines: Lines) -> Lines:
    return [line for line in lines if getattr(line, attribute) is not None]


def _of_trees(lines: Lines) -> Lines:
    found = [line for line in lines if forced_nodes(line.variant) is not None and line.tokens_per_pass is not None]
    return found if len(found) > 1 else []


def _of_ablation(lines: Lines) -> Lines:
    """Policies that ran both whole and without a part, and plain decoding for comparison; [] without any."""
    found = [(line, ablated(line.variant)) for line in lines]
    whole, lacking = (
        {parts.policy for _, parts in found if parts is not None and bool(parts.missing) is wanted}
        for wanted in (False, True)
    )
    chosen = [line for line, parts in found if parts is not None and parts.policy in whole & lacking]
    return [*(line for line in lines if line.variant == PLAIN), *chosen] if chosen else []


@dataclass(frozen=True, slots=True)
class _Plot:
    """`choose` picks the lines that have something to show; `draw` gets them and an empty figure."""

    file: str
    title: str
    choose: Callable[[Lines], Lines]
    draw: Callable[[Any, Lines], None]


_PLOTS = (
    _Plot("tokens_per_s.png", "Decoding speed", lambda lines: _with("tokens_per_s", lines), _draw_speed),
    _Plot("time_split.png", "Where decoding time goes", lambda lines: _with("verify_share", lines), _draw_split),
    _Plot("tokens_per_pass.png", "Tokens per target pass by tree size", _of_trees, _draw_nodes),
    _Plot("ablation.png", "What each part of a policy contributes", _of_ablation, _draw_ablation),
    _Plot(
        "bound.png",
        "Speed as a share of A·B/W: tokens per pass × read rate / bytes per pass",
        lambda lines: _with("bound_share", lines),
        _draw_bound,
    ),
)
