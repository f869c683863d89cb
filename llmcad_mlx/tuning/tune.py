"""From a target's name to the draft that serves it best, chosen and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import mlx.core as mx

from llmcad_mlx.bench.records import Run
from llmcad_mlx.errors import LlmcadError
from llmcad_mlx.loader import MemoryOptions, SharedTarget, device_name, is_planned, load_names
from llmcad_mlx.machine import Machine, this_machine
from llmcad_mlx.pair_names import NO_DRAFT, pair_profile_path
from llmcad_mlx.profile import PairProfile
from llmcad_mlx.sources.draft_choice import DraftChoice, find_choice, save_choice
from llmcad_mlx.sources.resolve import DEFAULT_PRESET, resolve_target
from llmcad_mlx.tuning.candidates import Candidates, Failure, find_candidates
from llmcad_mlx.tuning.decision import Decision, decide
from llmcad_mlx.tuning.figures import (
    CandidateFigures,
    DomainFigures,
    Prediction,
    among,
    compared,
    median_runs,
    rate,
    stats_of,
    tokens_per_pass,
)
from llmcad_mlx.tuning.measure import OnTurn, OpenPair, Outcome, Seat, measure
from llmcad_mlx.tuning.tune_plan import TunePlan


@dataclass(frozen=True, slots=True)
class Lineup:
    """A target and the candidates for it, found but not loaded."""

    target: str
    target_path: Path
    candidates: Candidates
    options: MemoryOptions
    incumbent: str | None = None


@dataclass(slots=True)
class TuneReport:
    """All that was measured, and what came of it. `saved`: the file that holds the choice; `problem`: why there is
    none, though there was something to save."""

    plan: TunePlan
    lineup: Lineup
    together: bool
    outcome: Outcome
    lines: list[CandidateFigures]
    failures: list[Failure]
    decision: Decision | None
    device: str = field(default_factory=device_name)
    machine: Machine = field(default_factory=this_machine)
    saved: Path | None = None
    problem: LlmcadError | None = None

    @property
    def emulated(self) -> bool:
        """Whether reads are slowed down."""
        return self.lineup.options.read_bandwidth is not None


def run_tune(
    plan: TunePlan,
    target: str | None,
    options: MemoryOptions,
    show_progress: bool,
    on_turn: OnTurn = lambda label, total: None,
) -> TuneReport:
    """Find the candidates, measure them, choose and save. `show_progress` is for downloads and copies.

    Raises the errors of `load_pair` for the target; those of a draft are in the report. An interrupted run chooses
    and saves nothing.
    """
    name = target or DEFAULT_PRESET
    target_path = resolve_target(name, show_progress)
    choice = find_choice(target_path, options.conditions)
    incumbent = None if choice is None else choice.draft
    candidates = find_candidates(name, target_path, plan.drafts, plan.bits, plan.tokens, incumbent, show_progress)
    report = tune(plan, Lineup(name, target_path, candidates, options, incumbent), on_turn=on_turn)
    save(report)
    return report


def tune(
    plan: TunePlan,
    lineup: Lineup,
    open_pair: OpenPair | None = None,
    on_turn: OnTurn = lambda label, total: None,
) -> TuneReport:
    """Measure the candidates and choose one. Where all fit into memory together they share one target; else each
    is loaded anew in every repetition, under a memory plan of its own.

    open_pair: loads a candidate with a target that is shared.
    """
    found = lineup.candidates.found
    together = open_pair is not None or not is_planned([candidate.names for candidate in found], lineup.options)
    if open_pair is None:
        open_pair = _opener(lineup, together)
    outcome = measure(plan.task, found, open_pair, together, on_turn)
    runs = {name: [run for run in outcome.runs if run.variant == name] for name in outcome.seats}
    lines = [
        _line(plan, lineup, seat, runs[name], runs.get(NO_DRAFT, []))
        for name, seat in outcome.seats.items()
        if runs[name] and name not in outcome.failures
    ]
    failures = [*lineup.candidates.failures, *(Failure(*item) for item in outcome.failures.items())]
    wrong = [line for line in lines if line.mismatches and _exact()]
    failures += [_different(line) for line in wrong]
    lines = [line for line in lines if line not in wrong]
    decision = None
    if not outcome.interrupted:
        decision = decide(lines, among(outcome.runs, plan.split.measured), lineup.incumbent)
    return TuneReport(plan, lineup, together, outcome, lines, failures, decision)


def save(report: TuneReport) -> None:
    """Save the choice, and what was learned about each pair that was measured. Nothing of an interrupted run."""
    decision = report.decision
    if decision is None:
        return
    options, speeds = report.lineup.options, {line.name: line.tokens_per_s for line in report.lines}
    for line in report.lines:
        seat = report.outcome.seats[line.name]
        streamed = None if seat.plan is None else seat.plan.streamed_bytes
        kept = PairProfile(pair_profile_path(seat.candidate.names, streamed, options.read_bandwidth))
        kept.costs, kept.calibration = seat.profile.costs, seat.profile.calibration
        kept.save()
    choice = DraftChoice(decision.winner, options.conditions, speeds[decision.winner] or 0.0)
    try:
        report.saved = save_choice(report.lineup.target_path, choice)
    except LlmcadError as error:
        report.problem = error


def _opener(lineup: Lineup, together: bool) -> OpenPair:
    if not together:
        return lambda candidate: load_names(candidate.names, lineup.options)
    shared = SharedTarget(lineup.target_path)
    return lambda candidate: shared.pair(candidate.names)


def _line(
    plan: TunePlan, lineup: Lineup, seat: Seat, runs: Sequence[Run], reference: Sequence[Run]
) -> CandidateFigures:
    """One candidate's figures from its own `runs`."""
    middle, costs, memory = median_runs(runs), seat.profile.costs, seat.plan
    streamed = 0 if memory is None else memory.streamed_bytes
    calibrating = among(middle, plan.split.calibration)
    wrong, total = compared(runs, reference)
    by_domain = {domain: [run for run in middle if run.place.domain == domain] for domain in plan.domains}
    return CandidateFigures(
        name=seat.candidate.name,
        draft_bytes=seat.draft_bytes,
        draft_step_s=costs.draft.predict(1) if costs.draft else None,
        streamed_bytes=streamed,
        pinned_bytes=None if memory is None else memory.pinned_bytes,
        tokens_per_pass=tokens_per_pass(middle),
        prediction=Prediction.of(calibrating, costs, streamed, lineup.options.read_bandwidth),
        tokens_per_s=rate(among(middle, plan.split.measured)),
        prompt_s=median([stats.prompt_s for stats in stats_of(runs)]),
        domains={domain: DomainFigures(tokens_per_pass(own), rate(own)) for domain, own in by_domain.items()},
        num_runs=len(runs),
        mismatches=wrong,
        num_compared=total,
    )


def _different(line: CandidateFigures) -> Failure:
    return Failure(
        line.name, f"{line.mismatches} of {line.num_compared} tokens are not the target's own; please report this"
    )


def _exact() -> bool:
    """Whether equal arithmetic gives equal text: elsewhere rounding may decide near-ties."""
    return bool(mx.default_device() == mx.cpu)
