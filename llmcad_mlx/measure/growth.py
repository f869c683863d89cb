"""`bench --growth`: how the cost of one target pass grows with the bytes it reads, with the tree's nodes,
and with the context.

Times single passes of a loaded target over random trees of any size, after a context of any length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np

from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair, load_pair, release_free_memory
from llmcad_mlx.measure import output
from llmcad_mlx.measure.output import Origin, Report, Table, milliseconds, number
from llmcad_mlx.measure.runner import OnTurn
from llmcad_mlx.memory import MemoryPlan
from llmcad_mlx.prompt import encode_prompt
from llmcad_mlx.settings import MemoryOptions, check_integer
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import NO_DRAFT
from llmcad_mlx.store.pull import DEFAULT_PRESET
from llmcad_mlx.tree.token_tree import TokenTree

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (64, 256, 1024, 2048, 4096)
FEW_NODES, SHORT_CONTEXT = 16, 256  # what a tree and a cache have while something else grows
MIN_CONTEXT = 128  # with less room there is nothing to compare
PINNED_SHARES = (100, 75, 50, 25, 0)  # per cent of what can be pinned
NUM_STEPS = 2 + len(PINNED_SHARES)

_SEED = 0
_TEXT = "The tide comes in twice a day, and the fishermen know their hours by heart. "
_WORTH_IT = 1.5  # the longest context that fits is measured too where it is so much longer than the last

Question = Literal["bytes", "nodes", "context"]
QUESTIONS: tuple[Question, ...] = get_args(Question)


@dataclass(frozen=True, slots=True)
class TimedPass:
    """Seconds of one pass, and how many of them the computing thread waited for reads."""

    seconds: float
    wait_s: float


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
    def computing_s(self) -> float:
        """The median without the waits."""
        return median(timed.seconds - timed.wait_s for timed in self.passes)


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

    def fill(self, length: int) -> None:
        """Let the cache hold `length` tokens."""
        self._target.truncate(length)
        if missing := self._tokens[self._target.num_cached : length]:
            self._target.prefill(missing, lambda done: None, lambda: False)

    def measure(self, nodes: int) -> TimedPass:
        """One pass. It follows one of the same kind, unmeasured: a stream reads ahead during the pass before."""
        clock, tree = self._pair.clock, self._trees[nodes]
        self._target.verify(tree)
        started, waited = clock(), self._target.io_wait_s
        self._target.verify(tree)
        return TimedPass(clock() - started, self._target.io_wait_s - waited)

    def answer(self, question: Question, repeat: int) -> list[GrowthPoint]:
        """All kinds of passes of a question in turn, `repeat` times: up, then down, and so on. A longer context is
        prefilled, a shorter one only truncated."""
        counts = self.node_counts if question == "nodes" else [self.few_nodes]
        lengths = self.contexts if question == "context" else [self.short_context]
        kinds = [(nodes, context) for nodes in counts for context in lengths]
        passes: dict[tuple[int, int], list[TimedPass]] = {kind: [] for kind in kinds}
        for repetition in range(repeat):
            for nodes, context in kinds if repetition % 2 == 0 else reversed(kinds):
                self.fill(context)
                passes[nodes, context].append(self.measure(nodes))
        streamed = 0 if self._pair.plan is None else self._pair.plan.streamed_bytes
        return [GrowthPoint(question, streamed, *kind, tuple(timed)) for kind, timed in passes.items()]


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


@dataclass(slots=True)
class Growth:
    """What to measure, checked when built, and all that was measured. `memory_plan`: of the target that nodes and
    context grew on. Raises UsageError naming the option."""

    target: str | None
    memory: MemoryOptions
    repeat: int = 3
    memory_plan: MemoryPlan | None = None
    points: list[GrowthPoint] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        check_integer("repeat", self.repeat, 1, 10_000)
        if self.memory.context is not None:
            check_room(self.memory.context)

    def of(self, question: Question) -> list[GrowthPoint]:
        """The points of one question, from small to large."""
        return sorted((p for p in self.points if p.question == question), key=lambda point: point.value)

    def measure(self, show_progress: bool = False, on_turn: OnTurn = lambda name, total: None) -> None:
        """Measure nodes and context on the target as `memory` says, bytes with several amounts pinned.

        One target is loaded at a time. show_progress is for downloads; on_turn is called up to `NUM_STEPS` times.
        Ctrl-C ends it early with the questions that were answered. Raises the errors of `load_pair` and
        `PassTimer`.
        """
        try:
            with self._loaded(self.memory, show_progress) as pair:
                self.memory_plan = pair.plan
                self.points += self._answer(pair, "nodes", "nodes", on_turn)
                self.points += self._answer(pair, "context", "context", on_turn)
                label = f"{PINNED_SHARES[0]}% pinned"
                whole = self._answer(pair, "bytes", label, on_turn) if self.memory.pinned is None else []
            self.points += self._over_amounts(whole, on_turn)
        except KeyboardInterrupt:
            if not self.points:
                raise
            self.interrupted = True

    def _over_amounts(self, whole: list[GrowthPoint], on_turn: OnTurn) -> list[GrowthPoint]:
        """The same passes with shares of what can be pinned; amounts that come to the same layers count once.

        whole: what was measured with all of it pinned; []: not yet.
        """

        def at(percent: int, pinned: int | None) -> list[GrowthPoint]:
            with self._loaded(replace(self.memory, pinned=pinned)) as pair:
                return self._answer(pair, "bytes", f"{percent}% pinned", on_turn)

        most_pinned, *between, nothing = PINNED_SHARES
        points = [*(whole or at(most_pinned, None)), *at(nothing, 0)]
        pinnable = points[1].streamed_bytes - points[0].streamed_bytes
        for percent in between:
            points += at(percent, pinnable * percent // 100)
        return list({point.streamed_bytes: point for point in points}.values())

    def _answer(self, pair: LoadedPair, question: Question, label: str, on_turn: OnTurn) -> list[GrowthPoint]:
        on_turn(label, NUM_STEPS)
        return PassTimer(pair).answer(question, self.repeat)

    @contextmanager
    def _loaded(self, memory: MemoryOptions, show_progress: bool = False) -> Iterator[LoadedPair]:
        pair = load_pair(self.target, NO_DRAFT, show_progress, memory)
        try:
            yield pair
        finally:
            pair.release()
            release_free_memory()


# -- report ----------------------------------------------------------------------------------------------


def growth_report(done: Growth, argv: Sequence[str]) -> Report:
    """A table and a picture for each question; in the document all passes: bytes in bytes, times in seconds."""
    origin, notes, rate = Origin(argv), _notes(done), done.memory.read_bandwidth
    answered = [question for question in QUESTIONS if done.of(question)]
    target = done.target or DEFAULT_PRESET
    document = {
        **origin.to_json(),
        "target": target,
        "options": {"repeat": done.repeat, **asdict(done.memory)},
        "emulated": rate is not None,
        "memory_plan": None if done.memory_plan is None else asdict(done.memory_plan),
        "interrupted": done.interrupted,
        "notes": notes,
        "points": [
            {**asdict(point), **figures}
            for question in answered
            for point, figures in zip(done.of(question), _figures(done, question), strict=True)
        ],
    }
    return Report(
        "growth",
        [_table(done, question) for question in answered],
        notes,
        document,
        heading=f"# {target}\n\n{origin.to_markdown()}",
        draw=partial(_draw, done, f"{target}{output.emulated_rate(rate, ', reads ')}"),
        interrupted=done.interrupted,
    )


def _figures(done: Growth, question: Question) -> list[dict[str, float | None]]:
    """What a question's points come to. `predicted_s`: what reading alone takes at the emulated rate."""
    points, rate = done.of(question), done.memory.read_bandwidth
    first = median(points[0].seconds)
    return [
        {
            "median_s": median(point.seconds),
            "min_s": min(point.seconds),
            "max_s": max(point.seconds),
            "computing_s": point.computing_s,
            "ratio_to_first": output.share(median(point.seconds), first),
            "predicted_s": None if rate is None else point.streamed_bytes / rate,
        }
        for point in points
    ]


