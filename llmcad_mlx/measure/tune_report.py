"""What tuning has found as tables, notes, JSON and files.

What tuning has measured, drawn. matplotlib is an optional dependency.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmcad_mlx.measure.output import machine_line, make_folder, to_markdown
from llmcad_mlx.measure.plots import MISSING
from llmcad_mlx.measure.records import Run
from llmcad_mlx.measure.tables import NOTHING, Table, number
from llmcad_mlx.measure.tune import LEAST_NOISE, CandidateFigures, DomainFigures, TuneReport, short_name
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import NO_DRAFT

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


FORMAT_VERSION = 1


def tune_tables(report: TuneReport) -> list[Table]:
    """All candidates, the best first; then tokens per pass and speed by domain."""
    lines = ranked(report)
    return [
        _overall(report, lines),
        _by_domain(report, lines, "tokens per pass", lambda figures: number(figures.tokens_per_pass, 2)),
        _by_domain(report, lines, "tokens per s, both halves", lambda figures: number(figures.tokens_per_s)),
    ]


def ranked(report: TuneReport) -> list[CandidateFigures]:
    """The candidates that were measured, the fastest first."""
    return sorted(report.lines, key=lambda line: -(line.tokens_per_s or 0.0))


def tune_notes(report: TuneReport) -> list[str]:
    """What a reader of the figures must know."""
    plan, sampling = report.plan, report.plan.task.sampling
    where = (
        "all in memory together, interleaved by prompt"
        if report.together
        else "loaded one after the other, in every repetition anew"
    )
    notes = [
        f"Prompts: {len(plan.split.calibration)} predict, {len(plan.split.measured)} are measured; repetitions: "
        f"{plan.task.repeat}; at most {sampling.max_tokens} tokens; temperature {sampling.temperature:g}. "
        f"Candidates {where}. A prompt counts with its median repetition; speeds are all tokens over all seconds.",
        "Predicted: A / (max(W/B, C) + D) with tokens per pass A, computing C and the rest of a round D from the "
        "prompts that predict; measured: the speed on the others. Reading the prompt comes on top.",
    ]
    if report.emulated:
        notes.append(f"Reads are emulated at {format_size(int(report.lineup.options.read_bandwidth or 0))}/s.")
    notes += [f"Left out: {failure.name}: {failure.reason}." for failure in report.failures]
    return [*notes, *_decision_notes(report)]


def _decision_notes(report: TuneReport) -> list[str]:
    decision = report.decision
    if report.outcome.interrupted:
        return [f"Interrupted after {len(report.outcome.runs)} generations: nothing is chosen, nothing saved."]
    if decision is None:
        return ["Nothing was measured: nothing is chosen."]
    notes = []
    others = [short_name(name) for name in decision.tied if name != decision.winner]
    if decision.stays and decision.winner != decision.fastest:
        notes.append(
            f"{short_name(decision.winner)} was chosen before and stays: it falls short of "
            f"{short_name(decision.fastest)} by less than twice the noise."
        )
    elif others:
        notes.append(
            f"Within the noise (at least {LEAST_NOISE:.0%}) as fast: {', '.join(others)}; the smallest draft wins."
        )
    if report.saved is not None:
        notes.append(f"Saved in {report.saved}: --draft auto means {short_name(decision.winner)} from now on.")
    return notes


def tune_json(report: TuneReport, argv: Sequence[str]) -> dict[str, Any]:
    """Everything: bytes in bytes, times in seconds, speeds in tokens per second."""
    plan, decision, options = report.plan, report.decision, report.lineup.options
    standings = {} if decision is None else {entry.name: entry for entry in decision.standings}
    return {
        "format": FORMAT_VERSION,
        "argv": list(argv),
        "target": report.lineup.target,
        "target_path": str(report.lineup.target_path),
        "device": report.device,
        "machine": asdict(report.machine),
        "emulated": report.emulated,
        "options": {
            "drafts": None if plan.drafts is None else list(plan.drafts),
            "bits": list(plan.bits),
            "trim": list(plan.tokens),
            "calibrated_on": [f"{domain}/{name}" for domain, name in sorted(plan.split.calibration)],
            "measured_on": [f"{domain}/{name}" for domain, name in sorted(plan.split.measured)],
            "repeat": plan.task.repeat,
            "warmup": plan.task.warmup,
            **asdict(plan.task.sampling),
            **asdict(options),
        },
        "together": report.together,
        "interrupted": report.outcome.interrupted,
        "winner": None if decision is None else decision.winner,
        "incumbent": report.lineup.incumbent,
        "tied": [] if decision is None else list(decision.tied),
        "saved": None if report.saved is None else str(report.saved),
        "candidates": [
            {
                "draft": line.name,
                **{key: value for key, value in asdict(line).items() if key not in ("name", "prediction")},
                "predicted_tokens_per_s": line.predicted_tokens_per_s,
                "difference": line.difference,
                "prediction": None if line.prediction is None else asdict(line.prediction),
                "standing": asdict(standings[line.name]) if line.name in standings else None,
            }
            for line in ranked(report)
        ],
        "failed": [{"draft": failure.name, "reason": failure.reason} for failure in report.failures],
        "notes": tune_notes(report),
        "runs": [_run_json(run) for run in report.outcome.runs],
    }


def write_tune(report: TuneReport, folder: Path, argv: Sequence[str]) -> str | None:
    """Write tune.json, tune.md and tune.png; returns a message when there is no plot, else None."""
    make_folder(folder)
    (folder / "tune.json").write_text(json.dumps(tune_json(report, argv), indent=1) + "\n", encoding="utf-8")
    head = f"# {report.lineup.target}: drafts\n\n{machine_line(report.machine, report.device)}\n"
    body = to_markdown(tune_tables(report), tune_notes(report))
    (folder / "tune.md").write_text(f"{head}\n    {' '.join(argv)}\n\n{body}\n", encoding="utf-8")
    try:
        write_plot(ranked(report), _winner(report), _subtitle(report), folder / "tune.png")
    except ImportError:
        return MISSING
    return None


def _overall(report: TuneReport, lines: Sequence[CandidateFigures]) -> Table:
    plain = next((line.tokens_per_s for line in lines if line.name == NO_DRAFT), None)
    planned = any(line.pinned_bytes is not None for line in lines)
    inexact = any(line.mismatches for line in lines)
    header = (
        "draft", "memory", *(("pinned", "read per pass") if planned else ()), "prompt", "tokens per pass",
        "draft step", "predicted tokens per s", "measured", "difference", "× none",
        *(("wrong tokens",) if inexact else ()),
    )  # fmt: skip
    rows = []
    for line in lines:
        label = short_name(line.name) + (" (chosen)" if line.name == _winner(report) else "")
        memory = (_size(line.pinned_bytes), _size(line.streamed_bytes)) if planned else ()
        ratio = line.tokens_per_s / plain if plain and line.tokens_per_s is not None else None
        wrong = (f"{line.mismatches}/{line.num_compared}",) if inexact else ()
        rows.append((
            label, _size(line.draft_bytes), *memory, _milliseconds(line.prompt_s, 0),
            number(line.tokens_per_pass, 2), _milliseconds(line.draft_step_s, 1),
            number(line.predicted_tokens_per_s), number(line.tokens_per_s), _signed(line.difference),
            number(ratio, 2), *wrong,
        ))  # fmt: skip
    emulated = " (emulated)" if report.emulated else ""
    return Table(f"drafts for {short_name(report.lineup.target)}{emulated}", header, tuple(rows))


def _by_domain(
    report: TuneReport,
    lines: Sequence[CandidateFigures],
    title: str,
    cell: Callable[[DomainFigures], str],
) -> Table:
    names = report.plan.domains
    rows = tuple(
        (short_name(line.name), *(cell(line.domains[name]) if name in line.domains else NOTHING for name in names))
        for line in lines
    )
    return Table(title, ("draft", *names), rows)


def _winner(report: TuneReport) -> str | None:
    return None if report.decision is None else report.decision.winner


def _subtitle(report: TuneReport) -> str:
    rate = report.lineup.options.read_bandwidth
    emulated = "" if rate is None else f"; reads emulated at {format_size(int(rate))}/s"
    return f"{short_name(report.lineup.target)}{emulated}"


def _size(num_bytes: int | None) -> str:
    return NOTHING if num_bytes is None else format_size(num_bytes)


def _milliseconds(seconds: float | None, digits: int) -> str:
    return NOTHING if seconds is None else f"{seconds * 1e3:.{digits}f} ms"


def _signed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.0%}"


def _run_json(run: Run) -> dict[str, Any]:
    stats = run.generation.stats
    row: dict[str, Any] = {"draft": run.variant, **asdict(run.place), "order": run.order}
    return row | ({} if stats is None else asdict(stats))
