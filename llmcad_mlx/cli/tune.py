"""`llmcad-mlx tune`: find the draft that serves a target best, and use it from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcad_mlx.cli import options
from llmcad_mlx.cli.measuring import command_line, measuring, publish


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
    from llmcad_mlx.measure.candidates import DraftOptions
    from llmcad_mlx.measure.tune import TunePlan, run_tune, tune_report

    plan = TunePlan.of(
        DraftOptions.of(drafts, bits, trim), memory, prompts,
        per_domain=per_domain, repeat=repeat, warmup=warmup, max_tokens=max_tokens, temperature=temp, seed=seed,
    )  # fmt: skip
    with measuring(out) as on_turn:
        done = run_tune(plan, target, not json_output, on_turn)
    publish(tune_report(done, command_line()), json_output, out)
