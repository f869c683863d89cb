"""`llmcad-mlx tune`: finds and measures drafts for a target, decides for one and saves the choice.

Half of each domain's prompts calibrate, the other half are measured. From the first half come tokens per pass A,
computing C, what a round takes beside its pass D and, where nobody gave it, the read rate B; with W bytes read on
each pass they predict tokens/s = A / (max(W/B, C) + D) (DESIGN 3.7) for the second half, whose runs tell. A prompt
counts with its median repetition, and speeds are all tokens over all seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.errors import LlmcadError, UsageError, is_out_of_memory
from llmcad_mlx.loader import LoadedPair, PreparedTarget, conditions, is_planned, load_names, release_free_memory
from llmcad_mlx.measure import output, runner
from llmcad_mlx.measure.candidates import DraftOptions, Lineup, find_candidates, short_name
from llmcad_mlx.measure.growth import random_tree
from llmcad_mlx.measure.output import NOTHING, Plot, Report, Table, milliseconds, number
from llmcad_mlx.measure.runner import EngineContender, OnTurn, PromptName, Run, Turn, total_stats
from llmcad_mlx.measure.workload import ALL_DOMAINS, BenchPrompt, Workload, grouped
from llmcad_mlx.memory import Measured, MemoryPlan, ReadRate, Speeds
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.settings import MemoryOptions, SpeculationSettings
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import DEFAULT_PRESET, NO_DRAFT, PairPaths, pair_profile_path, resolve_target
from llmcad_mlx.store.profile import DraftChoice, PairProfile, find_choice, save_choice

LEAST_NOISE = 0.03
_HOPELESS = 5  # times as long as without a draft: like weights in bits that the processor has no kernels for
# Around these row counts Metal takes another kernel or one more tile, and a pass another time.
_PASS_ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 24, 32, 33, 48, 64)
_STREAMED_PASS_ROWS = (1, 8, 32, 64)  # reading takes as long for all of them, and long
_PACKAGED = Path(__file__).with_name("tune_prompts.toml")


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
    def of(cls, drafts: DraftOptions, memory: MemoryOptions, prompts: Path | None, **work: Any) -> TunePlan:
        """Check what the command line was given; `work` as `Workload.of` takes it. Raises UsageError naming the
        option."""
        workload = Workload.of(prompts or _PACKAGED, ALL_DOMAINS, 2, **work)
        if workload.options.stopping.max_tokens < 2:
            raise UsageError("max_tokens: to be measured a draft needs a limit of 2 or more")
        return cls(drafts, memory, workload, *split(workload.prompts))


def split(prompts: Sequence[BenchPrompt]) -> list[frozenset[PromptName]]:
    """The first, third, … prompt of each domain, which calibrate, and the others, which are measured. Raises
    UsageError for a domain of one prompt."""
    halves: tuple[set[PromptName], set[PromptName]] = set(), set()
    for domain, members in grouped(prompts, lambda prompt: prompt.domain).items():
        if len(members) < 2:
            raise UsageError(
                f"prompts: {domain} has one prompt; tune needs two of each domain or more: one half predicts, "
                "the other is measured"
            )
        for rank, prompt in enumerate(members):
            halves[rank % 2].add((domain, prompt.name))
    return [frozenset(half) for half in halves]


def run_tune(plan: TunePlan, target: str | None, show_progress: bool, on_turn: OnTurn) -> Tuning:
    """Find the candidates, measure them, choose and save. `show_progress` is for downloads and copies. Raises the
    errors of `load_pair` for the target; those of a draft are in the result."""
    name = target or DEFAULT_PRESET
    target_path = resolve_target(name, show_progress)
    choice = find_choice(target_path, conditions(plan.memory))
    incumbent = None if choice is None else choice.draft
    lineup = find_candidates(name, target_path, plan.drafts, incumbent, show_progress)
    if is_planned(lineup.candidates, plan.memory):
        tuning = Tuning(plan, lineup, False, lambda candidate: load_names(candidate, plan.memory))
    else:
        shared = PreparedTarget.in_memory(target_path)
        tuning = Tuning(plan, lineup, True, shared.build)
    tuning.measure(on_turn)
    tuning.decide()
    tuning.save()
    return tuning


Pass = tuple[int, float, float]
"""Rows, seconds, and seconds of computing: what `CostModel.observe_pass` takes."""


def time_passes(pair: LoadedPair, most_s: float = float("inf")) -> list[Pass]:
    """Passes of the target, each after one like it, in which kernels are made ready. What a pass takes grows in
    steps, which decoding alone would find out one by one. After `most_s` seconds no more rows are tried."""
    target, clock, passes = pair.target, pair.clock, list[Pass]()
    kind, begun = target.cache.capability, clock()
    for rows in _PASS_ROWS if target.feed is None else _STREAMED_PASS_ROWS:
        if rows > (1 if kind == "plain" else min(pair.max_nodes, pair.context_length or rows)):
            break
        if passes and clock() - begun > most_s:
            break
        tree = random_tree(rows, pair.vocab_size, line=kind != "tree")
        for _ in range(2):
            target.truncate(0)
            started, waited = clock(), target.io_wait_s
            target.verify(tree)
            seconds, waited = clock() - started, target.io_wait_s - waited
        passes.append((rows, seconds, seconds - waited))
    target.truncate(0)
    return passes


@dataclass(slots=True)
class Seat:
    """What belongs to one candidate as long as it is measured, whether it stays loaded or not.

    `draft_bytes`: weights or table. `plan`: None where all is in memory and there is no budget. `warm_ups`:
    seconds of its answers before measuring, prompt included.
    """

    names: PairPaths
    draft_bytes: int
    plan: MemoryPlan | None
    profile: PairProfile = field(default_factory=lambda: PairProfile(None))
    warm_ups: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Tuning:
    """One target's way from its candidates to the draft that is saved, and all that was found on it.

    `together`: whether all candidates are in memory at the same time, with one target in common; else each is
    loaded anew in every repetition, under a memory plan of its own. `open_pair`: loads a candidate.

    `runs` in the order they were done; `seats` by candidate; `passes`: timed ones of the target loaded last;
    `failures`: of candidates that cannot be had, cannot run, or have another text; `interrupted`: Ctrl-C came
    before the last run. `lines`: the others' figures.
    `saved`: the file that holds the choice; `problem`: why there is none, though there was something to save.
    """

    plan: TunePlan
    lineup: Lineup
    together: bool
    open_pair: Callable[[PairPaths], LoadedPair]
    runs: list[Run] = field(default_factory=list)
    seats: dict[str, Seat] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    lines: list[CandidateFigures] = field(default_factory=list)
    decision: Decision | None = None
    saved: Path | None = None
    problem: LlmcadError | None = None

    @property
    def winner(self) -> str | None:
        return None if self.decision is None else self.decision.winner

    def measure(self, on_turn: OnTurn = lambda label, total: None) -> None:
        """Let the candidates answer the same prompts, interleaved.

        A candidate that raises an error of this package, runs out of memory, or is hopeless gets no more turns.
        Raises what "none" raises: then it is the target's fault. Ctrl-C ends it early with what was done, if
        anything was.
        """
        work, candidates = self.plan.workload, self.lineup.candidates
        self.failures |= self.lineup.failures
        planned = list(sittings(candidates, work.repeat, self.together))
        num_turns = sum(len(who) * (work.warmup + len(when) * len(work.prompts)) for who, when in planned)
        runs = (
            run
            for who, repetitions in planned
            for run in self._sit(who, repetitions, lambda label: on_turn(label, num_turns))
        )
        self.interrupted = runner.until_interrupted(runs, self.runs)

    def _sit(
        self, who: Sequence[PairPaths], repetitions: range, on_turn: Callable[[str], None]
    ) -> Iterator[list[Run]]:
        work = self.plan.workload
        contenders: list[EngineContender] = []
        with ExitStack() as stack:
            stack.callback(release_free_memory)
            stack.callback(contenders.clear)
            for candidate in who:
                name = candidate.draft_name
                if name in self.failures:
                    continue
                try:
                    pair = self.open_pair(candidate)
                    stack.callback(pair.release)
                    draft_bytes = sum(drafter.num_bytes for drafter in pair.drafters)
                    if name not in self.seats:
                        seat = self.seats[name] = Seat(candidate, draft_bytes, pair.plan)
                        if not (self.together and self.passes):
                            self.passes = time_passes(pair)
                        for timed in self.passes:
                            seat.profile.costs.observe_pass(*timed)
                    seat = self.seats[name]
                    # What was learned in an earlier sitting goes on; nothing is saved meanwhile.
                    contenders.append(
                        EngineContender(name, replace(pair, profile=seat.profile), SpeculationSettings())
                    )
                except (LlmcadError, MemoryError, RuntimeError) as error:
                    self._fail(name, error)
            if contenders:
                prompts = runner.encode_prompts(work.prompts, pair)
                yield from self._do(runner.schedule(contenders, prompts, repetitions, work.warmup), on_turn)

    def _do(self, turns: Iterable[Turn], on_turn: Callable[[str], None]) -> Iterator[list[Run]]:
        """The turns of those that have not failed; what a warm-up took is noted."""
        for turn in turns:
            name = turn.contender.name
            on_turn(short_name(name))
            if not turn.warms_up and (reason := self._hopeless(name)) is not None:
                self.failures.setdefault(name, reason)
            if name in self.failures:
                continue
            try:
                run = turn.run(self.plan.workload.options)
            except (LlmcadError, MemoryError, RuntimeError) as error:
                self._fail(name, error)
                continue
            if turn.warms_up:
                stats = total_stats([run])
                self.seats[name].warm_ups.append(stats.prompt_s + stats.decode_s)
            else:
                yield [run]

    def _hopeless(self, name: str) -> str | None:
        """Why a candidate is not worth measuring: it took many times as long as no draft for every answer of the
        warm-up; None for one that is."""
        plain = self.seats[NO_DRAFT].warm_ups if NO_DRAFT in self.seats else ()
        times = list(zip(self.seats[name].warm_ups, plain, strict=False))
        if not times or any(own <= _HOPELESS * without for own, without in times):
            return None
        own, without = times[-1]
        return f"its warm-up took {own:.1f} s for an answer that takes {without:.1f} s without a draft"

    def _fail(self, name: str, error: Exception) -> None:
        no_memory = is_out_of_memory(error)
        if name == NO_DRAFT or not (no_memory or isinstance(error, LlmcadError)):
            raise error
        self.failures[name] = "there is not enough memory" if no_memory else str(error)

    def decide(self) -> None:
        """Find each candidate's figures and, if all was measured, the best. One with another text fails on our own
        kernels, where equal arithmetic gives equal text; elsewhere rounding may decide near-ties."""
        for name, seat in self.seats.items():
            if name in self.failures or not any(run.variant == name for run in self.runs):
                continue
            line = candidate_figures(self.plan, seat, self.runs)
            wrong = f"{line.mismatches} of {line.num_compared} tokens are not the target's own"
            if line.mismatches and cpu_kernels_wanted():
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
        options, speeds = self.plan.memory, {line.draft: line.tokens_per_s or 0.0 for line in self.lines}
        for name in speeds:
            seat = self.seats[name]
            streamed = None if seat.plan is None else seat.plan.streamed_bytes
            seat.profile.path = pair_profile_path(seat.names, streamed, options.read_bandwidth)
            seat.profile.save()
        winner = self.decision.winner
        choice = DraftChoice(winner, conditions(options), speeds[winner])
        try:
            self.saved = save_choice(self.lineup.target_path, choice)
        except LlmcadError as error:
            self.problem = error


def sittings(
    candidates: Sequence[PairPaths], repeat: int, together: bool
) -> Iterator[tuple[Sequence[PairPaths], range]]:
    """Who is in memory together, and for which repetitions: all candidates for all of them, or one after the other
    in each, each time another first."""
    if together:
        yield candidates, range(repeat)
        return
    for repetition in range(repeat):
        first = repetition % len(candidates)
        for candidate in (*candidates[first:], *candidates[:first]):
            yield [candidate], range(repetition, repetition + 1)


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


@dataclass(frozen=True, slots=True)
class CandidateFigures:
    """One candidate. None: not known (yet).

    `tokens_per_pass` is of all prompts, `tokens_per_s` of the measured half. Speeds leave out reading the prompt,
    of which `prompt_s` is the median. `difference`: predicted over measured, less one. `mismatches` counts the
    tokens of all runs that are not the target's own, of `num_compared`.
    """

    draft: str
    draft_bytes: int
    draft_step_s: float | None
    streamed_bytes: int
    pinned_bytes: int | None
    tokens_per_pass: float | None
    prediction: Prediction | None
    predicted_tokens_per_s: float | None
    tokens_per_s: float | None
    difference: float | None
    prompt_s: float | None
    domains: dict[str, DomainFigures]
    num_runs: int
    mismatches: int
    num_compared: int


def candidate_figures(plan: TunePlan, seat: Seat, runs: Sequence[Run]) -> CandidateFigures:
    """One candidate's figures; `runs` are those of all candidates."""
    name, costs, memory = seat.names.draft_name, seat.profile.costs, seat.plan
    own = [run for run in runs if run.variant == name]
    middle, (mismatches, num_compared) = median_runs(own), runner.count_mismatches(runs, name, reference=NO_DRAFT)
    streamed = 0 if memory is None else memory.streamed_bytes
    prediction = Prediction.of(among(middle, plan.calibrating), costs, streamed, plan.memory.read_bandwidth)
    predicted = None if prediction is None else prediction.tokens_per_s
    measured = total_stats(among(middle, plan.measured)).tokens_per_s or None
    domains = {}
    for domain in dict.fromkeys(prompt.domain for prompt in plan.workload.prompts):
        total = total_stats(run for run in middle if run.place.domain == domain)
        domains[domain] = DomainFigures(total.tokens_per_pass or None, total.tokens_per_s or None)
    return CandidateFigures(
        draft=name,
        draft_bytes=seat.draft_bytes,
        draft_step_s=costs.draft.predict(1) if costs.draft else None,
        streamed_bytes=streamed,
        pinned_bytes=None if memory is None else memory.pinned_bytes,
        tokens_per_pass=total_stats(middle).tokens_per_pass or None,
        prediction=prediction,
        predicted_tokens_per_s=predicted,
        tokens_per_s=measured,
        difference=None if predicted is None or measured is None else predicted / measured - 1.0,
        prompt_s=median([run.generation.prompt_s for run in own]),
        domains=domains,
        num_runs=len(own),
        mismatches=mismatches,
        num_compared=num_compared,
    )


