"""From single runs to one line per variant: medians, ratios, shares, mismatches. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median

from llmcad_mlx.measure.records import Place, Run
from llmcad_mlx.measure.variants import MLX_LM, PLAIN

ALL = "all"

Speed = Callable[[Run], float | None]


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
    variants = list(dict.fromkeys(run.variant for run in runs))
    domains = list(dict.fromkeys(run.place.domain for run in runs))
    groups = {ALL: list(runs)}
    if len(domains) > 1:
        groups |= {domain: [run for run in runs if run.place.domain == domain] for domain in domains}
    return [
        _summary(variant, domain, members, comparable, read_bandwidth)
        for domain, members in groups.items()
        for variant in variants
        if any(run.variant == variant for run in members)
    ]


def count_mismatches(tokens: Iterable[int], reference: Iterable[int]) -> int:
    """Positions at which two token sequences differ; what only one of them has differs."""
    return sum(a != b for a, b in zip_longest(tokens, reference))


def ratios(runs: Sequence[Run], variant: str, reference: str, speed: Speed) -> list[float]:
    """`speed` of `variant` over that of `reference`, at each place where both have one."""
    ours, theirs = (_by_place(runs, name) for name in (variant, reference))
    found = []
    for place, run in ours.items():
        a, b = speed(run), speed(theirs[place]) if place in theirs else None
        if a is not None and b is not None and b > 0.0:
            found.append(a / b)
    return found


def run_mismatches(runs: Sequence[Run], comparable: bool = True) -> list[int | None]:
    """For each run, its tokens that differ from plain's at the same place; None where nothing tells."""
    plain = _by_place(runs, PLAIN)
    found: list[int | None] = []
    for run in runs:
        told = run.place in plain and (comparable or run.generation.stats is not None)
        reference = plain[run.place].generation.tokens if told else ()
        found.append(count_mismatches(run.generation.tokens, reference) if told else None)
    return found


def decode_rate(run: Run) -> float | None:
    """Tokens per second of decoding."""
    return run.tokens_per_s


def prompt_rate(run: Run) -> float | None:
    """Tokens per second of prompt processing."""
    return run.prompt_tokens_per_s


def _by_place(runs: Sequence[Run], variant: str) -> Mapping[Place, Run]:
    return {run.place: run for run in runs if run.variant == variant}


def _summary(
    variant: str, domain: str, runs: Sequence[Run], comparable: bool, read_bandwidth: float | None
) -> VariantSummary:
    own = [run for run in runs if run.variant == variant]
    told = [
        (run, wrong)
        for run, wrong in zip(runs, run_mismatches(runs, comparable), strict=True)
        if run.variant == variant and wrong is not None
    ]
    stats = [run.generation.stats for run in own if run.generation.stats is not None]
    decode_s = sum(run.generation.decode_s for run in own)
    draft_s, verify_s = sum(s.draft_s for s in stats), sum(s.verify_s for s in stats)
    draft_share = _share(draft_s, decode_s) if stats else None
    verify_share = _share(verify_s, decode_s) if stats else None
    wait_share = _share(sum(s.io_wait_s for s in stats), decode_s) if stats else None
    known = (draft_share or 0.0) + (verify_share or 0.0) + (wait_share or 0.0)
    return VariantSummary(
        variant=variant,
        domain=domain,
        num_runs=len(own),
        num_tokens=sum(len(run.generation.tokens) for run in own),
        tokens_per_s=_median(map(decode_rate, own)),
        tokens_per_s_vs_plain=_median(ratios(runs, variant, PLAIN, decode_rate)),
        worst_prompt_vs_plain=_worst_prompt(runs, variant),
        tokens_per_s_vs_mlx_lm=_median(ratios(runs, variant, MLX_LM, decode_rate)),
        prompt_tokens_per_s=_median(map(prompt_rate, own)),
        prompt_vs_mlx_lm=_median(ratios(runs, variant, MLX_LM, prompt_rate)),
        tokens_per_pass=_share(sum(s.generated_tokens for s in stats), sum(s.target_passes for s in stats)),
        break_even=_break_even(runs, own),
        acceptance_rate=_share(sum(s.accepted for s in stats), sum(s.path_tested for s in stats)),
        draft_share=draft_share,
        verify_share=verify_share,
        wait_share=wait_share,
        survival_rate=_share(sum(s.survived for s in stats), sum(s.provisional_passes for s in stats)),
        bound_share=None if read_bandwidth is None else _bound_share(own, read_bandwidth),
        other_share=max(1.0 - known, 0.0) if stats and decode_s > 0.0 else None,
        mismatches=sum(wrong for _, wrong in told) if told else None,
        num_compared=sum(len(run.generation.tokens) for run, _ in told),
    )


def _worst_prompt(runs: Sequence[Run], variant: str) -> float | None:
    prompts = dict.fromkeys((run.place.domain, run.place.prompt) for run in runs)
    found = [
        _median(
            ratios([run for run in runs if (run.place.domain, run.place.prompt) == p], variant, PLAIN, decode_rate)
        )
        for p in prompts
    ]
    return min((ratio for ratio in found if ratio is not None), default=None)


def _break_even(runs: Sequence[Run], own: Sequence[Run]) -> float | None:
    """Seconds a pass over plain's seconds a token, at the places where both ran."""
    plain = _by_place(runs, PLAIN)
    both = [(run.generation, plain[run.place].generation) for run in own if run.place in plain]
    stats = [(ours, theirs, ours.stats) for ours, theirs in both if ours.stats is not None]
    pass_s = _share(sum(ours.decode_s for ours, _, _ in stats), sum(s.target_passes for _, _, s in stats))
    plain_s = _share(sum(t.decode_s for _, t, _ in stats), sum(t.num_timed for _, t, _ in stats))
    return None if pass_s is None or plain_s is None else _share(pass_s, plain_s)


def _bound_share(runs: Sequence[Run], read_bandwidth: float) -> float | None:
    """Speed over A·B/W is the time that reading takes over the time that decoding took."""
    done = [run.generation for run in runs]
    num_bytes = sum(g.stats.target_passes * g.pass_bytes for g in done if g.stats is not None)
    return _share(num_bytes / read_bandwidth, sum(g.decode_s for g in done)) or None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
