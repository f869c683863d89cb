"""A benchmark's report as JSON, Markdown and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmcad_mlx.errors import UsageError
from llmcad_mlx.machine import Machine
from llmcad_mlx.measure.benchmark import BenchReport
from llmcad_mlx.measure.plots import MISSING, write_plots
from llmcad_mlx.measure.records import Run
from llmcad_mlx.measure.summary import VariantSummary, run_mismatches, summarise
from llmcad_mlx.measure.tables import Table, summary_tables
from llmcad_mlx.sizes import format_size

FORMAT_VERSION = 1


def report_tables(report: BenchReport) -> list[Table]:
    """The summary tables of a report."""
    return summary_tables(_summary(report))


def _summary(report: BenchReport) -> list[VariantSummary]:
    return summarise(report.runs, report.comparable, report.memory.read_bandwidth)


def report_json(report: BenchReport, argv: Sequence[str]) -> dict[str, Any]:
    """Everything: machine, versions, options, summary and all runs. Bytes in bytes, times in seconds."""
    plan = report.plan
    wrong = run_mismatches(report.runs, report.comparable)
    return {
        "format": FORMAT_VERSION,
        "argv": list(argv),
        "target": report.target,
        "draft": report.draft,
        "device": report.device,
        "machine": asdict(report.machine),
        "options": {
            "variants": [variant.name for variant in plan.variants],
            "prompts": [f"{prompt.domain}/{prompt.name}" for prompt in plan.prompts],
            "repeat": plan.repeat,
            "warmup": plan.warmup,
            **asdict(plan.sampling),
            **asdict(report.memory),
        },
        "emulated": report.memory.read_bandwidth is not None,
        "memory_plan": None if report.memory_plan is None else asdict(report.memory_plan),
        "interrupted": report.interrupted,
        "notes": report.notes,
        "summary": [asdict(line) for line in _summary(report)],
        "runs": [_run_json(run, count) for run, count in zip(report.runs, wrong, strict=True)],
    }


def _run_json(run: Run, mismatches: int | None) -> dict[str, Any]:
    done, stats = run.generation, run.generation.stats
    row: dict[str, Any] = {
        "variant": run.variant,
        **asdict(run.place),
        "order": run.order,
        "prompt_tokens": done.prompt_tokens,
        "tokens": len(done.tokens),
        "prompt_s": done.prompt_s,
        "decode_s": done.decode_s,
        "tokens_per_s": run.tokens_per_s,
        "prompt_tokens_per_s": run.prompt_tokens_per_s,
        "mismatches": mismatches,
        "equals_plain": None if mismatches is None else mismatches == 0,
    }
    keys = (
        "tokens_per_pass",
        "acceptance_rate",
        "target_passes",
        "drafted",
        "tested",
        "accepted",
        "draft_s",
        "verify_s",
        "io_wait_s",
        "hidden_draft_s",
        "provisional",
        "provisional_passes",
        "survived",
        "streamed_bytes",
    )
    row |= {key: None if stats is None else getattr(stats, key) for key in keys}
    known = 0.0 if stats is None else stats.draft_s + stats.verify_s + stats.io_wait_s
    row["other_s"] = None if stats is None else max(done.decode_s - known, 0.0)
    row["pass_bytes"] = done.pass_bytes
    return row


def to_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables, then the notes as a list."""
    return "\n".join([*(table.to_markdown() for table in tables), *(f"- {note}" for note in notes)])


def make_folder(folder: Path) -> None:
    """Create the output folder. Raises UsageError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out: {folder}: {error.strerror}; choose another folder") from None


def write_report(report: BenchReport, folder: Path, argv: Sequence[str]) -> str | None:
    """Write bench.json, bench.md and the plots; returns a message when there are no plots, else None."""
    make_folder(folder)
    (folder / "bench.json").write_text(json.dumps(report_json(report, argv), indent=1) + "\n", encoding="utf-8")
    machine = machine_line(report.machine, report.device)
    head = f"# {report.target}, draft {report.draft}\n\n{machine}\n\n    {' '.join(argv)}\n"
    body = to_markdown(report_tables(report), report.notes)
    (folder / "bench.md").write_text(f"{head}\n{body}\n", encoding="utf-8")
    try:
        write_plots(_summary(report), folder, _subtitle(report))
    except ImportError:
        return MISSING
    return None


def _subtitle(report: BenchReport) -> str:
    """What was measured, in a line for plots."""
    rate = report.memory.read_bandwidth
    emulated = "" if rate is None else f"; reads emulated at {format_size(int(rate))}/s"
    return f"{report.target}, draft {report.draft}{emulated}"


def machine_line(machine: Machine, device: str) -> str:
    """Processor, cores, device and the versions that matter most."""
    versions = ", ".join(f"{name} {machine.versions.get(name)}" for name in ("mlx", "mlx-lm", "numba"))
    return f"{machine.cpu}, {machine.num_cores} cores, {device}; Python {machine.python}, {versions}"
