"""What `llmcad-mlx tune` was asked to do, checked before anything is loaded.

The drafts that could serve a target: those named, or what is there for it, and their smaller copies.

From runs to one line per candidate: what it yields, what was predicted for it and what was measured.

Half of each domain's prompts calibrate, the other half are measured. From the first half come tokens per pass A,
computing C, what a round takes beside its pass D and, where nobody gave it, the read rate B; with W bytes read on
each pass they predict tokens/s = A / (max(W/B, C) + D) (DESIGN 3.7) for the second half, whose runs tell.

A prompt counts with its median repetition, and speeds are all tokens over all seconds. Pure arithmetic.

Which candidate is best, so that two runs on the same machine agree. Pure arithmetic.

Speeds are compared repetition by repetition with the fastest's, because a busy machine slows all of a repetition.
A candidate's noise is half the spread of these ratios, at least 3 %. Those that come within their noise of the
fastest tie with it; of them the one with the smallest draft wins, then the faster one. The draft chosen before
stays unless it falls short by more than twice its noise: what wins narrowly once keeps winning.

Measures candidates on the same prompts, interleaved, and goes on without those that fail.

From a target's name to the draft that serves it best, chosen and saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from statistics import median

import mlx.core as mx

from llmcad_mlx.errors import LlmcadError, ModelError, UsageError
from llmcad_mlx.loader import LoadedPair, PreparedTarget, conditions, is_planned, load_names, release_free_memory
from llmcad_mlx.machine import Machine, this_machine
from llmcad_mlx.measure.benchmark import encode_prompts
from llmcad_mlx.measure.contenders import EngineContender, Sampling
from llmcad_mlx.measure.forecast import Measured, ReadRate, Speeds
from llmcad_mlx.measure.prompts import ALL_DOMAINS, BenchPrompt, load_prompts
from llmcad_mlx.measure.records import Generation, Place, Run
from llmcad_mlx.measure.runner import EncodedPrompt, mixed_by_domain, schedule
from llmcad_mlx.measure.summary import count_mismatches
from llmcad_mlx.memory.plan import MemoryPlan
from llmcad_mlx.models.draft_folder import FILE as DRAFT_TOKENS
from llmcad_mlx.models.draft_folder import vocabulary_size
from llmcad_mlx.models.folder import load_model_folder, read_config
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.settings import GenerationOptions, MemoryOptions, SpeculationSettings, check_integer
from llmcad_mlx.store.copies import BITS, SELF_BITS, DerivedDraft, stored_bits
from llmcad_mlx.store.names import (
    AUTO_DRAFT,
    NGRAM_DRAFT,
    NO_DRAFT,
    PairPaths,
    device_name,
    pair_profile_path,
    pair_with_draft,
)
from llmcad_mlx.store.profile import DraftChoice, PairProfile, find_choice, save_choice
from llmcad_mlx.store.pull import DEFAULT_PRESET, preset_draft, resolve_target


@dataclass(frozen=True, slots=True)
class Candidate:
    """A draft that is there. `name`: as `--draft` takes it, wherever it is typed."""

    name: str
    names: PairPaths

    @property
    def label(self) -> str:
        """Short, for people."""
        return short_name(self.name)


@dataclass(frozen=True, slots=True)
class Failure:
    """A draft that is no candidate, or has stopped being one, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class DraftSearch:
    """All that were looked for; the last one found is "none", which the others are compared with."""

    found: tuple[Candidate, ...]
    failures: tuple[Failure, ...]


