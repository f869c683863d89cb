"""How the cost of one target pass grows with the bytes it reads, with the tree's nodes, and with the context.

Times single passes of a loaded target over random trees of any size, after a context of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal, get_args

import numpy as np

from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair, load_pair, release_free_memory
from llmcad_mlx.machine import Machine, this_machine
from llmcad_mlx.measure.runner import schedule
from llmcad_mlx.memory.plan import MemoryPlan
from llmcad_mlx.prompt import encode_prompt
from llmcad_mlx.settings import MemoryOptions, check_integer
from llmcad_mlx.store.names import NO_DRAFT, device_name
from llmcad_mlx.store.pull import DEFAULT_PRESET
from llmcad_mlx.tree.token_tree import TokenTree

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (64, 256, 1024, 2048, 4096)
FEW_NODES, SHORT_CONTEXT = 16, 256  # what a tree and a cache have while something else grows
MIN_CONTEXT = 128  # with less room there is nothing to compare

_SEED = 0
_TEXT = "The tide comes in twice a day, and the fishermen know their hours by heart. "
_WORTH_IT = 1.5  # the longest context that fits is measured too where it is so much longer than the last


@dataclass(frozen=True, slots=True)
class TimedPass:
    """Seconds of one pass, and how many of them the computing thread waited for reads."""

    seconds: float
    wait_s: float


class PassTimer:
    """Times passes of one loaded target over random trees, after a text that repeats itself."""

    def __init__(self, pair: LoadedPair) -> None:
        """Raises UsageError where the target has no room for a context to grow in."""
        self._pair, self._target = pair, pair.target
        kind = pair.target.capability
        self.few_nodes = 1 if kind == "plain" else min(FEW_NODES, pair.max_nodes)
        room = pair.context_length or CONTEXTS[-1] + self.few_nodes
        check_room(room)
        self.contexts = _that_fit(CONTEXTS, room - self.few_nodes)
        self.short_context = max(length for length in self.contexts if length <= SHORT_CONTEXT)
        most = 1 if kind == "plain" else min(pair.max_nodes, room - self.short_context)
        self.node_counts = [count for count in NODES if count <= most]
        text = encode_prompt(_TEXT, pair.tokenizer, pair.vocab_size)
        self._tokens = (text * (self.contexts[-1] // len(text) + 1))[: self.contexts[-1]]
        self._trees = {
            count: random_tree(count, pair.vocab_size, line=kind != "tree")
            for count in {*self.node_counts, self.few_nodes}
        }

    @property
    def streamed_bytes(self) -> int:
        """Bytes read on each pass."""
        return 0 if self._pair.plan is None else self._pair.plan.streamed_bytes

    def fill(self, length: int) -> None:
        """Let the cache hold `length` tokens."""
        self._target.truncate(length)
        missing = self._tokens[self._target.num_cached : length]
        self._target.prefill(missing, lambda done: None, lambda: False)

    def measure(self, nodes: int) -> TimedPass:
        """One pass. It follows one of the same kind, unmeasured: a stream reads ahead during the pass before."""
        clock, tree = self._pair.clock, self._trees[nodes]
        self._target.verify(tree)
        started, waited = clock(), self._target.io_wait_s
        self._target.verify(tree)
        return TimedPass(clock() - started, self._target.io_wait_s - waited)


def random_tree(num_nodes: int, vocab_size: int, line: bool = False) -> TokenTree:
    """The same random tokens every time, each below a random node, or below the last one in a `line`."""
    rng = np.random.default_rng([_SEED, num_nodes])
    tree = TokenTree(int(rng.integers(vocab_size)))
    while len(tree) < num_nodes:  # a token that its parent has as a child already adds nothing
        parent = len(tree) - 1 if line else int(rng.integers(len(tree)))
        tree.add(parent, int(rng.integers(vocab_size)), 0.5)
    return tree


def _that_fit(lengths: Sequence[int], most: int) -> list[int]:
    """The lengths up to `most`, and `most` itself where it is much longer than the last that fits."""
    fitting = [length for length in lengths if length <= most]
    if len(fitting) < len(lengths) and most > fitting[-1] * _WORTH_IT:
        fitting.append(most)
    return fitting


def check_room(context: int) -> None:
    """Raises UsageError where `context` tokens are too few to measure growth."""
    if context < MIN_CONTEXT:
        raise UsageError(
            f"context: room for {context} tokens leaves nothing to grow; --growth needs {MIN_CONTEXT} or more"
        )


SHARES = (100, 75, 50, 25, 0)  # per cent of what can be pinned
NUM_STEPS = 2 + len(SHARES)

Question = Literal["bytes", "nodes", "context"]
Step = Callable[[str], None]
QUESTIONS: tuple[Question, ...] = get_args(Question)


@dataclass(frozen=True, slots=True)
class GrowthPoint:
    """All measured passes of one kind. `context`: tokens in the cache before the tree's `nodes`."""

    question: Question
    streamed_bytes: int
    nodes: int
    context: int
    passes: tuple[TimedPass, ...]

    @property
    def value(self) -> int:
        """What the question lets grow: bytes, nodes or tokens."""
        return {"bytes": self.streamed_bytes, "nodes": self.nodes, "context": self.context}[self.question]

    @property
    def seconds(self) -> list[float]:
        return [timed.seconds for timed in self.passes]

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def computing_s(self) -> float:
        """The median without the waits."""
        return median(timed.seconds - timed.wait_s for timed in self.passes)


