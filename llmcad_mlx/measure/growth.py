"""`bench --growth`: what a target pass costs by bytes read, nodes and context, measured with random trees.
`bench --kernels`: what a 4-bit matrix multiplication costs by rows, on MLX's kernels and ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np
from mlx.nn.layers.quantized import QuantizedLinear

from llmcad_mlx.cpu import cpu_kernels_wanted, prepare_for_device
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair, load_pair, release_free_memory
from llmcad_mlx.measure import output
from llmcad_mlx.measure.output import NOTHING, Plot, Report, Table, milliseconds, number
from llmcad_mlx.measure.runner import OnTurn, until_interrupted
from llmcad_mlx.memory import MemoryPlan
from llmcad_mlx.prompt import encode_prompt
from llmcad_mlx.settings import MemoryOptions, check_integer
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import DEFAULT_PRESET, NO_DRAFT, device_name
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


class PassTimer:
    """Times passes of one loaded target over random trees, after a text that repeats itself."""

    def __init__(self, pair: LoadedPair) -> None:
        """Raises UsageError where the target has no room for a context to grow in."""
        self._pair, self._target = pair, pair.target
        kind = pair.target.cache.capability
        self.few_nodes = 1 if kind == "plain" else min(FEW_NODES, pair.max_nodes)
        room = pair.context_length or CONTEXTS[-1] + self.few_nodes
        check_room(room)
        most = room - self.few_nodes
        self.contexts = [length for length in CONTEXTS if length <= most]
        if len(self.contexts) < len(CONTEXTS) and most > self.contexts[-1] * _WORTH_IT:
            self.contexts.append(most)
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
        if missing := self._tokens[self._target.cache.length : length]:
            self._target.prefill(missing)

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
        points = (point for point in self.points if point.question == question)
        return sorted(points, key=lambda point: (point.streamed_bytes, point.nodes, point.context))

    def measure(self, show_progress: bool = False, on_turn: OnTurn = lambda name, total: None) -> None:
        """Measure nodes and context on the target as `memory` says, bytes with several amounts pinned, one target
        loaded at a time. show_progress is for downloads; on_turn is called up to `NUM_STEPS` times. Ctrl-C ends it
        early with the questions that were answered. Raises the errors of `load_pair` and `PassTimer`."""
        self.interrupted = until_interrupted(self._answers(show_progress, on_turn), self.points)

    def _answers(self, show_progress: bool, on_turn: OnTurn) -> Iterator[list[GrowthPoint]]:
        def answer(pair: LoadedPair, question: Question, label: str) -> list[GrowthPoint]:
            on_turn(label, NUM_STEPS)
            return PassTimer(pair).answer(question, self.repeat)

        def with_pinned(percent: int, pinned: int | None) -> list[GrowthPoint]:
            with self._loaded(replace(self.memory, pinned=pinned)) as pair:
                return answer(pair, "bytes", f"{percent}% pinned")

        most_pinned, *between, nothing = PINNED_SHARES
        whole: list[GrowthPoint] = []
        with self._loaded(self.memory, show_progress) as pair:
            self.memory_plan = pair.plan
            yield answer(pair, "nodes", "nodes")
            yield answer(pair, "context", "context")
            if self.memory.pinned is None:
                whole = answer(pair, "bytes", f"{most_pinned}% pinned")
        points = [*(whole or with_pinned(most_pinned, None)), *with_pinned(nothing, 0)]
        pinnable = points[1].streamed_bytes - points[0].streamed_bytes
        for percent in between:
            points += with_pinned(percent, pinnable * percent // 100)
        # Amounts that come to the same layers count once.
        yield list({point.streamed_bytes: point for point in points}.values())

    @contextmanager
    def _loaded(self, memory: MemoryOptions, show_progress: bool = False) -> Iterator[LoadedPair]:
        pair = load_pair(self.target, NO_DRAFT, show_progress, memory)
        try:
            yield pair
        finally:
            pair.release()
            release_free_memory()


def growth_report(done: Growth) -> Report:
    """A table and a picture for each question; in the document all passes: bytes in bytes, times in seconds."""
    rate, target = done.memory.read_bandwidth, done.target or DEFAULT_PRESET
    answered = {question: _figures(done, question) for question in QUESTIONS if done.of(question)}
    document = {
        "target": target,
        "options": {"repeat": done.repeat, **asdict(done.memory)},
        "memory_plan": None if done.memory_plan is None else asdict(done.memory_plan),
        "points": [figures for found in answered.values() for figures in found],
    }
    drawn = {question: found for question, found in answered.items() if len(found) > 1}
    return Report.of_runs(
        "growth",
        target,
        rate,
        [_table(question, found) for question, found in answered.items()],
        _notes(done),
        document,
        plots=[Plot("growth", "Time of one target pass", partial(_draw, drawn) if drawn else None)],
        interrupted=done.interrupted,
    )


def _figures(done: Growth, question: Question) -> list[dict[str, Any]]:
    """A question's points, and what they come to. `computing_s`: the median without the waits; `predicted_s`: what
    reading alone takes at the emulated rate."""
    points, rate = done.of(question), done.memory.read_bandwidth
    seconds = [[timed.seconds for timed in point.passes] for point in points]
    return [
        {
            **asdict(point),
            "median_s": median(taken),
            "min_s": min(taken),
            "max_s": max(taken),
            "computing_s": median(timed.seconds - timed.wait_s for timed in point.passes),
            "ratio_to_first": output.share(median(taken), median(seconds[0])),
            "predicted_s": None if rate is None else point.streamed_bytes / rate,
        }
        for point, taken in zip(points, seconds, strict=True)
    ]


def _table(question: Question, found: Sequence[dict[str, Any]]) -> Table:
    read, nodes, context = _in_words(found[0]).values()
    title, name = {
        "bytes": (f"bytes read, {nodes} after {context}", "streamed"),
        "nodes": (f"nodes, after {context}, {read}", "nodes"),
        "context": (f"tokens in the cache, {nodes}, {read}", "context"),
    }[question]
    ms, rows = partial(milliseconds, suffix=""), []
    for point in found:
        row = {
            name: format_size(point["streamed_bytes"]) if question == "bytes" else str(point[question]),
            "median, ms": ms(point["median_s"]),
            "min, ms": ms(point["min_s"]),
            "max, ms": ms(point["max_s"]),
            "× first": number(point["ratio_to_first"], 2),
            "computing, ms": ms(point["computing_s"]),
        }
        if question == "bytes" and point["predicted_s"] is not None:
            row["bytes/rate, ms"] = ms(point["predicted_s"])
        rows.append(row)
    return Table.of(f"One target pass by {title}", rows)


def _in_words(point: dict[str, Any]) -> dict[Question, str]:
    return {
        "bytes": f"{format_size(point['streamed_bytes'])} read",
        "nodes": "1 node" if point["nodes"] == 1 else f"{point['nodes']} nodes",
        "context": f"{point['context']} tokens",
    }


def _notes(done: Growth) -> list[str]:
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


def _draw(answered: dict[Question, list[dict[str, Any]]], figure: Any) -> None:
    figure.set_size_inches(0.8 + 3.4 * len(answered), 3.8)
    panels = figure.subplots(1, len(answered), squeeze=False)[0]
    for axes, (question, found) in zip(panels, answered.items(), strict=True):
        x = [point["streamed_bytes"] / 1e6 if question == "bytes" else point[question] for point in found]
        names = ("median_s", "min_s", "max_s", "computing_s", "predicted_s")
        y, low, high, computing, bound = ([1e3 * (point[name] or 0.0) for point in found] for name in names)
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
        axes.set_title(
            ", ".join(text for name, text in _in_words(found[0]).items() if name != question), fontsize=9
        )
        labels = {"bytes": "read per pass, MB", "nodes": "nodes", "context": "tokens in the cache"}
        axes.set(xlabel=labels[question], ylabel="ms per pass", xlim=(0, 1.05 * max(x)), ylim=(0, 1.1 * most))
        axes.grid(alpha=0.3)
    output.legend_below(figure)


ROWS = (1, 2, 4, 6, 8, 12, 16, 32, 64, 128)
DENSE_ROWS = (1, 4, 16)  # the reference BLAS behind it is slow
OUT_FEATURES, IN_FEATURES = 8192, 2048
GROUP_SIZE, BITS = 64, 4
MLX_QUANTIZED, MLX_DENSE, OURS = "MLX 4-bit", "MLX dense", "ours 4-bit"


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel at one row count: median milliseconds, and the largest error as a share of the largest value
    of the product in float64."""

    kernel: str
    rows: int
    ms: float
    error: float