def median_runs(runs: Iterable[Run]) -> list[Run]:
    """For each prompt the run of median speed, the faster of two."""
    groups = grouped(runs, lambda run: run.place.name).values()
    ordered = [sorted(group, key=lambda run: -total_stats([run]).tokens_per_s) for group in groups]
    return [group[(len(group) - 1) // 2] for group in ordered]


def among(runs: Iterable[Run], prompts: frozenset[PromptName]) -> list[Run]:
    """The runs of `prompts`."""
    return [run for run in runs if run.place.name in prompts]


@dataclass(frozen=True, slots=True)
class Standing:
    """A candidate beside the fastest. `ratio`: median over repetitions of its speed over the fastest's."""

    name: str
    ratio: float
    noise: float


@dataclass(frozen=True, slots=True)
class Decision:
    """`standings` of all candidates, the best first; `tied`: those as good as the `fastest`, it among them."""

    winner: str
    fastest: str
    tied: tuple[str, ...]
    standings: tuple[Standing, ...]


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
    tied = [entry.name for entry in standings if entry.name == fastest or entry.ratio >= 1.0 - entry.noise]
    stays = any(entry.name == incumbent and entry.ratio >= 1.0 - 2.0 * entry.noise for entry in standings)
    winner = incumbent if stays and incumbent is not None else min(tied, key=lambda name: sizes[name])
    return Decision(winner, fastest, tuple(tied), tuple(standings))


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


def tune_report(done: Tuning) -> Report:
    """All candidates, the best first; then tokens per pass and speed by domain; and in the document everything:
    bytes in bytes, times in seconds, speeds in tokens per second."""
    lineup, plan, rate = done.lineup, done.plan, done.plan.memory.read_bandwidth
    standings = {} if done.decision is None else {entry.name: asdict(entry) for entry in done.decision.standings}
    document = {
        "target": lineup.target,
        "target_path": str(lineup.target_path),
        "options": {
            "drafts": None if plan.drafts.names is None else list(plan.drafts.names),
            "bits": list(plan.drafts.bits),
            "trim": list(plan.drafts.tokens),
            "calibrated_on": [f"{domain}/{name}" for domain, name in sorted(plan.calibrating)],
            "measured_on": [f"{domain}/{name}" for domain, name in sorted(plan.measured)],
            **plan.workload.to_json(),
            **asdict(plan.memory),
        },
        "together": done.together,
        "winner": done.winner,
        "incumbent": lineup.incumbent,
        "tied": [] if done.decision is None else list(done.decision.tied),
        "saved": None if done.saved is None else str(done.saved),
        "candidates": [asdict(line) | {"standing": standings.get(line.draft)} for line in done.lines],
        "failed": [{"draft": name, "reason": reason} for name, reason in done.failures.items()],
        "runs": [
            {"draft": run.variant, **asdict(run.place), "order": run.order, **asdict(total_stats([run]))}
            for run in done.runs
        ],
    }
    return Report.of_runs(
        "tune",
        f"{lineup.target}: drafts",
        rate,
        _tables(done) if done.lines else [],
        _notes(done),
        document,
        plots=[Plot("tune", "Drafts measured by tune", partial(_draw, done) if done.lines else None)],
        interrupted=done.interrupted,
        problem=done.problem,
    )


def _tables(done: Tuning) -> list[Table]:
    per_pass, speed = [], []
    for line in done.lines:
        named, domains = {"draft": short_name(line.draft)}, line.domains.items()
        per_pass.append(named | {name: number(figures.tokens_per_pass, 2) for name, figures in domains})
        speed.append(named | {name: number(figures.tokens_per_s) for name, figures in domains})
    emulated = "" if done.plan.memory.read_bandwidth is None else " (emulated)"
    return [
        Table.of(
            f"drafts for {short_name(done.lineup.target)}{emulated}", [_cells(done, line) for line in done.lines]
        ),
        Table.of("tokens per pass", per_pass),
        Table.of("tokens per s, both halves", speed),
    ]


def _cells(done: Tuning, line: CandidateFigures) -> dict[str, str]:
    plain = next((other.tokens_per_s for other in done.lines if other.draft == NO_DRAFT), None)
    ratio = line.tokens_per_s / plain if plain and line.tokens_per_s is not None else None
    label = short_name(line.draft) + (" (chosen)" if line.draft == done.winner else "")
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


def _notes(done: Tuning) -> list[str]:
    plan, decision = done.plan, done.decision
    where = (
        "all in memory together, interleaved by prompt"
        if done.together
        else "loaded one after the other, in every repetition anew"
    )
    notes = [
        f"Prompts: {len(plan.calibrating)} predict, {len(plan.measured)} are measured; {plan.workload.summary} "
        f"Candidates {where}. A prompt counts with its median repetition; speeds are all tokens over all seconds.",
        "Predicted: A / (max(W/B, C) + D) with tokens per pass A, computing C and the rest of a round D from the "
        "prompts that predict; measured: the speed on the others. Reading the prompt comes on top.",
    ]
    if plan.memory.read_bandwidth is not None:
        notes.append(f"Reads are {output.emulated_rate(plan.memory.read_bandwidth)}.")
    notes += [f"Left out: {name}: {reason}." for name, reason in done.failures.items()]
    if done.interrupted:
        return [*notes, f"Interrupted after {len(done.runs)} generations: nothing is chosen, nothing saved."]
    if decision is None:
        return [*notes, "Nothing was measured: nothing is chosen."]
    winner, fastest = short_name(decision.winner), short_name(decision.fastest)
    others = [short_name(name) for name in decision.tied if name != decision.winner]
    if done.lineup.incumbent == decision.winner != decision.fastest:
        notes.append(
            f"{winner} was chosen before and stays: it falls short of {fastest} by less than twice the noise."
        )
    elif others:
        notes.append(
            f"Within the noise (at least {LEAST_NOISE:.0%}) as fast: {', '.join(others)}; the smallest draft wins."
        )
    if done.saved is not None:
        notes.append(f"Saved in {done.saved}: --draft auto means {winner} from now on.")
    return notes


def _draw(done: Tuning, figure: Any) -> None:
    lines = done.lines
    speed, per_pass = output.bar_panels(figure, 2.0 + 0.75 * len(lines), 2, width=10.0)
    rows = range(len(lines))
    colours = [output.ORANGE if line.draft == done.winner else output.BLUE for line in lines]
    bars = speed.barh(rows, [line.tokens_per_s or 0.0 for line in lines], 0.6, color=colours)
    speed.bar_label(bars, fmt="%.1f", padding=6)
    known = [(line.predicted_tokens_per_s, row) for row, line in enumerate(lines) if line.predicted_tokens_per_s]
    if known:
        speed.plot(*zip(*known, strict=True), "k|", markersize=22, markeredgewidth=2)
    speed.set_xlabel("tokens/s; black line: predicted" + ("" if done.winner is None else "; orange: chosen"))
    speed.set_yticks(rows, [short_name(line.draft) for line in lines])
    domains = list(lines[0].domains)
    height = 0.8 / len(domains)
    for index, domain in enumerate(domains):
        at = [row + (index - (len(domains) - 1) / 2) * height for row in rows]
        values = [line.domains[domain].tokens_per_pass or 0.0 for line in lines]
        per_pass.barh(at, values, height, color=output.COLOURS[index % len(output.COLOURS)], label=domain)
    per_pass.set_xlabel("tokens per pass of the target")
    output.legend_below(figure)
