"""`llmcad-mlx bench`: variants compared on the same prompts, from what was asked for to a report with plots."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from llmcad_mlx.loader import LoadedPair
from llmcad_mlx.measure import output
from llmcad_mlx.measure.output import Origin, Report
from llmcad_mlx.measure.runner import (
    OnTurn,
    Outcome,
    Run,
    Workload,
    encode_prompts,
    make_contenders,
    run_interleaved,
)
from llmcad_mlx.measure.summary import ALL, VariantSummary, run_mismatches, summarise, summary_tables
from llmcad_mlx.measure.variants import PLAIN, Variant, ablated, forced_nodes
from llmcad_mlx.memory.plan import MemoryPlan
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.pull import DEFAULT_PRESET


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All that was measured, and on what. `memory_plan`: None where nothing is streamed."""

    variants: tuple[Variant, ...]
    workload: Workload
    target: str
    draft: str
    memory: MemoryOptions
    memory_plan: MemoryPlan | None
    outcome: Outcome

    @property
    def comparable(self) -> bool:
        """Whether mlx-lm's tokens should be ours: above temperature 0 it draws other random numbers."""
        return self.workload.temperature == 0.0


def run_benchmark(
    variants: Sequence[Variant],
    workload: Workload,
    pair: LoadedPair,
    target: str | None = None,
    on_turn: OnTurn = lambda name, total: None,
) -> Benchmark:
    """Run all variants on a loaded pair; `target` is its name for people, `on_turn` as in `run_interleaved`.

    Raises UsageError for a variant that the pair cannot run.
    """
    contenders = make_contenders(variants, pair)
    outcome = run_interleaved(contenders, encode_prompts(workload.prompts, pair), workload, on_turn)
    name = target or DEFAULT_PRESET
    return Benchmark(tuple(variants), workload, name, pair.draft_name, pair.options, pair.plan, outcome)


def bench_report(done: Benchmark, argv: Sequence[str]) -> Report:
    """Tables, notes, plots, and in the document everything: bytes in bytes, times in seconds."""
    origin, notes, runs, rate = Origin(argv), _notes(done), done.outcome.runs, done.memory.read_bandwidth
    lines, wrong = summarise(runs, done.comparable, rate), run_mismatches(runs, done.comparable)
    named = f"{done.target}, draft {done.draft}"
    document = {
        **origin.to_json(),
        "target": done.target,
        "draft": done.draft,
        "options": {
            "variants": [variant.name for variant in done.variants],
            "prompts": [f"{prompt.domain}/{prompt.name}" for prompt in done.workload.prompts],
            **done.workload.to_json(),
            **asdict(done.memory),
        },
        "emulated": rate is not None,
        "memory_plan": None if done.memory_plan is None else asdict(done.memory_plan),
        "interrupted": done.outcome.interrupted,
        "notes": notes,
        "summary": [asdict(line) for line in lines],
        "runs": [_run_json(run, count) for run, count in zip(runs, wrong, strict=True)],
    }
    return Report(
        "bench",
        summary_tables(lines),
        notes,
        document,
        heading=f"# {named}\n\n{origin.to_markdown()}",
        draw=partial(write_plots, lines, f"{named}{output.emulated_rate(rate, '; reads ')}"),
        interrupted=done.outcome.interrupted,
    )


_COUNTED = (
    "tokens_per_pass", "acceptance_rate", "target_passes", "drafted", "tested", "accepted", "draft_s", "verify_s",
    "io_wait_s", "hidden_draft_s", "provisional", "provisional_passes", "survived", "streamed_bytes",
)  # fmt: skip


def _run_json(run: Run, mismatches: int | None) -> dict[str, Any]:
    done, stats = run.generation, run.generation.stats
    known = 0.0 if stats is None else stats.draft_s + stats.verify_s + stats.io_wait_s
    return {
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
        **{name: None if stats is None else getattr(stats, name) for name in _COUNTED},
        "other_s": None if stats is None else max(done.decode_s - known, 0.0),
        "pass_bytes": done.pass_bytes,
    }


