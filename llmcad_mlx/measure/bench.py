"""`llmcad-mlx bench`: variants compared on the same prompts, from what was asked for to a report with plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import mlx.core as mx

from llmcad_mlx.loader import LoadedPair
from llmcad_mlx.measure import output, runner
from llmcad_mlx.measure.output import NOTHING, Plot, Report, Table, number, share
from llmcad_mlx.measure.runner import OnTurn, Run, total_stats
from llmcad_mlx.measure.workload import MLX_LM, PLAIN, Variant, Workload, grouped
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import DEFAULT_PRESET, own_draft_name

ALL = "all"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was measured, and on what. `target`: its name for people. `interrupted`: Ctrl-C came before the last
    run."""

    variants: Sequence[Variant]
    workload: Workload
    target: str
    pair: LoadedPair
    runs: Sequence[Run]
    interrupted: bool

    @property
    def comparable(self) -> bool:
        """Whether mlx-lm's tokens should be ours: above temperature 0 it draws other random numbers."""
        return self.workload.temperature == 0.0


def run_benchmark(
    variants: Sequence[Variant], workload: Workload, pair: LoadedPair, target: str | None, on_turn: OnTurn
) -> Benchmark:
    """Run all variants on a loaded pair; `target` is its name for people, `on_turn` as in `take_turns`. Ctrl-C
    ends it early with what was done. Raises UsageError for a variant that the pair cannot run."""
    runs: list[Run] = []
    turns = runner.take_turns(
        runner.make_contenders(variants, pair), runner.encode_prompts(workload.prompts, pair), workload, on_turn
    )
    interrupted = runner.until_interrupted(turns, runs)
    return Benchmark(variants, workload, target or DEFAULT_PRESET, pair, runs, interrupted)