@dataclass(frozen=True, slots=True)
class GrowthPlan:
    """What to measure, checked before anything is loaded. Raises UsageError naming the option."""

    target: str | None
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    repeat: int = 3

    def __post_init__(self) -> None:
        check_integer("repeat", self.repeat, 1, 10_000)
        if self.memory.context is not None:
            check_room(self.memory.context)


@dataclass(frozen=True, slots=True)
class GrowthReport:
    """All that was measured, and on what. `memory_plan`: of the target that nodes and context grew on."""

    plan: GrowthPlan
    target: str
    device: str
    machine: Machine
    memory_plan: MemoryPlan | None
    points: list[GrowthPoint]
    interrupted: bool

    def of(self, question: Question) -> list[GrowthPoint]:
        """The points of one question, from small to large."""
        return sorted((p for p in self.points if p.question == question), key=lambda point: point.value)


def by_nodes(timer: PassTimer, repeat: int) -> list[GrowthPoint]:
    """All node counts in turn, `repeat` times, each time in another order."""
    counts, context = timer.node_counts, timer.short_context
    passes: dict[int, list[TimedPass]] = {count: [] for count in counts}
    timer.fill(context)
    for turn in schedule(len(counts), 1, repeat, 0):
        count = counts[turn.variant]
        passes[count].append(timer.measure(count))
    return [GrowthPoint("nodes", timer.streamed_bytes, count, context, tuple(passes[count])) for count in counts]


def by_context(timer: PassTimer, repeat: int) -> list[GrowthPoint]:
    """All lengths in turn, `repeat` times: up, which prefills, then down, which only truncates, and so on."""
    nodes = timer.few_nodes
    passes: dict[int, list[TimedPass]] = {length: [] for length in timer.contexts}
    for repetition in range(repeat):
        for length in timer.contexts[:: 1 if repetition % 2 == 0 else -1]:
            timer.fill(length)
            passes[length].append(timer.measure(nodes))
    return [
        GrowthPoint("context", timer.streamed_bytes, nodes, length, tuple(passes[length]))
        for length in timer.contexts
    ]


def by_bytes(timer: PassTimer, repeat: int) -> GrowthPoint:
    """`repeat` passes of the target as it is."""
    nodes, context = timer.few_nodes, timer.short_context
    timer.fill(context)
    passes = tuple(timer.measure(nodes) for _ in range(repeat))
    return GrowthPoint("bytes", timer.streamed_bytes, nodes, context, passes)


def measure_growth(plan: GrowthPlan, show_progress: bool, on_step: Step = lambda name: None) -> GrowthReport:
    """Measure nodes and context on the target as `plan.memory` says, bytes with several amounts pinned.

    One target is loaded at a time. show_progress is for downloads; on_step is called up to `NUM_STEPS` times.
    Ctrl-C ends it early with the questions that were answered. Raises the errors of `load_pair` and `PassTimer`.
    """
    points: list[GrowthPoint] = []
    interrupted, memory_plan = False, None
    try:
        with _loaded(plan, plan.memory, show_progress) as pair:
            memory_plan = pair.plan
            timer = PassTimer(pair)
            on_step("nodes")
            points += by_nodes(timer, plan.repeat)
            on_step("context")
            points += by_context(timer, plan.repeat)
            del timer  # it holds the target
            whole = None if plan.memory.pinned is not None else _bytes_point(plan, pair, SHARES[0], on_step)
        points += _over_amounts(plan, whole, on_step)
    except KeyboardInterrupt:
        if not points:
            raise
        interrupted = True
    return GrowthReport(
        plan, plan.target or DEFAULT_PRESET, device_name(), this_machine(), memory_plan, points, interrupted
    )


def _over_amounts(plan: GrowthPlan, whole: GrowthPoint | None, on_step: Step) -> list[GrowthPoint]:
    """The same passes with shares of what can be pinned; amounts that come to the same layers count once.

    whole: what was measured with all of it pinned; None: not yet.
    """

    def at(share: int, pinned: int | None) -> GrowthPoint:
        with _loaded(plan, replace(plan.memory, pinned=pinned)) as pair:
            return _bytes_point(plan, pair, share, on_step)

    most_pinned, *between, nothing = SHARES
    least, most = whole or at(most_pinned, None), at(nothing, 0)
    pinnable = most.streamed_bytes - least.streamed_bytes
    points = [least, *(at(share, pinnable * share // 100) for share in between), most]
    return list({point.streamed_bytes: point for point in points}.values())


def _bytes_point(plan: GrowthPlan, pair: LoadedPair, share: int, on_step: Step) -> GrowthPoint:
    on_step(f"{share}% pinned")
    return by_bytes(PassTimer(pair), plan.repeat)


@contextmanager
def _loaded(plan: GrowthPlan, memory: MemoryOptions, show_progress: bool = False) -> Iterator[LoadedPair]:
    pair = load_pair(plan.target, NO_DRAFT, show_progress, memory)
    try:
        yield pair
    finally:
        pair.release()
        release_free_memory()
