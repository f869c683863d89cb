"""From single runs to one line per variant: medians, ratios, shares, mismatches. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Literal

from llmcad_mlx.measure.output import NOTHING, Table, number, percent, share
from llmcad_mlx.measure.runner import Run, total_stats
from llmcad_mlx.measure.variants import MLX_LM, PLAIN
from llmcad_mlx.results import GenerationStats

ALL = "all"

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


def run_mismatches(runs: Sequence[Run], comparable: bool = True, reference: str = PLAIN) -> list[int | None]:
    """For each run the tokens that differ from the reference's at the same place; None where that did not run
    there, and for mlx-lm unless `comparable`. What only one of two texts has differs."""
    expected = {run.place: run.generation.tokens for run in runs if run.variant == reference}
    return [
        sum(a != b for a, b in zip_longest(run.generation.tokens, expected[run.place]))
        if run.place in expected and (comparable or run.generation.stats is not None)
        else None
        for run in runs
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
    total = total_stats(own)
    stats = total or GenerationStats()
    decode_s = sum(run.generation.decode_s for run in own) if total is not None else 0.0
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


@dataclass(frozen=True, slots=True)
class _Column:
    """`shown`: whether there is something for it in all lines together."""

    header: str
    cell: Callable[[VariantSummary], str]
    shown: Callable[[Sequence[VariantSummary]], bool] = lambda lines: True


def _with(variant: str) -> Callable[[Sequence[VariantSummary]], bool]:
    return lambda lines: any(line.variant == variant for line in lines)


def _waiting(lines: Sequence[VariantSummary]) -> bool:
    return any(line.wait_share for line in lines)


def _wrong_tokens(line: VariantSummary) -> str:
    return NOTHING if line.mismatches is None else f"{line.mismatches}/{line.num_compared}"


_COLUMNS = (
    _Column("tokens per s", lambda line: number(line.tokens_per_s)),
    _Column("× plain", lambda line: number(line.tokens_per_s_vs_plain, 2), _with(PLAIN)),
    _Column("worst prompt", lambda line: number(line.worst_prompt_vs_plain, 2), _with(PLAIN)),
    _Column("× mlx-lm", lambda line: number(line.tokens_per_s_vs_mlx_lm, 2), _with(MLX_LM)),
    _Column("tokens per pass", lambda line: number(line.tokens_per_pass, 2)),
    _Column("break-even", lambda line: number(line.break_even, 2), _with(PLAIN)),
    _Column("accepted", lambda line: percent(line.acceptance_rate)),
    _Column("draft", lambda line: percent(line.draft_share)),
    _Column("verify", lambda line: percent(line.verify_share)),
    _Column("other", lambda line: percent(line.other_share)),
    _Column("waits", lambda line: percent(line.wait_share), _waiting),
    _Column("survived", lambda line: percent(line.survival_rate), _waiting),
    _Column(
        "of A·B/W", lambda line: percent(line.bound_share), lambda lines: any(line.bound_share for line in lines)
    ),
    _Column("prompt tokens per s", lambda line: number(line.prompt_tokens_per_s, 0)),
    _Column("prompt × mlx-lm", lambda line: number(line.prompt_vs_mlx_lm, 1), _with(MLX_LM)),
    _Column("wrong tokens", _wrong_tokens),
)


def summary_tables(lines: Sequence[VariantSummary]) -> list[Table]:
    """A table for all domains together and one for each, a row per variant."""
    columns = [column for column in _COLUMNS if column.shown(lines)]
    header = ("variant", *(column.header for column in columns))
    tables = []
    for domain in dict.fromkeys(line.domain for line in lines):
        rows = tuple(
            (line.variant, *(column.cell(line) for column in columns)) for line in lines if line.domain == domain
        )
        tables.append(Table("all prompts" if domain == ALL else domain, header, rows))
    return tables
