"""Measures candidates on the same prompts, interleaved, and goes on without those that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from llmcad_mlx.bench.benchmark import encode_prompts
from llmcad_mlx.bench.contenders import EngineContender, Sampling
from llmcad_mlx.bench.prompts import BenchPrompt
from llmcad_mlx.bench.records import Generation, Place, Run
from llmcad_mlx.bench.runner import EncodedPrompt, schedule
from llmcad_mlx.drafting.model_drafter import ModelDrafter
from llmcad_mlx.drafting.table_drafter import TableDrafter
from llmcad_mlx.errors import LlmcadError
from llmcad_mlx.loader import LoadedPair, release_free_memory
from llmcad_mlx.pair_names import NO_DRAFT
from llmcad_mlx.profile import PairProfile
from llmcad_mlx.settings import SpeculationSettings
from llmcad_mlx.target.plan import MemoryPlan
from llmcad_mlx.tuning.candidates import Candidate

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
    models = sum(d.model.weight_bytes for d in pair.drafters if isinstance(d, ModelDrafter))
    return models + sum(d.table.num_bytes for d in pair.drafters if isinstance(d, TableDrafter))