def _table(done: Growth, question: Question) -> Table:
    points, rows = done.of(question), []
    read, nodes, context = _fixed(points[0]).values()
    title, name = {
        "bytes": (f"bytes read, {nodes} after {context}", "streamed"),
        "nodes": (f"nodes, after {context}, {read}", "nodes"),
        "context": (f"tokens in the cache, {nodes}, {read}", "context"),
    }[question]
    for point, figures in zip(points, _figures(done, question), strict=True):
        row = {
            name: format_size(point.value) if question == "bytes" else str(point.value),
            "median, ms": milliseconds(figures["median_s"], suffix=""),
            "min, ms": milliseconds(figures["min_s"], suffix=""),
            "max, ms": milliseconds(figures["max_s"], suffix=""),
            "× first": number(figures["ratio_to_first"], 2),
            "computing, ms": milliseconds(figures["computing_s"], suffix=""),
        }
        if question == "bytes" and done.memory.read_bandwidth is not None:
            row["bytes/rate, ms"] = milliseconds(figures["predicted_s"], suffix="")
        rows.append(row)
    return Table.of(f"One target pass by {title}", rows)


def _fixed(point: GrowthPoint) -> dict[Question, str]:
    """What a point has of each, in words."""
    return {
        "bytes": f"{format_size(point.streamed_bytes)} read",
        "nodes": "1 node" if point.nodes == 1 else f"{point.nodes} nodes",
        "context": f"{point.context} tokens",
    }