def _notes(done: Benchmark) -> list[str]:
    """What a reader of the figures must know."""
    work = done.workload
    notes = [
        f"Prompts: {len(work.prompts)}; repetitions: {work.repeat}; at most {work.max_tokens} tokens; "
        f"temperature {work.temperature:g}. All variants interleaved in one process; speeds are medians, "
        "ratios medians of the ratios at the same prompt and repetition. Wrong tokens differ from plain's, of all."
    ]
    if done.memory_plan is not None:
        rate = output.emulated_rate(done.memory.read_bandwidth, ", ")
        notes.append(
            f"Target: {format_size(done.memory_plan.pinned_bytes)} pinned, "
            f"{format_size(done.memory_plan.streamed_bytes)} read on each pass{rate}."
            + (" All speeds are emulated." if rate else "")
            + " Waits: the processor has nothing to do while weights load. Survived: passes after which something "
            "drafted meanwhile was left to start with. A: tokens per pass, B: read rate, W: bytes per pass."
        )
    if any(variant.is_mlx_lm for variant in done.variants):
        notes += _mlx_lm_notes(done.comparable)
    if any(variant.name == PLAIN for variant in done.variants):
        notes.append(
            "Worst prompt: the least, over prompts, of the median ratio over repetitions. Break-even: the tokens "
            "per pass at which passes that take so long would be as fast as plain decoding."
        )
    else:
        notes.append("Without the variant 'plain' there is nothing to compare texts and speeds with.")
    if done.outcome.interrupted:
        notes.append(f"Interrupted: only {len(done.outcome.runs)} generations were done.")
    return notes


def _mlx_lm_notes(comparable: bool) -> list[str]:
    notes = [
        "mlx-lm computes the first token with the prompt, so its decoding speed leaves that token out. "
        "Its tokens may differ from plain's by rounding."
    ]
    if mx.default_device() == mx.cpu:
        notes.append(
            "On this CPU mlx-lm runs on weights cast to float32, which favours it: MLX's CPU matmul is many "
            "times slower in 16 bits."
        )
    if not comparable:
        notes.append("Above temperature 0 mlx-lm draws other random numbers; its text is not compared.")
    return notes


# -- plots -----------------------------------------------------------------------------------------------

Lines = Sequence[VariantSummary]

_SHARES = (
    ("verify", "verify", output.BLUE, "white"),
    ("draft", "draft", output.ORANGE, "black"),
    ("wait", "wait for weights", output.SKY, "black"),
    ("other", "other", output.GREY, "black"),
)
_NARROW = 7.0  # per cent; a narrower part has no room for its figure
_LONG_NAME = 22  # letters


def write_plots(lines: Lines, subtitle: str, folder: Path) -> None:
    """Draw what there is to see of `lines`, over all domains, into `folder`; `subtitle` says what was measured.

    Plots with nothing to show are not written, and removed where an earlier run left them. Raises ImportError
    where matplotlib is missing.
    """
    overall = [line for line in lines if line.domain == ALL]
    for plot in PLOTS:
        file, chosen, figure = folder / plot.file, plot.choose(overall), output.new_figure(plot.title, subtitle)
        if chosen:
            plot.draw(figure, chosen)
            figure.savefig(file, dpi=150)
        else:
            file.unlink(missing_ok=True)


def _bars(figure: Any, num_rows: int) -> Any:
    return output.bar_panels(figure, 1.6 + 0.4 * num_rows)[0]


def _short(line: VariantSummary) -> str:
    """A long name on two lines."""
    head, dash, rest = line.variant.partition("-no-")
    return f"{head}\n{dash}{rest}" if len(line.variant) > _LONG_NAME else line.variant


def _draw_speed(figure: Any, lines: Lines) -> None:
    axes = _bars(figure, len(lines))
    bars = axes.barh([_short(line) for line in lines], [line.tokens_per_s for line in lines], color=output.BLUE)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("tokens/s (median over runs)")


def _draw_split(figure: Any, lines: Lines) -> None:
    axes = _bars(figure, len(lines))
    left = [0.0] * len(lines)
    for part, label, colour, ink in _SHARES:
        shares = [100.0 * (getattr(line, f"{part}_share") or 0.0) for line in lines]
        bars = axes.barh([_short(line) for line in lines], shares, left=left, label=label, color=colour)
        figures = [f"{share:.0f}" if share >= _NARROW else "" for share in shares]
        axes.bar_label(bars, figures, label_type="center", color=ink, fontsize=9)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlabel("share of decoding time, %")
    axes.set_xlim(0, 100)
    output.legend_below(figure)