def time_kernels(
    rows: Sequence[int] = ROWS, repeat: int = 3, shape: tuple[int, int] = (OUT_FEATURES, IN_FEATURES)
) -> list[KernelTime]:
    """Time all kernels in turn, `repeat` times all row counts, in float32. shape: (output, input) features."""
    rng = np.random.default_rng(0)
    weight = mx.array(rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(shape[1])))
    packed = mx.quantize(weight, GROUP_SIZE, BITS)
    dense = mx.dequantize(*packed, GROUP_SIZE, BITS)
    mx.eval(dense)
    kernels = _kernels(packed, dense)
    inputs = {count: mx.array(rng.standard_normal((count, shape[1]), dtype=np.float32)) for count in rows}
    seconds: dict[tuple[str, int], list[float]] = {}
    for name, matmul in kernels.items():  # warm up; ours also loads a compiled kernel for each kind of row count
        for count in rows if name == OURS else rows[:1]:
            mx.eval(matmul(inputs[count]))
    for _ in range(repeat):
        for count in rows:
            for name, matmul in kernels.items():
                if name != MLX_DENSE or count in DENSE_ROWS:
                    started = time.perf_counter()
                    mx.eval(matmul(inputs[count]))
                    seconds.setdefault((name, count), []).append(time.perf_counter() - started)
    exact = np.asarray(dense, np.float64)
    found = []
    for (name, count), times in seconds.items():
        reference = np.asarray(inputs[count], np.float64) @ exact.T
        error = np.abs(np.asarray(kernels[name](inputs[count])) - reference).max() / np.abs(reference).max()
        found.append(KernelTime(name, count, 1e3 * median(times), float(error)))
    return found


