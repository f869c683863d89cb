"""`llmcad-mlx tune`: from a target to the draft that serves it best: candidates found, measured, one decided
for, the choice saved.

Half of each domain's prompts calibrate, the other half are measured. From the first half come tokens per pass A,
computing C, what a round takes beside its pass D and, where nobody gave it, the read rate B; with W bytes read on
each pass they predict tokens/s = A / (max(W/B, C) + D) (DESIGN 3.7) for the second half, whose runs tell. A prompt
counts with its median repetition, and speeds are all tokens over all seconds.

The decision is made so that two runs on the same machine agree: see `decide`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from llmcad_mlx.errors import LlmcadError, UsageError
from llmcad_mlx.loader import LoadedPair, PreparedTarget, conditions, is_planned, load_names, release_free_memory
from llmcad_mlx.measure import output
from llmcad_mlx.measure.candidates import Candidate, DraftOptions, Lineup, find_candidates, short_name
from llmcad_mlx.measure.output import NOTHING, Origin, Report, Table, milliseconds, number
from llmcad_mlx.measure.prompts import ALL_DOMAINS, BenchPrompt
from llmcad_mlx.measure.runner import (
    EncodedPrompt,
    EngineContender,
    OnTurn,
    Run,
    Workload,
    encode_prompts,
    run_mismatches,
    schedule,
    total_stats,
)
from llmcad_mlx.memory import Measured, MemoryPlan, ReadRate, Speeds
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.settings import MemoryOptions, SpeculationSettings
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import NO_DRAFT, pair_profile_path
from llmcad_mlx.store.profile import DraftChoice, PairProfile, find_choice, save_choice
from llmcad_mlx.store.pull import DEFAULT_PRESET, resolve_target

LEAST_NOISE = 0.03
_HOPELESS = 5  # times as long as without a draft: like weights in bits that the processor has no kernels for

OpenPair = Callable[[Candidate], LoadedPair]
PromptName = tuple[str, str]
"""Domain and name."""


@dataclass(frozen=True, slots=True)
class TunePlan:
    """What to measure. `calibrating`, `measured`: the prompts a prediction is made from, and those it is made
    for."""

    drafts: DraftOptions
    memory: MemoryOptions
    workload: Workload
    calibrating: frozenset[PromptName]
    measured: frozenset[PromptName]

    @classmethod
    def of(
        cls,
        drafts: DraftOptions,
        memory: MemoryOptions,
        prompts: Path | None,
        per_domain: int | None,
        max_tokens: int,
        **work: Any,
    ) -> TunePlan:
        """Check what the command line was given; `work` as `Workload.of` takes it. Raises UsageError naming the
        option."""
        if max_tokens < 2:
            raise UsageError("max_tokens: to be measured a draft needs a limit of 2 or more")
        with as_file(files("llmcad_mlx.measure").joinpath("tune_prompts.toml")) as packaged:
            workload = Workload.of(prompts or packaged, ALL_DOMAINS, per_domain, 2, max_tokens=max_tokens, **work)
        return cls(drafts, memory, workload, *split(workload.prompts))

    @property
    def domains(self) -> list[str]:
        """Of the prompts, in their order."""
        return list(dict.fromkeys(prompt.domain for prompt in self.workload.prompts))


def split(prompts: Sequence[BenchPrompt]) -> tuple[frozenset[PromptName], frozenset[PromptName]]:
    """The first, third, … prompt of each domain, which calibrate, and the others, which are measured. Raises
    UsageError for a domain of one prompt."""
    by_domain: dict[str, list[PromptName]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append((prompt.domain, prompt.name))
    for domain, names in by_domain.items():
        if len(names) < 2:
            raise UsageError(
                f"prompts: {domain} has one prompt; tune needs two of each domain or more: one half predicts, "
                "the other is measured"
            )
    calibrating, measured = (
        frozenset(name for names in by_domain.values() for name in names[half::2]) for half in (0, 1)
    )
    return calibrating, measured


# -- candidates → measured → decided → saved ------------------------------------------------------------


def run_tune(
    plan: TunePlan, target: str | None, show_progress: bool, on_turn: OnTurn = lambda label, total: None
) -> Tuning:
    """Find the candidates, measure them, choose and save. `show_progress` is for downloads and copies.

    Raises the errors of `load_pair` for the target; those of a draft are in the result.
    """
    name = target or DEFAULT_PRESET
    target_path = resolve_target(name, show_progress)
    choice = find_choice(target_path, conditions(plan.memory))
    incumbent = None if choice is None else choice.draft
    tuning = Tuning.of(plan, find_candidates(name, target_path, plan.drafts, incumbent, show_progress))
    tuning.measure(on_turn)
    tuning.decide()
    tuning.save()
    return tuning


@dataclass(slots=True)
class Seat:
    """What belongs to one candidate as long as it is measured, whether it stays loaded or not.

    `draft_bytes`: weights or table. `plan`: None where all is in memory and there is no budget. `warm_ups`:
    seconds of its answers before measuring, prompt included.
    """

    candidate: Candidate
    draft_bytes: int
    plan: MemoryPlan | None
    profile: PairProfile = field(default_factory=lambda: PairProfile(None))
    warm_ups: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Tuning:
    """One target's way from its candidates to the draft that is saved, and all that was found on it.

    `together`: whether all candidates are in memory at the same time, with one target in common; else each is
    loaded anew in every repetition, under a memory plan of its own. `open_pair`: loads a candidate.

    `runs` in the order they were done; `seats` by candidate; `failures`: of candidates that cannot be had, cannot
    run, or have another text; `interrupted`: Ctrl-C came before the last run. `lines`: the others' figures.
    `saved`: the file that holds the choice; `problem`: why there is none, though there was something to save.
    """

    plan: TunePlan
    lineup: Lineup
    together: bool
    open_pair: OpenPair
    runs: list[Run] = field(default_factory=list)
    seats: dict[str, Seat] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    lines: list[CandidateFigures] = field(default_factory=list)
    decision: Decision | None = None
    saved: Path | None = None
    problem: LlmcadError | None = None

    @classmethod
    def of(cls, plan: TunePlan, lineup: Lineup) -> Tuning:
        """All candidates share one target where they fit into memory together."""
        together = not is_planned([candidate.names for candidate in lineup.candidates], plan.memory)
        if not together:
            return cls(plan, lineup, together, lambda candidate: load_names(candidate.names, plan.memory))
        shared = PreparedTarget.in_memory(lineup.target_path)
        return cls(plan, lineup, together, lambda candidate: shared.build(candidate.names))

    def measure(self, on_turn: OnTurn = lambda label, total: None) -> None:
        """Let the candidates answer the same prompts, interleaved.

        A candidate that raises an error of this package, runs out of memory, or is hopeless gets no more turns.
        Raises what "none" raises: then it is the target's fault. Ctrl-C ends it early with what was done, if
        anything was.
        """
        work, candidates = self.plan.workload, self.lineup.candidates
        self.failures |= {failure.name: failure.reason for failure in self.lineup.failures}
        planned = list(sittings(candidates, work.repeat, self.together))
        num_turns = sum(len(who) * (work.warmup + len(when) * len(work.prompts)) for who, when in planned)
        try:
            for who, repetitions in planned:
                self._sit(who, repetitions, lambda label: on_turn(label, num_turns))
        except KeyboardInterrupt:
            if not self.runs:
                raise
            self.interrupted = True

    def _sit(self, who: Sequence[Candidate], repetitions: range, on_turn: Callable[[str], None]) -> None:
        """Load candidates, let them do their turns, and free them."""
        pairs: list[LoadedPair] = []
        contenders: list[EngineContender] = []
        try:
            for candidate in who:
                if candidate.name in self.failures:
                    continue
                try:
                    pairs.append(self.open_pair(candidate))
                    contenders.append(self._seated(candidate, pairs[-1]))
                except (LlmcadError, MemoryError) as error:
                    self._fail(candidate.name, error)
            if contenders:
                prompts = encode_prompts(self.plan.workload.prompts, pairs[0])
                self._take_turns(contenders, prompts, repetitions, on_turn)
        finally:
            contenders.clear()
            for pair in pairs:
                pair.release()
            pairs.clear()
            release_free_memory()

    def _seated(self, candidate: Candidate, pair: LoadedPair) -> EngineContender:
        """Ready to generate. What was learned in an earlier sitting goes on; nothing is saved meanwhile."""
        if candidate.name not in self.seats:
            draft_bytes = sum(drafter.num_bytes for drafter in pair.drafters)
            self.seats[candidate.name] = Seat(candidate, draft_bytes, pair.plan)
        own = replace(pair, profile=self.seats[candidate.name].profile)
        return EngineContender(candidate.name, own, SpeculationSettings())

    def _take_turns(
        self,
        contenders: Sequence[EngineContender],
        prompts: Sequence[EncodedPrompt],
        repetitions: range,
        on_turn: Callable[[str], None],
    ) -> None:
        for turn in schedule(contenders, prompts, repetitions, self.plan.workload.warmup):
            name = turn.contender.name
            on_turn(short_name(name))
            if not turn.warms_up and (reason := self._hopeless(name)) is not None:
                self.failures.setdefault(name, reason)
            if name in self.failures:
                continue
            try:
                run = turn.run(self.plan.workload.options)
            except (LlmcadError, MemoryError) as error:
                self._fail(name, error)
                continue
            if turn.warms_up:
                stats = run.generation.stats or run.generation
                self.seats[name].warm_ups.append(stats.prompt_s + stats.decode_s)
            else:
                self.runs.append(run)

    def _hopeless(self, name: str) -> str | None:
        """Why a candidate is not worth measuring: it took many times as long as no draft for every answer of the
        warm-up; None for one that is."""
        plain = self.seats[NO_DRAFT].warm_ups if NO_DRAFT in self.seats else ()
        times = list(zip(self.seats[name].warm_ups, plain, strict=False))
        if not times or any(own <= _HOPELESS * without for own, without in times):
            return None
        return (
            f"its warm-up took {times[-1][0]:.1f} s for an answer that takes {times[-1][1]:.1f} s without a draft"
        )

    def _fail(self, name: str, error: LlmcadError | MemoryError) -> None:
        if name == NO_DRAFT:
            raise error
        self.failures[name] = str(error) or "there is not enough memory"

    def decide(self) -> None:
        """Find each candidate's figures and, if all was measured, the best.

        On a CPU equal arithmetic gives equal text, and a candidate with another text fails; elsewhere rounding may
        decide near-ties.
        """
        for name, seat in self.seats.items():
            if name in self.failures or not any(run.variant == name for run in self.runs):
                continue
            line = candidate_figures(self.plan, seat, self.runs)
            if line.mismatches and mx.default_device() == mx.cpu:
                wrong = f"{line.mismatches} of {line.num_compared} tokens are not the target's own"
                self.failures[name] = f"{wrong}; please report this"
            else:
                self.lines.append(line)
        self.lines.sort(key=lambda line: -(line.tokens_per_s or 0.0))
        if not self.interrupted:
            self.decision = decide(self.lines, among(self.runs, self.plan.measured), self.lineup.incumbent)

    def save(self) -> None:
        """Save the choice, and what was learned about each pair that was measured; nothing of an interrupted
        run."""
        if self.decision is None:
            return
        winner, options = self.decision.winner, self.plan.memory
        for line in self.lines:
            seat = self.seats[line.draft]
            streamed = None if seat.plan is None else seat.plan.streamed_bytes
            kept = PairProfile(pair_profile_path(seat.candidate.names, streamed, options.read_bandwidth))
            kept.costs, kept.calibration = seat.profile.costs, seat.profile.calibration
            kept.save()
        speed = next(line.tokens_per_s for line in self.lines if line.draft == winner)
        try:
            choice = DraftChoice(winner, conditions(options), speed or 0.0)
            self.saved = save_choice(self.lineup.target_path, choice)
        except LlmcadError as error:
            self.problem = error


def sittings(
    candidates: Sequence[Candidate], repeat: int, together: bool
) -> Iterator[tuple[Sequence[Candidate], range]]:
    """Who is in memory together, and for which repetitions: all candidates for all of them, or one after the other
    in each, each time another first."""
    if together:
        yield candidates, range(repeat)
        return
    for repetition in range(repeat):
        first = repetition % len(candidates)
        for candidate in (*candidates[first:], *candidates[:first]):
            yield [candidate], range(repetition, repetition + 1)


# -- measured: figures of a candidate, pure arithmetic --------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prediction:
    """`measured` in the calibrating half; `read_rate`: None where nothing is read."""

    measured: Measured
    read_rate: ReadRate | None
    tokens_per_s: float | None

    @classmethod
    def of(
        cls, runs: Sequence[Run], costs: CostModel, streamed_bytes: int, read_bandwidth: float | None
    ) -> Prediction | None:
        """From calibrating runs, one for each prompt; None without any.

        costs: learned meanwhile, for single steps. streamed_bytes: read on each pass. read_bandwidth: emulated, in
        bytes per second; None: what the passes got.
        """
        total = total_stats(runs)
        if not total.target_passes:
            return None
        passes = total.target_passes
        computing = total.verify_s / passes
        pass_s = computing + (total.io_wait_s + total.hidden_draft_s) / passes
        measured = Measured(
            tokens_per_pass=total.tokens_per_pass,
            nodes=1 + total.tested / passes,
            pass_s=computing,
            plain_pass_s=costs.computing.predict(1),
            rest_s=max(total.decode_s / passes - pass_s, 0.0),
            draft_step_s=costs.draft.predict(1) if costs.draft else None,
            streamed_bytes=streamed_bytes,
        )
        rate = None
        if streamed_bytes and read_bandwidth is not None:
            rate = ReadRate(read_bandwidth, emulated=True)
        elif streamed_bytes and pass_s > 0.0:
            rate = ReadRate(streamed_bytes / pass_s, sampled_bytes=streamed_bytes * passes, from_disk=False)
        return cls(measured, rate, Speeds.of(streamed_bytes, rate, measured).speculative)


@dataclass(frozen=True, slots=True)
class DomainFigures:
    """One candidate on the prompts of a domain, both halves."""

    tokens_per_pass: float | None
    tokens_per_s: float | None

    @classmethod
    def of(cls, total: GenerationStats) -> DomainFigures:
        return cls(total.tokens_per_pass or None, total.tokens_per_s or None)


@dataclass(frozen=True, slots=True)
class CandidateFigures:
    """One candidate. None: not known (yet).

    `tokens_per_pass` is of all prompts, `tokens_per_s` of the measured half. Speeds leave out reading the prompt,
    of which `prompt_s` is the median. `mismatches` counts the tokens of all runs that are not the target's own, of
    `num_compared`.
    """

    draft: str
    draft_bytes: int
    draft_step_s: float | None
    streamed_bytes: int
    pinned_bytes: int | None
    tokens_per_pass: float | None
    prediction: Prediction | None
    tokens_per_s: float | None
    prompt_s: float | None
    domains: dict[str, DomainFigures]
    num_runs: int
    mismatches: int
    num_compared: int

    @property
    def predicted_tokens_per_s(self) -> float | None:
        return None if self.prediction is None else self.prediction.tokens_per_s

    @property
    def difference(self) -> float | None:
        """Predicted over measured, less one; None without either."""
        if self.predicted_tokens_per_s is None or not self.tokens_per_s:
            return None
        return self.predicted_tokens_per_s / self.tokens_per_s - 1.0


def candidate_figures(plan: TunePlan, seat: Seat, runs: Sequence[Run]) -> CandidateFigures:
    """One candidate's figures; `runs` are those of all candidates."""
    told = [
        (run, wrong)
        for run, wrong in zip(runs, run_mismatches(runs, reference=NO_DRAFT), strict=True)
        if run.variant == seat.candidate.name
    ]
    own = [run for run, _ in told]
    middle, costs, memory = median_runs(own), seat.profile.costs, seat.plan
    streamed = 0 if memory is None else memory.streamed_bytes
    calibrating = among(middle, plan.calibrating)
    by_domain = {domain: [run for run in middle if run.place.domain == domain] for domain in plan.domains}
    return CandidateFigures(
        draft=seat.candidate.name,
        draft_bytes=seat.draft_bytes,
        draft_step_s=costs.draft.predict(1) if costs.draft else None,
        streamed_bytes=streamed,
        pinned_bytes=None if memory is None else memory.pinned_bytes,
        tokens_per_pass=total_stats(middle).tokens_per_pass or None,
        prediction=Prediction.of(calibrating, costs, streamed, plan.memory.read_bandwidth),
        tokens_per_s=total_stats(among(middle, plan.measured)).tokens_per_s or None,
        prompt_s=median([run.generation.prompt_s for run in own]),
        domains={domain: DomainFigures.of(total_stats(group)) for domain, group in by_domain.items()},
        num_runs=len(own),
        mismatches=sum(wrong or 0 for _, wrong in told),
        num_compared=sum(len(run.generation.tokens) for run, wrong in told if wrong is not None),
    )


