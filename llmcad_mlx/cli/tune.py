"""`llmcad-mlx tune`: find the draft that serves a target best, and use it from then on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcad_mlx.cli import options
from llmcad_mlx.cli.tables import print_tables

if TYPE_CHECKING:
    from collections.abc import Callable


def tune(
    *,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[TARGET]", help="Model folder, hub repository or preset. Default: the embedded smollm2-135m."
        ),
    ] = None,
    drafts: Annotated[
        str | None,
        typer.Option(
            "--drafts",
            help="Comma-separated, each as --draft takes it. Default: the preset's own, the one chosen before, "
            "ngram, and self:2, self:3, self:4 where the target has more bits. 'none' is always measured.",
        ),
    ] = None,
    bits: Annotated[
        str,
        typer.Option(
            "--bits", help="Draft models are also tried in so many bits, where they have more; or 'none'."
        ),
    ] = "2,3,4,8",
    trim: Annotated[
        str,
        typer.Option(
            "--trim",
            help="Draft models, in all bits, are also tried with an output vocabulary of only so many usual "
            "tokens; or 'none'.",
        ),
    ] = "8192",
    memory: options.Memory,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="Prompts of your own: a TOML file of tables [[domain]] with name and text."
        ),
    ] = None,
    per_domain: Annotated[
        int | None, typer.Option("--per-domain", help="Only the first so many prompts of each domain, at least 2.")
    ] = None,
    max_tokens: options.MaxTokens = 64,
    repeat: Annotated[int, typer.Option("--repeat", help="Repetitions of all prompts.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", help="Prompts run before measuring.")] = 2,
    temp: options.Temperature = 0.0,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for tune.json, tune.md and tune.png.")] = None,
    json_output: options.Json = False,
) -> None:
    """Measure drafts for a target, choose the best and remember it: --draft auto means it from then on."""
    from llmcad_mlx.measure.output import make_folder
    from llmcad_mlx.measure.tune import TunePlan, run_tune
    from llmcad_mlx.measure.tune_report import tune_json, tune_notes, tune_tables, write_tune

    plan = TunePlan.of(drafts, bits, trim, prompts, per_domain, max_tokens, repeat, warmup, temp, seed)
    if out is not None:
        make_folder(out)
    argv = ["llmcad-mlx", *sys.argv[1:]]
    with _progress() as on_turn:
        report = run_tune(plan, target, memory, not json_output, on_turn)
    if json_output:
        print(json.dumps(tune_json(report, argv)))
    else:
        print_tables(tune_tables(report), tune_notes(report))
    missing = write_tune(report, out, argv) if out is not None else None
    if missing is not None:
        print(missing, file=sys.stderr)
    if report.outcome.interrupted:
        raise KeyboardInterrupt
    if report.problem is not None:
        raise report.problem


@contextmanager
def _progress() -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr while it is a terminal, from the first generation on: before, downloads draw bars of their
    own. The callback is called before each generation."""
    if not sys.stderr.isatty():
        yield lambda label, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Four redraws a second are enough, and take nothing from what is measured.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
    task = bar.add_task("", total=None)
    begun = False

    def on_turn(label: str, total: int) -> None:
        nonlocal begun
        bar.update(task, description=label, total=total, advance=1 if begun else 0)
        if not begun:
            bar.start()
        begun = True

    try:
        yield on_turn
    finally:
        if begun:
            bar.stop()