def _notes(done: Growth) -> list[str]:
    """What a reader of the figures must know."""
    notes = [
        f"{'1 measured pass' if done.repeat == 1 else f'{done.repeat} measured passes'} a line, each after one of "
        "the same kind. Random trees of a fixed seed, the cache filled with a text that repeats itself. Node "
        "counts and contexts take turns; of streamed bytes one amount after the other is loaded and measured.",
        "A pass takes the longer of reading and computing: where computing is longer, more bytes cost nothing. "
        "Computing: the median without the seconds that the processor had nothing to do while weights loaded; "
        "what reading takes of the processor is in it. "
        + (
            f"Reads are {output.emulated_rate(done.memory.read_bandwidth)}; all times are emulated."
            if done.memory.read_bandwidth is not None
            else "Reads may be served from the system's page cache, which is faster than the disk."
        ),
    ]
    if len(done.of("bytes")) == 1:
        notes.append("All amounts that fit come to the same bytes per pass: there is nothing to compare.")
    if done.interrupted:
        missing = [question for question in QUESTIONS if not done.of(question)]
        notes.append(f"Interrupted: not measured: {', '.join(missing)}.")
    return notes


def _draw(done: Growth, subtitle: str, folder: Path) -> None:
    """Milliseconds of a pass, a panel for each question with several points; without any, an earlier plot goes."""
    file, figure = folder / "growth.png", output.new_figure("Time of one target pass", subtitle)
    drawn = [question for question in QUESTIONS if len(done.of(question)) > 1]
    if not drawn:
        file.unlink(missing_ok=True)
        return
    figure.set_size_inches(0.8 + 3.4 * len(drawn), 3.8)
    for axes, question in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        _draw_question(axes, done, question)
    output.legend_below(figure)
    figure.savefig(file, dpi=150)


def _draw_question(axes: Any, done: Growth, question: Question) -> None:
    points, figures = done.of(question), _figures(done, question)
    x = [point.value / (1e6 if question == "bytes" else 1.0) for point in points]
    names = ("median_s", "min_s", "max_s", "computing_s", "predicted_s")
    y, low, high, computing, bound = ([1e3 * (line[name] or 0.0) for line in figures] for name in names)
    spread = [[a - b for a, b in zip(*pair, strict=True)] for pair in ((y, low), (high, y))]
    axes.errorbar(
        x, y, spread, fmt="o-", color=output.BLUE, ecolor="black", capsize=3, markersize=4,
        label="measured: median, min to max",
    )  # fmt: skip
    if computing != y:
        axes.plot(x, computing, "s:", color=output.SKY, markersize=4, label="computing: waits left out")
    most = max(high)
    if question == "bytes" and any(bound):
        axes.plot(x, bound, "--", color=output.ORANGE, label="bytes / rate")
        most = max(*high, *bound)
    axes.set_title(", ".join(text for name, text in _fixed(points[0]).items() if name != question), fontsize=9)
    labels = {"bytes": "read per pass, MB", "nodes": "nodes", "context": "tokens in the cache"}
    axes.set(xlabel=labels[question], ylabel="ms per pass", xlim=(0, 1.05 * max(x)), ylim=(0, 1.1 * most))
    axes.grid(alpha=0.3)