def _draw_nodes(figure: Any, lines: Lines) -> None:
    figure.set_size_inches(6.0, 4.0)
    axes = figure.subplots()
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        points = curves.setdefault(line.variant.partition(":")[0], [])
        points.append((forced_nodes(line.variant) or 0, line.tokens_per_pass or 0.0))
    for (kind, points), colour in zip(
        sorted(curves.items(), reverse=True), (output.BLUE, output.ORANGE), strict=False
    ):
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
    plain = next((line for line in lines if line.variant == PLAIN), None)
    for line in lines:
        if (parts := ablated(line.variant)) is not None:
            label = "no " + ",\nno ".join(parts.missing) if parts.missing else "whole"
            found.setdefault(label, {})[parts.policy] = line
    policies = list(dict.fromkeys(policy for row in found.values() for policy in row))
    height = 0.8 / len(policies)
    panels = output.bar_panels(figure, 1.6 + 0.8 * len(found), 2, width=10.0)
    for axes, attribute, label, digits in (
        (panels[0], "tokens_per_s", "tokens/s (median over runs)", "%.1f"),
        (panels[1], "tokens_per_pass", "tokens per pass", "%.2f"),
    ):
        for index, (policy, colour) in enumerate(zip(policies, (output.ORANGE, output.BLUE), strict=False)):
            rows = [(place, row[policy]) for place, row in enumerate(found.values()) if policy in row]
            at = [place + (index - (len(policies) - 1) / 2) * height for place, _ in rows]
            values = [getattr(line, attribute) or 0.0 for _, line in rows]
            bars = axes.barh(at, values, height, color=colour, label=policy)
            axes.bar_label(bars, fmt=digits, padding=3, fontsize=9)
        if plain is not None and getattr(plain, attribute):
            axes.axvline(getattr(plain, attribute), color="black", linestyle="--", linewidth=1, label=PLAIN)
        axes.set_xlabel(label)
    panels[0].set_yticks(range(len(found)), list(found))
    output.legend_below(figure)


def _draw_bound(figure: Any, lines: Lines) -> None:
    axes = _bars(figure, len(lines))
    shares = [100.0 * (line.bound_share or 0.0) for line in lines]
    bars = axes.barh([_short(line) for line in lines], shares, color=output.BLUE)
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
    found = [line for line in _with("tokens_per_pass", lines) if forced_nodes(line.variant) is not None]
    return found if len(found) > 1 else []


def _of_ablation(lines: Lines) -> Lines:
    """Policies that ran both whole and without a part, and plain decoding for comparison; [] without any."""
    found = [(line, parts) for line in lines if (parts := ablated(line.variant)) is not None]
    whole = {parts.policy for _, parts in found if not parts.missing}
    lacking = {parts.policy for _, parts in found if parts.missing}
    chosen = [line for line, parts in found if parts.policy in whole & lacking]
    return [*(line for line in lines if line.variant == PLAIN), *chosen] if chosen else []


@dataclass(frozen=True, slots=True)
class _Plot:
    """`choose` picks the lines that have something to show; `draw` gets them and an empty figure."""

    file: str
    title: str
    choose: Callable[[Lines], Lines]
    draw: Callable[[Any, Lines], None]


PLOTS = (
    _Plot("tokens_per_s.png", "Decoding speed", partial(_with, "tokens_per_s"), _draw_speed),
    _Plot("time_split.png", "Where decoding time goes", partial(_with, "verify_share"), _draw_split),
    _Plot("tokens_per_pass.png", "Tokens per target pass by tree size", _of_trees, _draw_nodes),
    _Plot("ablation.png", "What each part of a policy contributes", _of_ablation, _draw_ablation),
    _Plot(
        "bound.png",
        "Speed as a share of A·B/W: tokens per pass × read rate / bytes per pass",
        partial(_with, "bound_share"),
        _draw_bound,
    ),
)
