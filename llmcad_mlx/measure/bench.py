"""`llmcad-mlx bench`: variants compared on the same prompts, from what was asked for to a report with plots."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import mlx.core as mx

from llmcad_mlx.loader import LoadedPair
from llmcad_mlx.measure import output
from llmcad_mlx.measure.output import NOTHING, Origin, Report, Table, number, percent, share
from llmcad_mlx.measure.runner import (
    OnTurn,
    Outcome,
    Run,
    Workload,
    encode_prompts,
    make_contenders,
    run_interleaved,
    run_mismatches,
    total_stats,
)
from llmcad_mlx.measure.variants import MLX_LM, PLAIN, Variant, ablated, forced_nodes
from llmcad_mlx.memory import MemoryPlan
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.pull import DEFAULT_PRESET

ALL = "all"


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


# -- summary: pure arithmetic ----------------------------------------------------------------------------

Speed = Literal["tokens_per_s", "prompt_tokens_per_s"]


@dataclass(frozen=True, slots=True)
class VariantSummary:
    """One variant over the runs of a domain ("all": of every domain). None: not known for this variant.

    Speeds are medians over runs. `*_vs_*` are medians of the ratios at each place (prompt and repetition) where
    both variants ran. `tokens_per_pass` and `acceptance_rate` are totals divided by totals, the shares parts of
    all decoding seconds. `survival_rate`: of the passes in which the draft went on while the target waited, those
    that left it something to start the next round with. `bound_share`: speed as a share of A·B/W, with A tokens
    per pass, W bytes read per pass and B the emulated read rate. `mismatches` counts the tokens that differ from
    plain decoding's at the same place, of `num_compared`.
    """

    variant: str
    domain: str
    num_runs: int
    num_tokens: int
    tokens_per_s: float | None
    tokens_per_s_vs_plain: float | None
    worst_prompt_vs_plain: float | None
    tokens_per_s_vs_mlx_lm: float | None
    prompt_tokens_per_s: float | None
    prompt_vs_mlx_lm: float | None
    tokens_per_pass: float | None
    break_even: float | None
    acceptance_rate: float | None
    draft_share: float | None
    verify_share: float | None
    wait_share: float | None
    survival_rate: float | None
    bound_share: float | None
    other_share: float | None
    mismatches: int | None
    num_compared: int


def summarise(
    runs: Sequence[Run], comparable: bool = True, read_bandwidth: float | None = None
) -> list[VariantSummary]:
    """Lines for all variants over all domains, then per domain when there are several.

    comparable: whether mlx-lm's text should equal ours, which above temperature 0 it does not. read_bandwidth:
    emulated bytes per second.
    """
    domains = list(dict.fromkeys(run.place.domain for run in runs))
    groups = {ALL: list(runs)}
    if len(domains) > 1:
        groups |= {domain: [run for run in runs if run.place.domain == domain] for domain in domains}
    return [
        _summary(variant, domain, members, comparable, read_bandwidth)
        for domain, members in groups.items()
        for variant in dict.fromkeys(run.variant for run in runs)
        if any(run.variant == variant for run in members)
    ]


def ratios(runs: Sequence[Run], variant: str, reference: str, speed: Speed) -> list[float]:
    """`speed` of `variant` over that of `reference`, at each place where both have one."""
    places = {run.place: run for run in runs if run.variant == reference}
    both = [(run, places[run.place]) for run in runs if run.variant == variant and run.place in places]
    pairs = [(getattr(ours, speed), getattr(theirs, speed)) for ours, theirs in both]
    return [ours / theirs for ours, theirs in pairs if ours is not None and theirs]


def _summary(
    variant: str, domain: str, runs: Sequence[Run], comparable: bool, read_bandwidth: float | None
) -> VariantSummary:
    own = [run for run in runs if run.variant == variant]
    told = [
        (run, wrong)
        for run, wrong in zip(runs, run_mismatches(runs, comparable), strict=True)
        if run.variant == variant and wrong is not None
    ]
    stats = total_stats(own)
    decode_s = sum(run.generation.decode_s for run in own if run.generation.stats is not None)
    draft, verify, wait = (share(s, decode_s) for s in (stats.draft_s, stats.verify_s, stats.io_wait_s))
    return VariantSummary(
        variant=variant,
        domain=domain,
        num_runs=len(own),
        num_tokens=sum(len(run.generation.tokens) for run in own),
        tokens_per_s=_median(run.tokens_per_s for run in own),
        tokens_per_s_vs_plain=_median(ratios(runs, variant, PLAIN, "tokens_per_s")),
        worst_prompt_vs_plain=_worst_prompt(runs, variant),
        tokens_per_s_vs_mlx_lm=_median(ratios(runs, variant, MLX_LM, "tokens_per_s")),
        prompt_tokens_per_s=_median(run.prompt_tokens_per_s for run in own),
        prompt_vs_mlx_lm=_median(ratios(runs, variant, MLX_LM, "prompt_tokens_per_s")),
        tokens_per_pass=share(stats.generated_tokens, stats.target_passes),
        break_even=_break_even(runs, own),
        acceptance_rate=share(stats.accepted, stats.path_tested),
        draft_share=draft,
        verify_share=verify,
        wait_share=wait,
        survival_rate=share(stats.survived, stats.provisional_passes),
        bound_share=None if read_bandwidth is None else _bound_share(own, read_bandwidth),
        other_share=max(1.0 - sum(part or 0.0 for part in (draft, verify, wait)), 0.0) if decode_s > 0.0 else None,
        mismatches=sum(wrong for _, wrong in told) if told else None,
        num_compared=sum(len(run.generation.tokens) for run, _ in told),
    )


def _worst_prompt(runs: Sequence[Run], variant: str) -> float | None:
    by_prompt: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_prompt.setdefault((run.place.domain, run.place.prompt), []).append(run)
    found = [_median(ratios(members, variant, PLAIN, "tokens_per_s")) for members in by_prompt.values()]
    return min((ratio for ratio in found if ratio is not None), default=None)


def _break_even(runs: Sequence[Run], own: Sequence[Run]) -> float | None:
    """Seconds a pass over plain's seconds a token, at the places where both ran."""
    plain = {run.place: run for run in runs if run.variant == PLAIN}
    both = [(run.generation, plain[run.place].generation) for run in own if run.place in plain]
    ours = [(done.decode_s, done.stats.target_passes) for done, _ in both if done.stats is not None]
    theirs = [(done.decode_s, done.num_timed) for ours, done in both if ours.stats is not None]
    pass_s, token_s = (share(sum(s for s, _ in pairs), sum(n for _, n in pairs)) for pairs in (ours, theirs))
    return None if pass_s is None or token_s is None else share(pass_s, token_s)