def find_candidates(
    target: str,
    target_path: Path,
    drafts: Sequence[str] | None,
    bits: Sequence[int],
    tokens: Sequence[int],
    incumbent: str | None,
    show_progress: bool,
) -> DraftSearch:
    """Fetch and make the candidates for the target named `target`, which lies in `target_path`.

    drafts: names as `--draft` takes them; None: the `incumbent`, what the target's preset names, prompt lookup,
    and the target itself in fewer bits. bits: a draft model with more bits is tried in so many, too. tokens: and
    all of them with an output vocabulary of so many tokens, where they have more than twice as many. A draft that
    cannot be had is among the failures.
    """
    found: dict[str, Candidate] = {}
    failures: dict[str, Failure] = {}
    given = _default(target, target_path, incumbent) if drafts is None else drafts
    waiting = [_lasting(preset_draft(target) if name == AUTO_DRAFT else name) for name in given]
    for name in waiting:
        _find(name, target_path, show_progress, found, failures)
    whole = [found[name] for name in waiting if name in found]
    for candidate in whole:
        for name in _smaller(candidate, bits):
            _find(name, target_path, show_progress, found, failures)
    for candidate in list(found.values()):
        for name in _trimmed(candidate, tokens):
            _find(name, target_path, show_progress, found, failures)
    found.pop(NO_DRAFT, None)
    found[NO_DRAFT] = Candidate(NO_DRAFT, pair_with_draft(target_path, NO_DRAFT, show_progress))
    return DraftSearch(tuple(found.values()), tuple(failures.values()))


def short_name(name: str) -> str:
    """A candidate's name without the folders that lead to it."""
    derived = DerivedDraft.parse(name)
    if derived is not None:
        return derived.renamed(short_name)
    return Path(name).name if Path(name).is_absolute() else name


def _find(
    name: str,
    target_path: Path,
    show_progress: bool,
    found: dict[str, Candidate],
    failures: dict[str, Failure],
) -> None:
    if name in found or name in failures:
        return
    try:
        found[name] = Candidate(name, pair_with_draft(target_path, name, show_progress))
    except LlmcadError as error:
        failures[name] = Failure(name, str(error))


def _default(target: str, target_path: Path, incumbent: str | None) -> Iterator[str]:
    if incumbent is not None:
        yield incumbent
    yield preset_draft(target)
    yield NGRAM_DRAFT
    present = _bits_of(target_path)
    yield from (str(DerivedDraft(None, bits)) for bits in sorted(SELF_BITS, reverse=True) if bits < present)


def _smaller(candidate: Candidate, bits: Sequence[int]) -> Iterator[str]:
    """Names of the copies of a draft model that have fewer bits."""
    path, name = candidate.names.draft_path, candidate.name
    if path is None or not path.is_dir() or DerivedDraft.parse(name) is not None:
        return
    present = _bits_of(path)
    yield from (str(DerivedDraft(name, bits=number)) for number in sorted(bits, reverse=True) if number < present)


def _trimmed(candidate: Candidate, tokens: Sequence[int]) -> Iterator[str]:
    """Names of the copies of a draft model that propose fewer tokens."""
    path, derived = candidate.names.draft_path, DerivedDraft.parse(candidate.name)
    if path is None or not path.is_dir() or (derived is not None and derived.tokens is not None):
        return
    if (path / DRAFT_TOKENS).exists():
        return
    present = vocabulary_size(read_config(path)) or 0
    yield from (str(DerivedDraft(candidate.name, tokens=number)) for number in tokens if 2 * number < present)


def _bits_of(folder: Path) -> int:
    """0 for a model that cannot be quantised."""
    try:
        return stored_bits(load_model_folder(folder, lazy=True, alone=True))
    except ModelError:
        return 0


def _lasting(name: str) -> str:
    """The same draft, wherever the program is started."""
    derived = DerivedDraft.parse(name)
    if derived is not None:
        return derived.renamed(_lasting)
    if name in (NGRAM_DRAFT, NO_DRAFT):
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


