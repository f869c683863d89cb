"""Reading, computing and drafting really overlap: shown on a simulated clock, without threads or sleeps.

A unit takes r seconds to read and c to compute with, a pass has n units, b buffers hold what was read ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.engine.round import Round
from llmcad_mlx.policy import Candidates, ChainPolicy, GrowthPolicy
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.streaming.modules import SequentialFeed
from llmcad_mlx.tree.token_tree import TokenTree
from llmcad_mlx.verifying import Target
from tests.support.rounds import PROMPT, Rounds, sampler_of
from tests.support.simulated_stream import SimulatedClock, SimulatedStream, simulated_target
from tests.support.tiny import VOCAB, tiny_tree_model

PASSES = 5
BYTES = 1000


@dataclass
class Run:
    """Some passes, and how many draft steps they had time for."""

    stream: SimulatedStream
    steps: int = 0

    @property
    def total_s(self) -> float:
        return self.stream.clock.now


def run(
    unit_bytes: Sequence[int],
    num_buffers: int,
    compute_s: Sequence[float],
    step_s: float | None = None,
    bytes_per_s: float = BYTES,
    heedless: bool = False,
) -> Run:
    """PASSES passes, with draft steps of `step_s` if given; heedless ones do not care how much time is free."""
    clock = SimulatedClock()
    done = Run(SimulatedStream(unit_bytes, num_buffers, bytes_per_s, clock))
    feed = SequentialFeed(done.stream, len(unit_bytes), clock)

    def step(seconds: float) -> bool:
        assert step_s is not None
        if step_s > seconds and not heedless:
            return False
        clock.now += step_s
        done.steps += 1
        return True

    for _ in range(PASSES):
        with feed.working(None if step_s is None else step):
            for unit, seconds in enumerate(compute_s):
                feed.take(unit)
                clock.now += seconds
                feed.give_back()
    return done


def even(read_s: float, compute_s: float, num_buffers: int, step_s: float | None = None, units: int = 8) -> Run:
    """All units are of one size."""
    return run([BYTES] * units, num_buffers, [compute_s] * units, step_s, BYTES / read_s)


def assert_reader_never_idles(stream: SimulatedStream, num_buffers: int) -> None:
    """Each read begins when the one before has ended and a buffer is free, and not a moment later."""
    for number, read in enumerate(stream.busy):
        before = stream.busy[number - 1].end if number else 0.0
        freed = stream.released[number - num_buffers] if number >= num_buffers else 0.0
        assert read.start == max(before, freed)
        assert read.unit == number % len(stream.unit_bytes)


uneven_units = st.lists(st.tuples(st.integers(1, 20_000), st.floats(0.01, 20.0)), min_size=1, max_size=9)


# -- passes ------------------------------------------------------------------------------------------------


@given(uneven_units, st.integers(1, 5))
def test_units_of_any_sizes_come_as_early_as_the_buffers_allow(
    units: list[tuple[int, float]], num_buffers: int
) -> None:
    """A read waits for the reader and a buffer, a computation for its unit and the one before."""
    unit_bytes, compute_s = [size for size, _ in units], [seconds for _, seconds in units]
    done = run(unit_bytes, num_buffers, compute_s)
    read_at, free_at = 0.0, []
    computed = 0.0
    for number in range(PASSES * len(units)):
        size, seconds = units[number % len(units)]
        freed = free_at[number - num_buffers] if number >= num_buffers else 0.0
        read_at = max(read_at, freed) + size / BYTES
        computed = max(read_at, computed) + seconds
        free_at.append(computed)
    assert done.total_s == pytest.approx(computed)
    assert done.stream.wait_s == pytest.approx(computed - PASSES * sum(compute_s))
    assert_reader_never_idles(done.stream, num_buffers)
    assert done.total_s >= PASSES * max(sum(unit_bytes) / BYTES, sum(compute_s)) * (1 - 1e-9)
    assert [taken.unit for taken in done.stream.taken] == [*range(len(units))] * PASSES


# -- drafting while layers load ----------------------------------------------------------------------------


@given(
    st.floats(0.1, 20.0), st.floats(0.1, 20.0), st.integers(1, 5), st.floats(0.05, 60.0), st.integers(1, 9)
)  # fmt: skip
def test_no_pass_takes_longer_for_the_drafting_beside_it(
    read_s: float, compute_s: float, num_buffers: int, step_s: float, units: int
) -> None:
    plain = even(read_s, compute_s, num_buffers, units=units)
    drafting = even(read_s, compute_s, num_buffers, step_s, units=units)
    assert drafting.total_s <= plain.total_s * (1 + 1e-9)
    busy = PASSES * units * compute_s + drafting.steps * step_s
    assert drafting.total_s == pytest.approx(busy + drafting.stream.wait_s)
    if step_s <= read_s - compute_s:  # it fits into each wait but, at most, the last
        assert drafting.steps >= PASSES * units - 1


@pytest.mark.parametrize(("num_buffers", "step_s"), [(2, 6.0), (3, 12.0), (5, 25.0)])
def test_long_steps_are_taken_where_buffers_hide_them(num_buffers: int, step_s: float) -> None:
    """A step longer than the wait for one layer delays that layer; what was read meanwhile makes up for it."""
    done = even(10.0, 2.0, num_buffers, step_s)
    assert done.steps * step_s > 0.2 * done.total_s
    assert done.total_s == even(10.0, 2.0, num_buffers).total_s


@given(uneven_units, st.integers(1, 5), st.floats(0.05, 40.0), st.booleans())
def test_no_layer_that_is_there_waits_for_more_than_one_step(
    units: list[tuple[int, float]], num_buffers: int, step_s: float, heedless: bool
) -> None:
    """Heedless steps are those that read a prompt: what is not done now must be done afterwards."""
    done = run([size for size, _ in units], num_buffers, [s for _, s in units], step_s, heedless=heedless)
    for taken in done.stream.taken:
        assert taken.had - max(taken.asked, taken.arrived) <= step_s * (1 + 1e-9)
    assert_reader_never_idles(done.stream, num_buffers)
    if heedless:
        assert done.stream.wait_s == 0.0  # there was always something to do


# -- whole rounds ------------------------------------------------------------------------------------------


class TimedDrafter(ModelDrafter):
    """Its steps take `step_s` each, its reading of a prompt a hundredth of that a token."""

    def __init__(self, clock: SimulatedClock, step_s: float, noise: float = 0.02) -> None:
        super().__init__(tiny_tree_model(0, cpu_kernels=False, layers=4, noise=noise))
        self.clock, self.step_s = clock, step_s

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        proposals = super().expand(tree, leaves)
        if self.rows_fed != 0:
            self.clock.now += self.step_s
        return proposals

    def prefill(self, tokens: Sequence[int], *watched: Any, limit: int | None = None) -> bool:
        self.clock.now += 0.01 * self.step_s * len(tokens[self.cache.length : -1][:limit])
        return super().prefill(tokens, *watched, limit=limit)


POLICIES: dict[str, Callable[[CostModel], GrowthPolicy]] = {
    "plain": lambda costs: ChainPolicy(0),
    "without pipeline": lambda costs: ThroughputPolicy(costs, Calibration(), tree_nodes=6, pipelined=False),
    "forced": lambda costs: ThroughputPolicy(costs, Calibration(), tree_nodes=6),
    "adaptive": lambda costs: ThroughputPolicy(costs, Calibration()),
}


def engine_of(target: Target, clock: SimulatedClock, step_s: float, policy: str) -> Rounds:
    costs = CostModel()
    drafters = [] if policy == "plain" else [TimedDrafter(clock, step_s)]
    return Rounds(target, drafters, POLICIES[policy](costs), costs, clock)


def rounds(engine: Rounds, stats: GenerationStats, count: int, seed: int = 3) -> list[Round]:
    return [engine.round(sampler_of(0.7, seed), stats) for _ in range(count)]


def stream_of(target: Target) -> SimulatedStream:
    stream = target.feed.stream
    assert isinstance(stream, SimulatedStream)
    return stream


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_buffers", [2, 3])
@pytest.mark.parametrize(("read_s", "row_s"), [(10.0, 0.2), (10.0, 2.0), (2.0, 3.0)])
def test_rounds_follow_the_cost_model(read_s: float, row_s: float, num_buffers: int, policy: str) -> None:
    """tokens/s = A / (max(W/B, C(N)) + D): what a round takes is its pass and the drafting in front of it."""
    clock = SimulatedClock()
    target = simulated_target(clock, num_buffers=num_buffers, read_s=read_s, row_s=row_s)
    engine = engine_of(target, clock, 1.5, policy)
    stats, units = GenerationStats(), len(stream_of(target).unit_bytes)
    engine.begin(PROMPT, stats)
    begun, read, passes = clock.now, stream_of(target).bytes_read, []
    engine.costs.observe_pass = lambda rows, seconds, busy: passes.append(seconds)  # type: ignore[method-assign]
    for _ in range(20):
        before, started = replace(stats), clock.now
        (done,) = rounds(engine, stats, 1)
        computing = units * row_s * len(done.selection.tree)
        hidden = stats.hidden_draft_s - before.hidden_draft_s
        in_front = stats.draft_s - before.draft_s - hidden
        waiting = stats.io_wait_s - before.io_wait_s
        assert stats.verify_s - before.verify_s == pytest.approx(computing)
        assert clock.now - started == pytest.approx(in_front + hidden + waiting + computing)
        # A pass takes what it takes, hidden drafting included: that stands where waiting stood.
        pass_s = clock.now - started - in_front
        assert passes[-1] == pytest.approx(pass_s)
        # Filling the pipeline: the first unit is read before, the last computed with after, all else overlaps.
        fill = read_s + computing / units
        assert pass_s <= max(units * read_s, computing) + fill + 1e-6
        if hidden == waiting == 0.0:
            assert pass_s == pytest.approx(computing)
    passes_s = clock.now - begun - (stats.draft_s - stats.hidden_draft_s)
    assert stats.decode_s == pytest.approx(clock.now - begun)
    assert stats.streamed_bytes == stream_of(target).bytes_read - read
    read_before = num_buffers * read_s
    assert passes_s + (stats.draft_s - stats.hidden_draft_s) >= 20 * units * read_s - read_before - 1e-6
    if policy in ("plain", "without pipeline"):
        assert stats.hidden_draft_s == 0.0
    elif policy == "forced" and read_s > 10 * row_s:
        assert stats.hidden_draft_s > stats.draft_s - stats.hidden_draft_s > 0.0


def test_the_pipeline_makes_rounds_shorter_by_what_it_hides() -> None:
    """Where reading takes longer, hidden drafting makes no pass longer, and less is left to do before it."""
    taken, in_front, tokens = {}, {}, {}
    for policy in ("plain", "without pipeline", "forced"):
        clock = SimulatedClock()
        engine = engine_of(simulated_target(clock), clock, 8.0, policy)
        stats = GenerationStats()
        engine.begin(PROMPT, stats)
        rounds(engine, stats, 20)
        taken[policy], tokens[policy] = stats.decode_s, stats.generated_tokens
        in_front[policy] = stats.draft_s - stats.hidden_draft_s
    assert taken["forced"] - in_front["forced"] <= taken["plain"] + 1e-6
    assert in_front["forced"] < 0.9 * in_front["without pipeline"]
    assert tokens["forced"] / taken["forced"] > tokens["without pipeline"] / taken["without pipeline"]
    assert tokens["without pipeline"] / taken["without pipeline"] > tokens["plain"] / taken["plain"]


@settings(max_examples=5, deadline=None)
@given(st.floats(0.01, 50.0), st.floats(0.001, 5.0), st.floats(0.001, 50.0), st.integers(1, 5))
def test_the_text_does_not_depend_on_the_timing(
    read_s: float, row_s: float, step_s: float, num_buffers: int
) -> None:
    """Nor does what is read and submitted, unless drafting in the background decides about it."""
    expected, _ = in_memory("plain", 30)
    trees: list[list[int]] = []
    for policy in ("adaptive", "forced", "without pipeline"):
        clock = SimulatedClock()
        target = simulated_target(clock, num_buffers=num_buffers, read_s=read_s, row_s=row_s)
        engine, stats = engine_of(target, clock, step_s, policy), GenerationStats()
        engine.begin(PROMPT, stats)
        done = rounds(engine, stats, 10)
        generated = engine.tokens[len(PROMPT) :][:30]
        assert generated == expected[: len(generated)]
        assert len(generated) >= 10
        units = len(stream_of(target).unit_bytes)
        assert [taken.unit for taken in stream_of(target).taken] == [*range(units - 1), *[*range(units)] * 10]
        trees = [one.selection.tree.tokens for one in done]
    assert trees == in_memory("without pipeline", 10)[1]


@functools.cache
def in_memory(policy: str, num_rounds: int) -> tuple[list[int], list[list[int]]]:
    """What the same target in memory says, and the trees it is given."""
    target, clock = Target(tiny_tree_model(0, cpu_kernels=False, layers=4), VOCAB), SimulatedClock()
    engine = engine_of(target, clock, 1.0, policy)
    engine.begin(PROMPT)
    trees = [done.selection.tree.tokens for done in rounds(engine, GenerationStats(), num_rounds)]
    return engine.tokens[len(PROMPT) :], trees


# -- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["plain", "forced"])
@pytest.mark.parametrize(("read_s", "row_s"), [(10.0, 0.01), (2.0, 3.0)], ids=["reading", "computing"])
def test_a_prompt_reads_the_weights_once_a_chunk(read_s: float, row_s: float, policy: str) -> None:
    prompt = [(7 * i) % VOCAB for i in range(101)]  # 100 tokens before the root: 7 chunks of 16, the last of 4
    clock = SimulatedClock()
    target = simulated_target(clock, read_s=read_s, row_s=row_s)
    stream, step_s = stream_of(target), 3.0
    engine = engine_of(target, clock, step_s, policy)
    engine.begin(prompt)
    layers = len(stream.unit_bytes) - 1
    assert [taken.unit for taken in stream.taken] == [*range(layers)] * 7
    reads = [interval for interval in stream.busy if not interval.dropped and interval.end <= clock.now]
    for layer in range(layers):
        ahead = layer < 3  # what the buffers hold of the first pass of decoding
        assert sum(interval.unit == layer for interval in reads) in (7, 8 if ahead else 7)
    # The head is not used; while the last layer is computed with it may be read, a buffer's worth.
    assert sum(interval.unit == layers for interval in reads) <= 7
    longer = max(7 * layers * read_s, 100 * layers * row_s)
    drafting = 0.0 if policy == "plain" else 0.01 * step_s * 100
    # Each chunk fills the pipeline anew.
    fill = 7 * (read_s + 16 * row_s)
    assert longer - 1e-6 <= clock.now <= longer + fill + drafting + 1e-6


def test_after_a_prompt_the_first_layers_are_read_at_once() -> None:
    """Not only when the first pass asks for them: the draft works in between."""
    clock = SimulatedClock()
    target = simulated_target(clock)
    stream = stream_of(target)
    target.prefill(PROMPT)
    ended = clock.now
    clock.now += 1000.0
    assert stream.ready()
    first = next(interval for interval in stream.busy if interval.start >= ended)
    assert (first.unit, first.start) == (0, ended)
    assert [interval.unit for interval in stream.busy if interval.start >= ended] == [0, 1, 2]


def test_a_draft_reads_the_prompt_in_the_time_of_loading() -> None:
    prompt = [(7 * i) % VOCAB for i in range(101)]
    seconds = {}
    for policy in ("plain", "without pipeline", "forced"):
        clock = SimulatedClock()
        engine = engine_of(simulated_target(clock), clock, 50.0, policy)
        engine.begin(prompt)
        seconds[policy] = clock.now
    whole = 50.0 * 0.01 * 100
    assert seconds["without pipeline"] == pytest.approx(seconds["plain"] + whole)
    assert seconds["forced"] <= seconds["plain"] + 0.5 * whole
