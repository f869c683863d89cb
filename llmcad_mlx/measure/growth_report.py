"""What `bench --growth` measured, as tables, JSON and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmcad_mlx.measure.growth import QUESTIONS, GrowthPoint, GrowthReport, Question
from llmcad_mlx.measure.output import FORMAT_VERSION, machine_line, make_folder, to_markdown
from llmcad_mlx.measure.plots import MISSING, Curve, write_curves
from llmcad_mlx.measure.tables import Table, number
from llmcad_mlx.sizes import format_size

_NAMES = {"bytes": "streamed", "nodes": "nodes", "context": "context"}


def growth_tables(report: GrowthReport) -> list[Table]:
    """A table for each question that was answered."""
    return [_table(report, question) for question in QUESTIONS if report.of(question)]


def _table(report: GrowthReport, question: Question) -> Table:
    points = report.of(question)
    header = [_NAMES[question], "median, ms", "min, ms", "max, ms", "× first", "computing, ms"]
    predicted = question == "bytes" and report.plan.memory.read_bandwidth is not None
    rows = []
    for point in points:
        value = format_size(point.value) if question == "bytes" else str(point.value)
        seconds = (point.median_s, min(point.seconds), max(point.seconds))
        row = [value, *(number(1e3 * s) for s in seconds), number(_ratio(point, points), 2)]
        row.append(number(1e3 * point.computing_s))
        rows.append((*row, number(_ms(predicted_s(report, point)))) if predicted else tuple(row))
    if predicted:
        header.append("bytes/rate, ms")
    return Table(_title(question, points[0]), tuple(header), tuple(rows))


def _title(question: Question, point: GrowthPoint) -> str:
    nodes = _plural(point.nodes, "node", "nodes")
    fixed = {
        "bytes": f"bytes read, {nodes} after {point.context} tokens",
        "nodes": f"nodes, after {point.context} tokens, {format_size(point.streamed_bytes)} read",
        "context": f"tokens in the cache, {nodes}, {format_size(point.streamed_bytes)} read",
    }
    return f"One target pass by {fixed[question]}"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def predicted_s(report: GrowthReport, point: GrowthPoint) -> float | None:
    """Seconds that reading alone takes at the emulated rate; None at the disk's own."""
    rate = report.plan.memory.read_bandwidth
    return None if rate is None else point.streamed_bytes / rate


def _ratio(point: GrowthPoint, points: Sequence[GrowthPoint]) -> float | None:
    return point.median_s / points[0].median_s if points[0].median_s > 0.0 else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def growth_notes(report: GrowthReport) -> list[str]:
    """What a reader of the figures must know."""
    rate, repeat = report.plan.memory.read_bandwidth, report.plan.repeat
    notes = [
        f"{_plural(repeat, 'measured pass', 'measured passes')} a line, each after one of the same kind. "
        "Random trees of a fixed seed, the cache filled with a text that repeats itself. Node counts and contexts "
        "take turns; of streamed bytes one amount after the other is loaded and measured.",
        "A pass takes the longer of reading and computing: where computing is longer, more bytes cost nothing. "
        "Computing: the median without the seconds that the processor had nothing to do while weights loaded; "
        "what reading takes of the processor is in it."
        + (
            f" Reads are emulated at {format_size(int(rate))}/s; all times are emulated."
            if rate is not None
            else " Reads may be served from the system's page cache, which is faster than the disk."
        ),
    ]
    if len(report.of("bytes")) == 1:
        notes.append("All amounts that fit come to the same bytes per pass: there is nothing to compare.")
    if report.interrupted:
        missing = [name for name in QUESTIONS if not report.of(name)]
        notes.append(f"Interrupted: not measured: {', '.join(missing)}.")
    return notes


def growth_json(report: GrowthReport, argv: Sequence[str]) -> dict[str, Any]:
    """Everything: machine, versions, options and all passes. Bytes in bytes, times in seconds."""
    return {
        "format": FORMAT_VERSION,
        "argv": list(argv),
        "target": report.target,
        "device": report.device,
        "machine": asdict(report.machine),
        "options": {"repeat": report.plan.repeat, **asdict(report.plan.memory)},
        "emulated": report.plan.memory.read_bandwidth is not None,
        "memory_plan": None if report.memory_plan is None else asdict(report.memory_plan),
        "interrupted": report.interrupted,
        "notes": growth_notes(report),
        "points": [
            {
                "question": question,
                "streamed_bytes": point.streamed_bytes,
                "nodes": point.nodes,
                "context": point.context,
                "median_s": point.median_s,
                "min_s": min(point.seconds),
                "max_s": max(point.seconds),
                "computing_s": point.computing_s,
                "ratio_to_first": _ratio(point, report.of(question)),
                "predicted_s": predicted_s(report, point),
                "passes": [asdict(timed) for timed in point.passes],
            }
            for question in QUESTIONS
            for point in report.of(question)
        ],
    }


def write_growth(report: GrowthReport, folder: Path, argv: Sequence[str]) -> str | None:
    """Write growth.json, growth.md and growth.png; returns a message when there is no plot, else None."""
    make_folder(folder)
    (folder / "growth.json").write_text(json.dumps(growth_json(report, argv), indent=1) + "\n", encoding="utf-8")
    head = f"# {report.target}\n\n{machine_line(report.machine, report.device)}\n\n    {' '.join(argv)}\n"
    body = to_markdown(growth_tables(report), growth_notes(report))
    (folder / "growth.md").write_text(f"{head}\n{body}\n", encoding="utf-8")
    rate = report.plan.memory.read_bandwidth
    emulated = "" if rate is None else f", reads emulated at {format_size(int(rate))}/s"
    try:
        write_curves(growth_curves(report), f"{report.target}{emulated}", folder / "growth.png")
    except ImportError:
        return MISSING
    return None


def growth_curves(report: GrowthReport) -> list[Curve]:
    """What is drawn: a panel for each question with more than one point."""
    curves = []
    for question in QUESTIONS:
        points = report.of(question)
        if len(points) < 2:
            continue
        scale = 1e6 if question == "bytes" else 1.0
        first, bound = points[0], [predicted_s(report, point) for point in points]
        nodes = _plural(first.nodes, "node", "nodes")
        drawn = question == "bytes" and None not in bound
        curves.append(
            Curve(
                title={
                    "bytes": f"{nodes}, {first.context} tokens",
                    "nodes": f"{format_size(first.streamed_bytes)} read, {first.context} tokens",
                    "context": f"{format_size(first.streamed_bytes)} read, {nodes}",
                }[question],
                label={"bytes": "read per pass, MB", "nodes": "nodes", "context": "tokens in the cache"}[question],
                x=[point.value / scale for point in points],
                y=[1e3 * point.median_s for point in points],
                low=[1e3 * min(point.seconds) for point in points],
                high=[1e3 * max(point.seconds) for point in points],
                computing=[1e3 * point.computing_s for point in points],
                bound=[1e3 * s for s in bound if s is not None] if drawn else None,
            )
        )
    return curves