def median_runs(runs: Iterable[Run]) -> list[Run]:
    """For each prompt the run of median speed, the faster of two."""
    by_prompt: dict[PromptName, list[Run]] = {}
    for run in runs:
        by_prompt.setdefault((run.place.domain, run.place.prompt), []).append(run)
    groups = [sorted(group, key=lambda run: -total_stats([run]).tokens_per_s) for group in by_prompt.values()]
    return [group[(len(group) - 1) // 2] for group in groups]


def among(runs: Iterable[Run], prompts: frozenset[PromptName]) -> list[Run]:
    """The runs of `prompts`."""
    return [run for run in runs if (run.place.domain, run.place.prompt) in prompts]


# -- decided ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """A candidate beside the fastest. `ratio`: median over repetitions of its speed over the fastest's."""

    name: str
    ratio: float
    noise: float

    def within(self, times: float) -> bool:
        """Whether it comes within so many times its noise."""
        return self.ratio >= 1.0 - times * self.noise


@dataclass(frozen=True, slots=True)
class Decision:
    """`standings` of all candidates, the best first; `tied`: those as good as the `fastest`, it among them."""

    winner: str
    fastest: str
    tied: tuple[str, ...]
    standings: tuple[Standing, ...]
    stays: bool
    """Whether an earlier choice was confirmed."""


def decide(lines: Sequence[CandidateFigures], runs: Sequence[Run], incumbent: str | None) -> Decision | None:
    """lines: of the candidates that may win. runs: of the measured prompts. incumbent: chosen before, if anything
    was. None where nothing was measured.

    Speeds are compared repetition by repetition with the fastest's, because a busy machine slows all of a
    repetition. A candidate's noise is half the spread of these ratios, at least 3 %. Those that come within their
    noise of the fastest tie with it; of them the one with the smallest draft wins, then the faster one. The draft
    chosen before stays unless it falls short by more than twice its noise: what wins narrowly once keeps winning.
    """
    speeds = {line.draft: line.tokens_per_s for line in lines if line.tokens_per_s is not None}
    if not speeds:
        return None
    fastest = max(speeds, key=lambda name: speeds[name])
    sizes = {line.draft: line.draft_bytes for line in lines}
    standings = sorted((standing(name, fastest, runs) for name in speeds), key=lambda entry: -entry.ratio)
    tied = [entry.name for entry in standings if entry.name == fastest or entry.within(1.0)]
    stays = any(entry.name == incumbent and entry.within(2.0) for entry in standings)
    winner = incumbent if stays and incumbent is not None else min(tied, key=lambda name: sizes[name])
    return Decision(winner, fastest, tuple(tied), tuple(standings), winner == incumbent)


def standing(name: str, fastest: str, runs: Sequence[Run]) -> Standing:
    """The candidate `name` beside `fastest`, at the prompts and repetitions where both ran."""
    ours, theirs = ({run.place: run for run in runs if run.variant == who} for who in (name, fastest))
    ratios = []
    for repetition in dict.fromkeys(place.repetition for place in ours):
        places = [place for place in ours if place in theirs and place.repetition == repetition]
        speed, best = (total_stats(done[place] for place in places).tokens_per_s for done in (ours, theirs))
        if best:
            ratios.append(speed / best)
    if not ratios:
        return Standing(name, 0.0, LEAST_NOISE)
    return Standing(name, median(ratios), max((max(ratios) - min(ratios)) / 2, LEAST_NOISE))


# -- report ----------------------------------------------------------------------------------------------


def tune_report(done: Tuning, argv: Sequence[str]) -> Report:
    """All candidates, the best first; then tokens per pass and speed by domain; and in the document everything:
    bytes in bytes, times in seconds, speeds in tokens per second."""
    origin, notes, lineup, plan, work = Origin(argv), _notes(done), done.lineup, done.plan, done.plan.workload
    emulated = output.emulated_rate(plan.memory.read_bandwidth, "; reads ")
    document = {
        **origin.to_json(),
        "target": lineup.target,
        "target_path": str(lineup.target_path),
        "emulated": bool(emulated),
        "options": {
            "drafts": None if plan.drafts.names is None else list(plan.drafts.names),
            "bits": list(plan.drafts.bits),
            "trim": list(plan.drafts.tokens),
            "calibrated_on": [f"{domain}/{name}" for domain, name in sorted(plan.calibrating)],
            "measured_on": [f"{domain}/{name}" for domain, name in sorted(plan.measured)],
            **work.to_json(),
            **asdict(plan.memory),
        },
        "together": done.together,
        "interrupted": done.interrupted,
        "winner": _winner(done),
        "incumbent": lineup.incumbent,
        "tied": [] if done.decision is None else list(done.decision.tied),
        "saved": None if done.saved is None else str(done.saved),
        "candidates": [_candidate_json(done, line) for line in done.lines],
        "failed": [{"draft": name, "reason": reason} for name, reason in done.failures.items()],
        "notes": notes,
        "runs": [_run_json(run) for run in done.runs],
    }
    return Report(
        "tune",
        _tables(done),
        notes,
        document,
        heading=f"# {lineup.target}: drafts\n\n{origin.to_markdown()}",
        draw=partial(_draw, done, f"{short_name(lineup.target)}{emulated}"),
        interrupted=done.interrupted,
        problem=done.problem,
    )


def _candidate_json(done: Tuning, line: CandidateFigures) -> dict[str, Any]:
    standings = () if done.decision is None else done.decision.standings
    return {
        **asdict(line),
        "predicted_tokens_per_s": line.predicted_tokens_per_s,
        "difference": line.difference,
        "standing": next((asdict(entry) for entry in standings if entry.name == line.draft), None),
    }


def _run_json(run: Run) -> dict[str, Any]:
    stats = run.generation.stats
    row: dict[str, Any] = {"draft": run.variant, **asdict(run.place), "order": run.order}
    return row | ({} if stats is None else asdict(stats))


def _tables(done: Tuning) -> list[Table]:
    per_pass, speed = [], []
    for line in done.lines:
        named, domains = {"draft": short_name(line.draft)}, line.domains.items()
        per_pass.append(named | {name: number(figures.tokens_per_pass, 2) for name, figures in domains})
        speed.append(named | {name: number(figures.tokens_per_s) for name, figures in domains})
    if not done.lines:
        return []
    title = f"drafts for {short_name(done.lineup.target)}"
    emulated = "" if done.plan.memory.read_bandwidth is None else " (emulated)"
    return [
        Table.of(f"{title}{emulated}", [_cells(done, line) for line in done.lines]),
        Table.of("tokens per pass", per_pass),
        Table.of("tokens per s, both halves", speed),
    ]


def _cells(done: Tuning, line: CandidateFigures) -> dict[str, str]:
    """A row of the table of all candidates, by header."""
    plain = next((other.tokens_per_s for other in done.lines if other.draft == NO_DRAFT), None)
    ratio = line.tokens_per_s / plain if plain and line.tokens_per_s is not None else None
    label = short_name(line.draft) + (" (chosen)" if line.draft == _winner(done) else "")
    cells = {"draft": label, "memory": format_size(line.draft_bytes)}
    if line.pinned_bytes is not None:
        cells |= {"pinned": format_size(line.pinned_bytes), "read per pass": format_size(line.streamed_bytes)}
    cells |= {
        "prompt": milliseconds(line.prompt_s, 0),
        "tokens per pass": number(line.tokens_per_pass, 2),
        "draft step": milliseconds(line.draft_step_s),
        "predicted tokens per s": number(line.predicted_tokens_per_s),
        "measured": number(line.tokens_per_s),
        "difference": NOTHING if line.difference is None else f"{line.difference:+.0%}",
        "× none": number(ratio, 2),
    }
    if any(other.mismatches for other in done.lines):
        cells["wrong tokens"] = f"{line.mismatches}/{line.num_compared}"
    return cells


def _winner(done: Tuning) -> str | None:
    return None if done.decision is None else done.decision.winner


def _notes(done: Tuning) -> list[str]:
    """What a reader of the figures must know."""
    plan, work = done.plan, done.plan.workload
    where = (
        "all in memory together, interleaved by prompt"
        if done.together
        else "loaded one after the other, in every repetition anew"
    )
    notes = [
        f"Prompts: {len(plan.calibrating)} predict, {len(plan.measured)} are measured; "
        f"repetitions: {work.repeat}; at most {work.max_tokens} tokens; temperature {work.temperature:g}. "
        f"Candidates {where}. A prompt counts with its median repetition; speeds are all tokens over all seconds.",
        "Predicted: A / (max(W/B, C) + D) with tokens per pass A, computing C and the rest of a round D from the "
        "prompts that predict; measured: the speed on the others. Reading the prompt comes on top.",
    ]
    if plan.memory.read_bandwidth is not None:
        notes.append(f"Reads are {output.emulated_rate(plan.memory.read_bandwidth)}.")
    notes += [f"Left out: {name}: {reason}." for name, reason in done.failures.items()]
    if done.interrupted:
        notes.append(f"Interrupted after {len(done.runs)} generations: nothing is chosen, nothing saved.")
    elif done.decision is None:
        notes.append("Nothing was measured: nothing is chosen.")
    else:
        notes += _decision_notes(done.decision, done.saved)
    return notes


def _decision_notes(decision: Decision, saved: Path | None) -> list[str]:
    notes, winner = [], short_name(decision.winner)
    others = [short_name(name) for name in decision.tied if name != decision.winner]
    if decision.stays and decision.winner != decision.fastest:
        notes.append(
            f"{winner} was chosen before and stays: it falls short of {short_name(decision.fastest)} by less than "
            "twice the noise."
        )
    elif others:
        notes.append(
            f"Within the noise (at least {LEAST_NOISE:.0%}) as fast: {', '.join(others)}; the smallest draft wins."
        )
    if saved is not None:
        notes.append(f"Saved in {saved}: --draft auto means {winner} from now on.")
    return notes


_COLOURS = (
    output.BLUE, output.ORANGE, output.GREEN, output.PINK, output.SKY, output.RED, output.YELLOW, output.GREY,
)  # fmt: skip


def _draw(done: Tuning, subtitle: str, folder: Path) -> None:
    """Speed, predicted and measured, and tokens per pass by domain; without lines an earlier plot is removed."""
    lines, domains, figure = (
        done.lines,
        done.plan.domains,
        output.new_figure("Drafts measured by tune", subtitle),
    )
    if not lines:
        (folder / "tune.png").unlink(missing_ok=True)
        return
    speed, per_pass = output.bar_panels(figure, 2.0 + 0.75 * len(lines), 2, width=10.0)
    rows = range(len(lines))
    colours = [output.ORANGE if line.draft == _winner(done) else output.BLUE for line in lines]
    bars = speed.barh(rows, [line.tokens_per_s or 0.0 for line in lines], 0.6, color=colours)
    speed.bar_label(bars, fmt="%.1f", padding=6)
    known = [(line.predicted_tokens_per_s, row) for row, line in enumerate(lines) if line.predicted_tokens_per_s]
    if known:
        speed.plot(*zip(*known, strict=True), "k|", markersize=22, markeredgewidth=2)
    speed.set_xlabel("tokens/s; black line: predicted" + ("" if _winner(done) is None else "; orange: chosen"))
    speed.set_yticks(rows, [short_name(line.draft) for line in lines])
    height = 0.8 / len(domains)
    for index, domain in enumerate(domains):
        at = [row + (index - (len(domains) - 1) / 2) * height for row in rows]
        values = [line.domains[domain].tokens_per_pass or 0.0 for line in lines]
        per_pass.barh(at, values, height, color=_COLOURS[index % len(_COLOURS)], label=domain)
    per_pass.set_xlabel("tokens per pass of the target")
    output.legend_below(figure)
    figure.savefig(folder / "tune.png", dpi=150)