def _bound_share(runs: Sequence[Run], read_bandwidth: float) -> float | None:
    """Speed over A·B/W is the time that reading takes over the time that decoding took."""
    done = [run.generation for run in runs]
    num_bytes = sum(g.stats.target_passes * g.pass_bytes for g in done if g.stats is not None)
    return share(num_bytes / read_bandwidth, sum(g.decode_s for g in done)) or None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def summary_tables(lines: Sequence[VariantSummary]) -> list[Table]:
    """A table for all domains together and one for each, a row per variant."""
    tables = []
    for domain in dict.fromkeys(line.domain for line in lines):
        rows = [_cells(line, lines) for line in lines if line.domain == domain]
        tables.append(Table.of("all prompts" if domain == ALL else domain, rows))
    return tables


def _cells(line: VariantSummary, lines: Sequence[VariantSummary]) -> dict[str, str]:
    """A row by header; what none of `lines` has something for is left out."""
    names = {other.variant for other in lines}
    cells = {"variant": line.variant, "tokens per s": number(line.tokens_per_s)}
    if PLAIN in names:
        cells["× plain"] = number(line.tokens_per_s_vs_plain, 2)
        cells["worst prompt"] = number(line.worst_prompt_vs_plain, 2)
    if MLX_LM in names:
        cells["× mlx-lm"] = number(line.tokens_per_s_vs_mlx_lm, 2)
    cells["tokens per pass"] = number(line.tokens_per_pass, 2)
    if PLAIN in names:
        cells["break-even"] = number(line.break_even, 2)
    cells["accepted"] = percent(line.acceptance_rate)
    cells |= {"draft": percent(line.draft_share), "verify": percent(line.verify_share)}
    cells["other"] = percent(line.other_share)
    if any(other.wait_share for other in lines):
        cells |= {"waits": percent(line.wait_share), "survived": percent(line.survival_rate)}
    if any(other.bound_share for other in lines):
        cells["of A·B/W"] = percent(line.bound_share)
    cells["prompt tokens per s"] = number(line.prompt_tokens_per_s, 0)
    if MLX_LM in names:
        cells["prompt × mlx-lm"] = number(line.prompt_vs_mlx_lm, 1)
    cells["wrong tokens"] = NOTHING if line.mismatches is None else f"{line.mismatches}/{line.num_compared}"
    return cells


# -- plots -----------------------------------------------------------------------------------------------

Lines = Sequence[VariantSummary]

_SHARES = (
    ("verify", "verify", output.BLUE, "white"),
    ("draft", "draft", output.ORANGE, "black"),
    ("wait", "wait for weights", output.SKY, "black"),
    ("other", "other", output.GREY, "black"),
)
_BOUND = "tokens per pass × read rate / bytes per pass"
_NARROW = 7.0  # per cent; a narrower part has no room for its figure
_LONG_NAME = 22  # letters


def write_plots(lines: Lines, subtitle: str, folder: Path) -> None:
    """Draw what there is to see of `lines`, over all domains, into `folder`; `subtitle` says what was measured.

    Plots with nothing to show are not written, and removed where an earlier run left them. Raises ImportError
    where matplotlib is missing.
    """
    overall = [line for line in lines if line.domain == ALL]
    for name, title, chosen, draw in (
        ("tokens_per_s", "Decoding speed", _with("tokens_per_s", overall), _draw_speed),
        ("time_split", "Where decoding time goes", _with("verify_share", overall), _draw_split),
        ("tokens_per_pass", "Tokens per target pass by tree size", _of_trees(overall), _draw_nodes),
        ("ablation", "What each part of a policy contributes", _of_ablation(overall), _draw_ablation),
        ("bound", f"Speed as a share of A·B/W: {_BOUND}", _with("bound_share", overall), _draw_bound),
    ):
        file, figure = folder / f"{name}.png", output.new_figure(title, subtitle)
        if chosen:
            draw(figure, chosen)
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