def _kernels(
    packed: tuple[mx.array, mx.array, mx.array], dense: mx.array
) -> dict[str, Callable[[mx.array], mx.array]]:
    """The kernels by name; ours is a layer as models use it. packed: as `mx.quantize` gives them; dense (N, K):
    the same weight in float32."""
    kernels: dict[str, Callable[[mx.array], mx.array]] = {
        MLX_QUANTIZED: lambda x: mx.quantized_matmul(x, *packed, transpose=True, group_size=GROUP_SIZE, bits=BITS),
        MLX_DENSE: lambda x: x @ dense.T,
    }
    if cpu_kernels_wanted():
        num_out, num_in = dense.shape
        layer = QuantizedLinear(num_in, num_out, False, GROUP_SIZE, BITS)
        layer.weight, layer.scales, layer.biases = packed
        prepare_for_device(layer)
        kernels[OURS] = layer
    return kernels


def kernel_report(times: Sequence[KernelTime]) -> Report:
    """Every time in the document; a table with a line per row count, milliseconds and their ratio to one row for
    each kernel, and with the largest errors last."""
    subject = f"A {OUT_FEATURES}×{IN_FEATURES} matrix, 4 bits in groups of {GROUP_SIZE}"
    notes = [
        f"{subject}, float32 activations, on {device_name()}. Errors are relative to the largest value of the "
        "product in float64."
    ]
    if not cpu_kernels_wanted():
        notes.append("Our kernels are for Linux CPUs only; on this device models run on MLX's own.")
    found = {(entry.kernel, entry.rows): entry.ms for entry in times}
    header, last = ["rows"], ["largest error"]
    rows = {entry.rows: [str(entry.rows)] for entry in times}
    for name in dict.fromkeys(entry.kernel for entry in times):
        header += [f"{name}, ms", "× 1 row"]
        last += [f"{max(entry.error for entry in times if entry.kernel == name):.0e}", NOTHING]
        for count, row in rows.items():
            ms, one = found.get((name, count)), found.get((name, 1))
            row += [number(ms), number(ms / one if ms is not None and one else None)]
    table = Table("float32 times one 4-bit matrix", tuple(header), (*map(tuple, rows.values()), tuple(last)))
    document = {"times": [asdict(entry) for entry in times]}
    return Report.of_runs("kernels", subject, None, [table], notes, document)
