"""`llmcad-mlx plan`, `tune` and `bench`: what a pair is predicted to do, which draft serves it best, and how fast
ways of decoding are."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Context, Option

from llmcad_mlx.cli import options
from llmcad_mlx.errors import UsageError
from llmcad_mlx.measure.workload import DEFAULT_VARIANTS, MLX_LM, Workload, listed, parse_variants, variant_help
from llmcad_mlx.settings import check_integer

if TYPE_CHECKING:
    from llmcad_mlx.loader import PlannedPair
    from llmcad_mlx.measure.output import Report
    from llmcad_mlx.measure.runner import OnTurn

Repeat = Annotated[int, Option(help="Repetitions of all prompts.")]
Warmup = Annotated[int, Option(help="Prompts run before measuring.")]

_FOR_KERNELS = ("repeat", "out", "json_output")
_FOR_GROWTH = (*_FOR_KERNELS, "model", "target", "memory", "pinned", "context", "read_bandwidth")


def plan(*, pair: options.Pair, memory: options.Memory, json_output: options.Json = False) -> None:
    """Show what a memory budget is spent on, predict the speed, and say what more memory would buy.

    Of models that are not on this machine only config.json is fetched; their sizes are estimated from it.
    """
    from llmcad_mlx.loader import conditions, plan_pair
    from llmcad_mlx.measure.plan import make_forecast, plan_report
    from llmcad_mlx.measure.sketch import SketchedPair, sketch_pair
    from llmcad_mlx.store.names import find_pair, missing_pair

    planned: PlannedPair | SketchedPair
    if missing := missing_pair(pair.target, pair.draft, conditions(memory)):
        planned = sketch_pair(*missing, memory)
    else:
        names = find_pair(pair.target, pair.draft, not json_output, conditions(memory))
        planned = plan_pair(names, memory)
    _publish(plan_report(planned, make_forecast(planned)), json_output)


def tune(
    *,
    target: options.Target = None,
    drafts: Annotated[
        str | None,
        Option(
            help="Comma-separated, each as --draft takes it. Default: the preset's own, the one chosen before, "
            "ngram, and self:2, self:3, self:4 where the target has more bits. 'none' is always measured."
        ),
    ] = None,
    bits: Annotated[
        str, Option(help="Draft models are also tried in so many bits, where they have more; or 'none'.")
    ] = "2,3,4,8",
    trim: Annotated[
        str,
        Option(
            help="Draft models, in all bits, are also tried with an output vocabulary of only so many usual "
            "tokens; or 'none'."
        ),
    ] = "8192",
    memory: options.Memory,
    prompts: Annotated[
        Path | None, Option(help="Prompts of your own: a TOML file of tables [[domain]] with name and text.")
    ] = None,
    per_domain: Annotated[
        int | None, Option(help="Only the first so many prompts of each domain, at least 2.")
    ] = None,
    max_tokens: options.MaxTokens = 64,
    repeat: Repeat = 3,
    warmup: Warmup = 2,
    temp: options.Temperature = 0.0,
    seed: options.Seed = 0,
    out: Annotated[Path | None, Option(help="Folder for tune.json, tune.md and tune.png.")] = None,
    json_output: options.Json = False,
) -> None:
    """Measure drafts for a target, choose the best and remember it: --draft auto means it from then on."""
    from llmcad_mlx.measure.candidates import DraftOptions
    from llmcad_mlx.measure.tune import TunePlan, run_tune, tune_report

    plan = TunePlan.of(
        DraftOptions.of(drafts, bits, trim), memory, prompts, per_domain=per_domain,
        repeat=repeat, warmup=warmup, max_tokens=max_tokens, temperature=temp, seed=seed,
    )  # fmt: skip
    with _measuring(out) as on_turn:
        done = run_tune(plan, target, not json_output, on_turn)
    _publish(tune_report(done), json_output, out)


def bench(
    *,
    command: Context,
    pair: options.Pair,
    memory: options.Memory,
    variants: Annotated[str, Option(help=f"Comma-separated: {variant_help()}.")] = DEFAULT_VARIANTS,
    compare: Annotated[
        str | None, Option(help="'mlx-lm': mlx_lm's own generation beside the variants, in the same run.")
    ] = None,
    domains: Annotated[
        str,
        Option(help="Comma-separated: code, explanation, sql, translation (the default), repeat, long, or all."),
    ] = "",
    prompts: Annotated[
        Path | None, Option(help="Prompts of your own: a TOML file like the package's prompts.toml.")
    ] = None,
    per_domain: Annotated[int | None, Option(help="Only the first so many prompts of each domain.")] = None,
    max_tokens: options.MaxTokens = 128,
    repeat: Repeat = 3,
    warmup: Warmup = 2,
    temp: options.Temperature = 0.0,
    seed: options.Seed = 0,
    out: Annotated[Path | None, Option(help="Folder for bench.json, bench.md and plots.")] = None,
    kernels: Annotated[
        bool, Option("--kernels", help="Time matrix kernels by rows instead; loads no model.")
    ] = False,
    growth: Annotated[
        bool,
        Option("--growth", help="Time single passes of the target instead: by streamed bytes, nodes, context."),
    ] = False,
    json_output: options.Json = False,
) -> None:
    """Compare ways of decoding on the same prompts, interleaved; prints medians, ratios and mismatches."""
    if kernels:
        _refuse_others(command, "kernels", _FOR_KERNELS)
        from llmcad_mlx.measure.growth import kernel_report, time_kernels

        check_integer("repeat", repeat, 1, 10_000)
        with _measuring(out):
            report = kernel_report(time_kernels(repeat=repeat))
    elif growth:
        _refuse_others(command, "growth", _FOR_GROWTH)
        from llmcad_mlx.measure.growth import Growth, growth_report

        passes = Growth(pair.target, memory, repeat)
        with _measuring(out) as on_turn:
            passes.measure(not json_output, on_turn)
        report = growth_report(passes)
    else:
        from llmcad_mlx.loader import load_pair
        from llmcad_mlx.measure.bench import bench_report, run_benchmark

        workload = Workload.of(
            prompts, domains, per_domain=per_domain,
            repeat=repeat, warmup=warmup, max_tokens=max_tokens, temperature=temp, seed=seed,
        )  # fmt: skip
        if compare not in (None, MLX_LM):
            raise UsageError(f"compare: {compare!r} is unknown; the one program to compare with is '{MLX_LM}'")
        if compare is not None and MLX_LM not in listed(variants):
            variants = f"{variants},{MLX_LM}"
        chosen = parse_variants(variants)
        with _measuring(out) as on_turn:
            loaded = load_pair(pair.target, pair.draft, not json_output, memory)
            done = run_benchmark(chosen, workload, loaded, pair.target, on_turn)
        report = bench_report(done)
    _publish(report, json_output, out)


def _refuse_others(command: Context, mode: str, used: tuple[str, ...]) -> None:
    """Raises UsageError for an option that was given and that `--mode` makes no use of."""
    for name in options.given(command):
        if name not in (mode, *used):
            raise UsageError(f"{name.replace('_', '-')}: --{mode} makes no use of it; leave one of the two out")


def _publish(report: Report, json_output: bool, out: Path | None = None) -> None:
    """Print the report, drawn on a terminal, as Markdown elsewhere; write its files into the folder `out`. Raises
    what kept the command from its end: KeyboardInterrupt, or the report's problem."""
    if json_output:
        print(json.dumps(report.document))
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False)
        for table in report.tables:
            console.print(table.to_rich())
        for note in report.notes:
            console.print(note, style="dim")
    else:
        print(report.to_markdown())
    if out is not None and (without_plots := report.write(out)) is not None:
        print(without_plots, file=sys.stderr)
    if report.interrupted:
        raise KeyboardInterrupt
    if report.problem is not None:
        raise report.problem


@contextmanager
def _measuring(out: Path | None) -> Iterator[OnTurn]:
    """A bar on stderr where that is a terminal, from the first measured step on: before it, downloads draw theirs.
    Creates the folder `out` first; raises UsageError where that is not possible."""
    if out is not None:
        from llmcad_mlx.measure.output import make_folder

        make_folder(out)
    if not sys.stderr.isatty():
        yield lambda label, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Four redraws a second are enough, and take nothing from what is measured.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
    task = bar.add_task("", total=None)

    def on_step(label: str, total: int) -> None:
        bar.update(task, description=label, total=total, advance=int(bar.live.is_started))
        bar.start()

    try:
        yield on_step
    finally:
        if bar.live.is_started:
            bar.stop()
