"""`llmcad-mlx bench`: compare ways of decoding, interleaved in one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcad_mlx.cli import options
from llmcad_mlx.cli.measuring import command_line, measuring, publish
from llmcad_mlx.errors import UsageError
from llmcad_mlx.measure.workload import DEFAULT_VARIANTS, MLX_LM, Workload, listed, parse_variants, variant_help
from llmcad_mlx.settings import MemoryOptions, check_integer

if TYPE_CHECKING:
    from collections.abc import Collection

    from llmcad_mlx.measure.output import Report

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
    if kernels:
        _refuse_others(command, "kernels", _FOR_KERNELS)
        report = _kernels(repeat, out)
    elif growth:
        _refuse_others(command, "growth", _FOR_GROWTH)
        report = _growth(pair, memory, repeat, out, json_output)
    else:
        from llmcad_mlx.loader import load_pair
        from llmcad_mlx.measure.bench import bench_report, run_benchmark

        workload = Workload.of(
            prompts, domains, per_domain=per_domain,
            repeat=repeat, warmup=warmup, max_tokens=max_tokens, temperature=temp, seed=seed,
        )  # fmt: skip
        chosen = parse_variants(_with_others(variants, compare))
        with measuring(out) as on_turn:
            loaded = load_pair(pair.target, pair.draft, not json_output, memory)
            done = run_benchmark(chosen, workload, loaded, pair.target, on_turn)
        report = bench_report(done, command_line())
    publish(report, json_output, out)


def _with_others(variants: str, compare: str | None) -> str:
    """The variants, and another program's where they are not among them already."""
    if compare is None:
        return variants
    if compare != MLX_LM:
        raise UsageError(f"compare: {compare!r} is unknown; the one program to compare with is '{MLX_LM}'")
    return variants if MLX_LM in listed(variants) else f"{variants},{MLX_LM}"


def _refuse_others(command: typer.Context, mode: str, used: Collection[str]) -> None:
    """Raises UsageError for an option that was given and that `--mode` makes no use of."""
    for name in command.params:
        source = command.get_parameter_source(name)
        if name not in {mode, *used} and source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP"):
            raise UsageError(f"{name.replace('_', '-')}: --{mode} makes no use of it; leave one of the two out")


def _growth(
    pair: options.PairOptions, memory: MemoryOptions, repeat: int, out: Path | None, json_output: bool
) -> Report:
    from llmcad_mlx.measure.growth import Growth, growth_report

    growth = Growth(pair.target, memory, repeat)
    with measuring(out) as on_turn:
        growth.measure(not json_output, on_turn)
    return growth_report(growth, command_line())


def _kernels(repeat: int, out: Path | None) -> Report:
    from llmcad_mlx.measure.growth import kernel_report, time_kernels

    check_integer("repeat", repeat, 1, 10_000)
    with measuring(out):
        times = time_kernels(repeat=repeat)
    return kernel_report(times, command_line())