PromptName = tuple[str, str]
"""Domain and name."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which prompts a prediction is made from, and which it is made for."""

    calibration: frozenset[PromptName]
    measured: frozenset[PromptName]

    @classmethod
    def of(cls, prompts: Sequence[BenchPrompt]) -> Split:
        """The first, third, … prompt of each domain calibrate. Raises UsageError for a domain of one prompt."""
        halves: tuple[set[PromptName], set[PromptName]] = set(), set()
        counts: dict[str, int] = {}
        for prompt in prompts:
            counts[prompt.domain] = counts.get(prompt.domain, 0) + 1
            halves[(counts[prompt.domain] - 1) % 2].add((prompt.domain, prompt.name))
        for domain, count in counts.items():
            if count < 2:
                raise UsageError(
                    f"prompts: {domain} has one prompt; tune needs two of each domain or more: one half predicts, "
                    "the other is measured"
                )
        return cls(frozenset(halves[0]), frozenset(halves[1]))


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
        stats = stats_of(runs)
        passes = sum(s.target_passes for s in stats)
        if not passes:
            return None
        computing = sum(s.verify_s for s in stats) / passes
        pass_s = computing + sum(s.io_wait_s + s.hidden_draft_s for s in stats) / passes
        measured = Measured(
            tokens_per_pass=sum(s.generated_tokens for s in stats) / passes,
            nodes=1 + sum(s.tested for s in stats) / passes,
            pass_s=computing,
            plain_pass_s=costs.computing.predict(1),
            rest_s=max(sum(s.decode_s for s in stats) / passes - pass_s, 0.0),
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
    of which `prompt_s` is the median. `mismatches` counts the tokens of all runs that are not the target's own, of
    `num_compared`.
    """

    name: str
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


def stats_of(runs: Iterable[Run]) -> list[GenerationStats]:
    """Of runs of our own engine."""
    return [run.generation.stats for run in runs if run.generation.stats is not None]


def rate(runs: Iterable[Run]) -> float | None:
    """All tokens over all seconds of decoding; None without any."""
    stats = stats_of(runs)
    seconds = sum(s.decode_s for s in stats)
    return sum(s.generated_tokens for s in stats) / seconds if seconds > 0.0 else None


def tokens_per_pass(runs: Iterable[Run]) -> float | None:
    """All tokens over all passes of the target; None without any."""
    stats = stats_of(runs)
    passes = sum(s.target_passes for s in stats)
    return sum(s.generated_tokens for s in stats) / passes if passes else None


def median_runs(runs: Iterable[Run]) -> list[Run]:
    """For each prompt the run of median speed, the faster of two."""
    by_prompt: dict[PromptName, list[Run]] = {}
    for run in runs:
        if run.generation.stats is not None:
            by_prompt.setdefault(prompt_of(run), []).append(run)
    return [sorted(group, key=_seconds_per_token)[(len(group) - 1) // 2] for group in by_prompt.values()]


def _seconds_per_token(run: Run) -> float:
    stats = run.generation.stats
    assert stats is not None
    return stats.decode_s / max(stats.generated_tokens, 1)


def prompt_of(run: Run) -> PromptName:
    return run.place.domain, run.place.prompt


def among(runs: Iterable[Run], prompts: frozenset[PromptName]) -> list[Run]:
    """The runs of `prompts`."""
    return [run for run in runs if prompt_of(run) in prompts]


def compared(runs: Iterable[Run], reference: Sequence[Run]) -> tuple[int, int]:
    """Tokens of `runs` that differ from `reference`'s at the same prompt, and how many were compared.

    The same seed gives the same text in every repetition, so one run of the reference serves all.
    """
    expected = {prompt_of(run): run.generation.tokens for run in reference}
    pairs = [(run.generation.tokens, expected[prompt_of(run)]) for run in runs if prompt_of(run) in expected]
    return sum(count_mismatches(*pair) for pair in pairs), sum(len(tokens) for tokens, _ in pairs)


LEAST_NOISE = 0.03


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
    incumbent: str | None

    @property
    def stays(self) -> bool:
        """Whether an earlier choice was confirmed."""
        return self.winner == self.incumbent


def decide(lines: Sequence[CandidateFigures], runs: Sequence[Run], incumbent: str | None) -> Decision | None:
    """lines: of the candidates that may win. runs: of the measured prompts. incumbent: chosen before, if anything
    was. None where nothing was measured."""
    speeds = {line.name: line.tokens_per_s for line in lines if line.tokens_per_s is not None}
    if not speeds:
        return None
    fastest = max(speeds, key=lambda name: speeds[name])
    bytes_of = {line.name: line.draft_bytes for line in lines}
    found = [standing(name, fastest, runs) for name in speeds]
    standings = sorted(found, key=lambda entry: -entry.ratio)
    tied = [entry.name for entry in standings if entry.name == fastest or entry.within(1.0)]
    stays = [entry.name for entry in standings if entry.name == incumbent and entry.within(2.0)]
    winner = stays[0] if stays else min(tied, key=lambda name: bytes_of[name])
    return Decision(winner, fastest, tuple(tied), tuple(standings), incumbent)


def standing(name: str, fastest: str, runs: Sequence[Run]) -> Standing:
    """The candidate `name` beside `fastest`, at the prompts and repetitions where both ran."""
    by_repetition: dict[int, tuple[list[Run], list[Run]]] = {}
    own = {run.place: run for run in runs if run.variant == name}
    for run in runs:
        if run.variant == fastest and run.place in own:
            ours, theirs = by_repetition.setdefault(run.place.repetition, ([], []))
            ours.append(own[run.place])
            theirs.append(run)
    ratios = [(rate(ours) or 0.0) / best for ours, theirs in by_repetition.values() if (best := rate(theirs))]
    if not ratios:
        return Standing(name, 0.0, LEAST_NOISE)
    return Standing(name, median(ratios), max((max(ratios) - min(ratios)) / 2, LEAST_NOISE))


_HOPELESS = 5  # times as long as without a draft: like weights in bits that the processor has no kernels for

OpenPair = Callable[[Candidate], LoadedPair]
OnTurn = Callable[[str, int], None]
"""Called before each generation with the candidate's label and the number of all generations."""


@dataclass(frozen=True, slots=True)
class Task:
    """What every candidate has to do."""

    prompts: tuple[BenchPrompt, ...]
    sampling: Sampling
    repeat: int
    warmup: int


@dataclass(slots=True)
class Seat:
    """What belongs to one candidate as long as it is measured, whether it stays loaded or not.

    `draft_bytes`: weights or table. `plan`: None where all is in memory and there is no budget.
    """

    candidate: Candidate
    draft_bytes: int
    plan: MemoryPlan | None
    profile: PairProfile


@dataclass(slots=True)
class Outcome:
    """`runs` in the order they were done; `failures` by candidate; `interrupted`: Ctrl-C came before the last.
    `warmups`: seconds of each candidate's answers before measuring, prompt included."""

    runs: list[Run] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    seats: dict[str, Seat] = field(default_factory=dict)
    interrupted: bool = False
    warmups: dict[str, list[float]] = field(default_factory=dict)

    def hopeless(self, name: str) -> str | None:
        """Why a candidate is not worth measuring: it took many times as long as no draft for every answer of the
        warm-up; None for one that is."""
        times = list(zip(self.warmups.get(name, ()), self.warmups.get(NO_DRAFT, ()), strict=False))
        if not times or any(own <= _HOPELESS * plain for own, plain in times):
            return None
        own, plain = times[-1]
        return f"its warm-up took {own:.1f} s for an answer that takes {plain:.1f} s without a draft"


@dataclass(frozen=True, slots=True)
class Sitting:
    """Candidates that are in memory together for some repetitions."""

    candidates: tuple[Candidate, ...]
    first: int
    repeat: int


def sittings(candidates: Sequence[Candidate], repeat: int, together: bool) -> Iterator[Sitting]:
    """All candidates at once for all repetitions; else one after the other in each repetition, each time another
    first."""
    if together:
        yield Sitting(tuple(candidates), 0, repeat)
        return
    for repetition in range(repeat):
        for index in range(len(candidates)):
            yield Sitting((candidates[(index + repetition) % len(candidates)],), repetition, 1)


def measure(
    task: Task,
    candidates: Sequence[Candidate],
    open_pair: OpenPair,
    together: bool,
    on_turn: OnTurn = lambda label, total: None,
) -> Outcome:
    """Do all turns. together: whether all candidates may be in memory at the same time.

    A candidate that raises an error of this package, runs out of memory, or is hopeless gets no more turns. Raises
    what "none" raises: then it is the target's fault. Ctrl-C ends it early with what was done, if anything was.
    """
    outcome = Outcome()
    planned = list(sittings(candidates, task.repeat, together))
    total = sum(len(s.candidates) * (task.warmup + s.repeat * len(task.prompts)) for s in planned)
    try:
        for sitting in planned:
            _sit(sitting, task, open_pair, outcome, lambda label: on_turn(label, total))
    except KeyboardInterrupt:
        if not outcome.runs:
            raise
        outcome.interrupted = True
    return outcome


def _sit(
    sitting: Sitting, task: Task, open_pair: OpenPair, outcome: Outcome, on_turn: Callable[[str], None]
) -> None:
    seated: list[tuple[Candidate, EngineContender]] = []
    pairs: list[LoadedPair] = []
    try:
        for candidate in sitting.candidates:
            if candidate.name in outcome.failures:
                continue
            try:
                pairs.append(open_pair(candidate))
                seated.append((candidate, _seat(candidate, pairs[-1], outcome)))
            except (LlmcadError, MemoryError) as error:
                _fail(outcome, candidate, error)
        if seated:
            _take_turns(sitting, task, seated, encode_prompts(task.prompts, pairs[0]), outcome, on_turn)
    finally:
        seated.clear()
        for pair in pairs:
            pair.release()
        pairs.clear()
        release_free_memory()


def _seat(candidate: Candidate, pair: LoadedPair, outcome: Outcome) -> EngineContender:
    """Ready to generate. What was learned in an earlier sitting goes on; nothing is saved meanwhile."""
    seat = outcome.seats.get(candidate.name)
    if seat is None:
        seat = Seat(candidate, draft_bytes(pair), pair.plan, PairProfile(None))
        outcome.seats[candidate.name] = seat
    return EngineContender(candidate.name, replace(pair, profile=seat.profile), SpeculationSettings())


def _take_turns(
    sitting: Sitting,
    task: Task,
    seated: Sequence[tuple[Candidate, EngineContender]],
    prompts: Sequence[EncodedPrompt],
    outcome: Outcome,
    on_turn: Callable[[str], None],
) -> None:
    for turn in schedule(len(seated), len(prompts), sitting.repeat, task.warmup):
        (candidate, contender), encoded = seated[turn.variant], prompts[turn.prompt]
        on_turn(candidate.label)
        if turn.repetition >= 0 and (reason := outcome.hopeless(candidate.name)) is not None:
            outcome.failures.setdefault(candidate.name, reason)
        if candidate.name in outcome.failures:
            continue
        try:
            generation = contender.generate(encoded.tokens, task.sampling)
        except (LlmcadError, MemoryError) as error:
            _fail(outcome, candidate, error)
            continue
        if turn.repetition < 0:
            outcome.warmups.setdefault(candidate.name, []).append(_seconds(generation))
        else:
            place = Place(encoded.prompt.domain, encoded.prompt.name, sitting.first + turn.repetition)
            outcome.runs.append(Run(candidate.name, place, turn.order, generation))


def _seconds(generation: Generation) -> float:
    stats = generation.stats
    return stats.prompt_s + stats.decode_s if stats is not None else generation.prompt_s + generation.decode_s


def _fail(outcome: Outcome, candidate: Candidate, error: LlmcadError | MemoryError) -> None:
    if candidate.name == NO_DRAFT:
        raise error
    outcome.failures[candidate.name] = str(error) or "there is not enough memory"


def draft_bytes(pair: LoadedPair) -> int:
    """Memory of the draft model's weights, or of the n-gram table."""
    return sum(drafter.num_bytes for drafter in pair.drafters)


@dataclass(frozen=True, slots=True)
class Lineup:
    """A target and the candidates for it, found but not loaded."""

    target: str
    target_path: Path
    candidates: DraftSearch
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
    choice = find_choice(target_path, conditions(options))
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
    choice = DraftChoice(decision.winner, conditions(options), speeds[decision.winner] or 0.0)
    try:
        report.saved = save_choice(report.lineup.target_path, choice)
    except LlmcadError as error:
        report.problem = error


def _opener(lineup: Lineup, together: bool) -> OpenPair:
    if not together:
        return lambda candidate: load_names(candidate.names, lineup.options)
    shared = PreparedTarget.in_memory(lineup.target_path)
    return lambda candidate: shared.build(candidate.names)


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


NONE = "none"


@dataclass(frozen=True, slots=True)
class TunePlan:
    """What to measure. `drafts`: None for what is there; `bits` and
    `tokens`: of the copies of draft models."""

    drafts: tuple[str, ...] | None
    bits: tuple[int, ...]
    tokens: tuple[int, ...]
    task: Task
    split: Split

    @property
    def domains(self) -> list[str]:
        """Of the prompts, in their order."""
        return list(dict.fromkeys(prompt.domain for prompt in self.task.prompts))

    @classmethod
    def of(
        cls,
        drafts: str | None,
        bits: str,
        trim: str,
        prompts: Path | None,
        per_domain: int | None,
        max_tokens: int,
        repeat: int,
        warmup: int,
        temperature: float,
        seed: int,
    ) -> TunePlan:
        """Check what the command line was given. Raises UsageError naming the option."""
        GenerationOptions.of(max_tokens=max_tokens, temperature=temperature, seed=seed)
        if max_tokens < 2:
            raise UsageError("max_tokens: to be measured a draft needs a limit of 2 or more")
        check_integer("repeat", repeat, 1, 10_000)
        check_integer("warmup", warmup, 0, 10_000)
        if per_domain is not None:
            check_integer("per_domain", per_domain, 2, 10_000)
        with as_file(files("llmcad_mlx.measure").joinpath("tune_prompts.toml")) as packaged:
            found = load_prompts(prompts or packaged, [ALL_DOMAINS], per_domain)
        sampling = Sampling(max_tokens, temperature, seed)
        task = Task(tuple(mixed_by_domain(found)), sampling, repeat, warmup)
        return cls(_drafts(drafts), _bits(bits), _tokens(trim), task, Split.of(found))


def _drafts(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError("drafts: none given; name some, separated by commas, or leave the option out")
    for name in names:
        DerivedDraft.parse(name)
    return tuple(names)


def _bits(text: str) -> tuple[int, ...]:
    if text == NONE:
        return ()
    names = [name.strip() for name in text.split(",")]
    known = {str(bits): bits for bits in BITS}
    for name in names:
        if name not in known:
            raise UsageError(f"bits: {name!r} is not one of {', '.join(known)}, or {NONE}")
    return tuple(dict.fromkeys(known[name] for name in names))


def _tokens(text: str) -> tuple[int, ...]:
    if text == NONE:
        return ()
    names = [name.strip() for name in text.split(",")]
    if not all(name.isascii() and name.isdigit() and int(name) for name in names):
        raise UsageError(f"trim: {text!r} is not a list of numbers of tokens like 4096,8192, or {NONE}")
    return tuple(dict.fromkeys(int(name) for name in names))