def bench_report(done: Benchmark) -> Report:
    """Tables, notes, plots, and in the document everything: bytes in bytes, times in seconds."""
    runs, work, pair, rate = done.runs, done.workload, done.pair, done.pair.options.read_bandwidth
    lines, wrong = summarise(runs, done.comparable, rate), runner.run_mismatches(runs, done.comparable)
    document = {
        "target": done.target,
        "draft": own_draft_name(pair.names.draft_name),
        "options": {
            "variants": [variant.name for variant in done.variants],
            "prompts": [f"{prompt.domain}/{prompt.name}" for prompt in work.prompts],
            **work.to_json(),
            **asdict(pair.options),
        },
        "memory_plan": None if pair.plan is None else asdict(pair.plan),
        "summary": [asdict(line) for line in lines],
        "runs": [_run_json(run, count) for run, count in zip(runs, wrong, strict=True)],
    }
    return Report.of_runs(
        "bench",
        f"{done.target}, draft {pair.names.draft_label}",
        rate,
        summary_tables(lines),
        _notes(done),
        document,
        plots=plots_of(lines),
        interrupted=done.interrupted,
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
    work, plan = done.workload, done.pair.plan
    notes = [
        f"Prompts: {len(work.prompts)}; {work.summary} All variants interleaved in one process; speeds are "
        "medians, ratios medians of the ratios at the same prompt and repetition. Wrong tokens differ from "
        "plain's, of all."
    ]
    if plan is not None:
        rate = output.emulated_rate(done.pair.options.read_bandwidth, ", ")
        notes.append(
            f"Target: {format_size(plan.pinned_bytes)} pinned, "
            f"{format_size(plan.streamed_bytes)} read on each pass{rate}."
            + (" All speeds are emulated." if rate else "")
            + " Waits: the processor has nothing to do while weights load. Survived: passes after which something "
            "drafted meanwhile was left to start with. A: tokens per pass, B: read rate, W: bytes per pass."
        )
    if any(variant.is_mlx_lm for variant in done.variants):
        notes.append(
            "mlx-lm computes the first token with the prompt, so its decoding speed leaves that token out. "
            "Its tokens may differ from plain's by rounding."
        )
        if mx.default_device() == mx.cpu:
            notes.append(
                "On this CPU mlx-lm runs on weights cast to float32, which favours it: MLX's CPU matmul is many "
                "times slower in 16 bits."
            )
        if not done.comparable:
            notes.append("Above temperature 0 mlx-lm draws other random numbers; its text is not compared.")
    if any(variant.name == PLAIN for variant in done.variants):
        notes.append(
            "Worst prompt: the least, over prompts, of the median ratio over repetitions. Break-even: the tokens "
            "per pass at which passes that take so long would be as fast as plain decoding."
        )
    else:
        notes.append("Without the variant 'plain' there is nothing to compare texts and speeds with.")
    if done.interrupted:
        notes.append(f"Interrupted: only {len(done.runs)} generations were done.")
    return notes


Speed = Literal["tokens_per_s", "prompt_tokens_per_s"]


@dataclass(frozen=True, slots=True)
class VariantSummary:
    """One variant over the runs of a domain ("all": of every domain). None: not known for this variant.

    Speeds are medians over runs. `*_vs_*` are medians of the ratios at each place (prompt and repetition) where
    both variants ran. `tokens_per_pass` and `acceptance_rate` are totals divided by totals, the shares parts of
    all decoding seconds. `survival_rate`: of the passes in which the draft went on while the target waited, those
    that left it something to start the next round with. `bound_share`: speed as a share of A·B/W, with A tokens
    per pass, W bytes read per pass and B the emulated read rate: reading's part of the time. `mismatches` counts
    the tokens that differ from plain decoding's at the same place, of `num_compared`.
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
    """Lines for all variants over all domains, then per domain when there are several. comparable: as in
    `Benchmark`. read_bandwidth: emulated bytes per second."""
    by_domain = grouped(runs, lambda run: run.place.domain)
    groups = {ALL: list(runs)} | (by_domain if len(by_domain) > 1 else {})
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
    stats, (mismatches, num_compared) = total_stats(own), runner.count_mismatches(runs, variant, comparable)
    done = [run.generation for run in own]
    decode_s, all_s = sum(g.decode_s for g in done if g.stats is not None), sum(g.decode_s for g in done)
    num_bytes = sum(g.stats.target_passes * g.pass_bytes for g in done if g.stats is not None)
    prompts = grouped(runs, lambda run: run.place.name).values()
    each = [_median(ratios(group, variant, PLAIN, "tokens_per_s")) for group in prompts]
    draft, verify, wait = (share(s, decode_s) for s in (stats.draft_s, stats.verify_s, stats.io_wait_s))
    return VariantSummary(
        variant=variant,
        domain=domain,
        num_runs=len(own),
        num_tokens=sum(len(run.generation.tokens) for run in own),
        tokens_per_s=_median(run.tokens_per_s for run in own),
        tokens_per_s_vs_plain=_median(ratios(runs, variant, PLAIN, "tokens_per_s")),
        worst_prompt_vs_plain=min((ratio for ratio in each if ratio is not None), default=None),
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
        bound_share=None if read_bandwidth is None else share(num_bytes / read_bandwidth, all_s) or None,
        other_share=max(1.0 - sum(part or 0.0 for part in (draft, verify, wait)), 0.0) if decode_s > 0.0 else None,
        mismatches=mismatches if num_compared else None,
        num_compared=num_compared,
    )


def _break_even(runs: Sequence[Run], own: Sequence[Run]) -> float | None:
    """Seconds a pass over plain's seconds a token, at the places where both ran."""
    plain = {run.place: run for run in runs if run.variant == PLAIN}
    both = [(run.generation, plain[run.place].generation) for run in own if run.place in plain]
    ours = [(done.decode_s, done.stats.target_passes) for done, _ in both if done.stats is not None]
    theirs = [(done.decode_s, done.num_timed) for ours, done in both if ours.stats is not None]
    pass_s, token_s = (share(sum(s for s, _ in pairs), sum(n for _, n in pairs)) for pairs in (ours, theirs))
    return None if pass_s is None or token_s is None else share(pass_s, token_s)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _percent(part: float | None) -> str:
    return NOTHING if part is None else f"{part:.0%}"


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
    plain, theirs = PLAIN in names, MLX_LM in names
    waits, bound = (any(getattr(other, name) for other in lines) for name in ("wait_share", "bound_share"))
    columns = (
        (True, "tokens per s", number(line.tokens_per_s)),
        (plain, "× plain", number(line.tokens_per_s_vs_plain, 2)),
        (plain, "worst prompt", number(line.worst_prompt_vs_plain, 2)),
        (theirs, "× mlx-lm", number(line.tokens_per_s_vs_mlx_lm, 2)),
        (True, "tokens per pass", number(line.tokens_per_pass, 2)),
        (plain, "break-even", number(line.break_even, 2)),
        (True, "accepted", _percent(line.acceptance_rate)),
        (True, "draft", _percent(line.draft_share)),
        (True, "verify", _percent(line.verify_share)),
        (True, "other", _percent(line.other_share)),
        (waits, "waits", _percent(line.wait_share)),
        (waits, "survived", _percent(line.survival_rate)),
        (bound, "of A·B/W", _percent(line.bound_share)),
        (True, "prompt tokens per s", number(line.prompt_tokens_per_s, 0)),
        (theirs, "prompt × mlx-lm", number(line.prompt_vs_mlx_lm, 1)),
    )
    wrong = NOTHING if line.mismatches is None else f"{line.mismatches}/{line.num_compared}"
    shown = {header: cell for known, header, cell in columns if known}
    return {"variant": line.variant, **shown, "wrong tokens": wrong}


_SHARES = (
    ("verify", "verify", output.BLUE, "white"),
    ("draft", "draft", output.ORANGE, "black"),
    ("wait", "wait for weights", output.SKY, "black"),
    ("other", "other", output.GREY, "black"),
)
_NARROW = 7.0  # per cent; a narrower part has no room for its figure
_LONG_NAME = 22  # letters


def plots_of(lines: Sequence[VariantSummary]) -> list[Plot]:
    """Speeds, and where the time goes, over all domains."""
    overall = [line for line in lines if line.domain == ALL]
    timed = [line for line in overall if line.tokens_per_s is not None]
    split = [line for line in overall if line.verify_share is not None]
    return [
        Plot("tokens_per_s", "Decoding speed", partial(_draw_speed, timed) if timed else None),
        Plot("time_split", "Where decoding time goes", partial(_draw_split, split) if split else None),
    ]


def _draw_speed(lines: Sequence[VariantSummary], figure: Any) -> None:
    (axes,) = output.bar_panels(figure, 1.6 + 0.4 * len(lines))
    bars = axes.barh(_names(lines), [line.tokens_per_s for line in lines], color=output.BLUE)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("tokens/s (median over runs)")


def _draw_split(lines: Sequence[VariantSummary], figure: Any) -> None:
    (axes,) = output.bar_panels(figure, 1.6 + 0.4 * len(lines))
    left = [0.0] * len(lines)
    for part, label, colour, ink in _SHARES:
        shares = [100.0 * (getattr(line, f"{part}_share") or 0.0) for line in lines]
        bars = axes.barh(_names(lines), shares, left=left, label=label, color=colour)
        figures = [f"{share:.0f}" if share >= _NARROW else "" for share in shares]
        axes.bar_label(bars, figures, label_type="center", color=ink, fontsize=9)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlabel("share of decoding time, %")
    axes.set_xlim(0, 100)
    output.legend_below(figure)


def _names(lines: Sequence[VariantSummary]) -> list[str]:
    names = [line.variant for line in lines]
    return [name.replace("-no-", "\n-no-", 1) if len(name) > _LONG_NAME else name for name in names]
