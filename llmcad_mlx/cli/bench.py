"""`llmcad-mlx bench`: compare ways of decoding, interleaved in one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcad_mlx.cli import options
from llmcad_mlx.cli.tables import print_tables
from llmcad_mlx.errors import UsageError
from llmcad_mlx.measure.variants import DEFAULT_VARIANTS, MLX_LM, variant_help

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from llmcad_mlx.settings import MemoryOptions

_FOR_KERNELS = ("repeat", "out", "json_output")
_FOR_GROWTH = (*_FOR_KERNELS, "target", "memory", "pinned", "context", "read_bandwidth")


def bench(
    *,
    command: typer.Context,
    pair: options.Pair,
    memory: options.Memory,
    variants: Annotated[
        str, typer.Option("--variants", help=f"Comma-separated: {variant_help()}.")
    ] = DEFAULT_VARIANTS,
    compare: Annotated[
        str | None,
        typer.Option("--compare", help="'mlx-lm': mlx_lm's own generation beside the variants, in the same run."),
    ] = None,
    domains: Annotated[
        str,
        typer.Option(
            "--domains",
            help="Comma-separated: code, explanation, sql, translation (the default), repeat, long, or all.",
        ),
    ] = "",
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Prompts of your own: a TOML file like the package's prompts.toml."),
    ] = None,
    per_domain: Annotated[
        int | None, typer.Option("--per-domain", help="Only the first so many prompts of each domain.")
    ] = None,
    max_tokens: options.MaxTokens = 128,
    repeat: Annotated[int, typer.Option("--repeat", help="Repetitions of all prompts.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", help="Prompts run before measuring.")] = 2,
    temp: options.Temperature = 0.0,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for bench.json, bench.md and plots.")] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time matrix kernels by rows instead; loads no model.")
    ] = False,
    growth: Annotated[
        bool,
        typer.Option(
            "--growth", help="Time single passes of the target instead: by streamed bytes, nodes, context."
        ),
    ] = False,
    json_output: options.Json = False,
) -> None:
    """Compare ways of decoding on the same prompts, interleaved; prints medians, ratios and mismatches."""
    from llmcad_mlx.measure.benchmark import BenchPlan, run_benchmark
    from llmcad_mlx.measure.output import make_folder, report_json, report_tables, write_report

    if kernels:
        _refuse_others(command, "kernels", _FOR_KERNELS)
    elif growth:
        _refuse_others(command, "growth", _FOR_GROWTH)
    if growth:
        _growth(pair.target, memory, repeat, out, json_output)
        return
    plan = BenchPlan.of(
        _with_others(variants, compare), domains, prompts, max_tokens, repeat, warmup, temp, seed, per_domain
    )
    if out is not None:
        make_folder(out)
    if kernels:
        _kernels(repeat, out, json_output)
        return
    argv = ["llmcad-mlx", *sys.argv[1:]]
    with _progress(plan.num_generations) as on_turn:
        report = run_benchmark(plan, pair.target, pair.draft, not json_output, on_turn, memory)
    if json_output:
        print(json.dumps(report_json(report, argv)))
    else:
        print_tables(report_tables(report), report.notes)
    problem = write_report(report, out, argv) if out is not None else None
    if problem is not None:
        print(problem, file=sys.stderr)
    if report.interrupted:
        raise KeyboardInterrupt


def _with_others(variants: str, compare: str | None) -> str:
    """The variants, and another program's where they are not among them already."""
    if compare is None:
        return variants
    if compare != MLX_LM:
        raise UsageError(f"compare: {compare!r} is unknown; the one program to compare with is '{MLX_LM}'")
    return variants if MLX_LM in [name.strip() for name in variants.split(",")] else f"{variants},{MLX_LM}"


def _refuse_others(command: typer.Context, mode: str, used: Collection[str]) -> None:
    """Raises UsageError for an option that was given and that `--mode` makes no use of."""
    for name in command.params:
        source = command.get_parameter_source(name)
        if name not in {mode, *used} and source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP"):
            raise UsageError(f"{name.replace('_', '-')}: --{mode} makes no use of it; leave one of the two out")


def _growth(target: str | None, memory: MemoryOptions, repeat: int, out: Path | None, json_output: bool) -> None:
    from llmcad_mlx.measure.growth import NUM_STEPS, GrowthPlan, measure_growth
    from llmcad_mlx.measure.growth_report import growth_json, growth_notes, growth_tables, write_growth
    from llmcad_mlx.measure.output import make_folder

    plan = GrowthPlan(target, memory, repeat)
    if out is not None:
        make_folder(out)
    argv = ["llmcad-mlx", *sys.argv[1:]]
    with _progress(NUM_STEPS) as on_step:
        report = measure_growth(plan, not json_output, on_step)
    if json_output:
        print(json.dumps(growth_json(report, argv)))
    else:
        print_tables(growth_tables(report), growth_notes(report))
    problem = write_growth(report, out, argv) if out is not None else None
    if problem is not None:
        print(problem, file=sys.stderr)
    if report.interrupted:
        raise KeyboardInterrupt


def _kernels(repeat: int, out: Path | None, json_output: bool) -> None:
    from llmcad_mlx.machine import this_machine
    from llmcad_mlx.measure.kernels import kernel_notes, kernel_table, time_kernels
    from llmcad_mlx.measure.output import to_markdown
    from llmcad_mlx.store.names import device_name

    times = time_kernels(repeat=repeat)
    notes = kernel_notes(device_name())
    report = {
        "device": device_name(),
        "machine": asdict(this_machine()),
        "notes": notes,
        "times": [asdict(entry) for entry in times],
    }
    if json_output:
        print(json.dumps(report))
    else:
        print_tables([kernel_table(times)], notes)
    if out is not None:
        (out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (out / "kernels.md").write_text(to_markdown([kernel_table(times)], notes) + "\n", encoding="utf-8")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr while it is a terminal; the callback is called before each generation."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Four redraws a second are enough, and take nothing from what is measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("loading", total=total)

        def on_turn(name: str) -> None:
            shown = progress.tasks[0]
            progress.update(task, description=name, advance=0 if shown.description == "loading" else 1)

        yield on_turn
