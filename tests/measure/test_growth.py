"""`bench --growth`, `--kernels`: what is measured, and what is made of it. Tiny models, no time is asserted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair, load_pair
from llmcad_mlx.measure import growth
from llmcad_mlx.measure.growth import (
    NODES,
    PINNED_SHARES,
    Growth,
    GrowthPoint,
    PassTimer,
    TimedPass,
    growth_report,
    random_tree,
)
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.names import NO_DRAFT
from tests.measure.runs import drawn
from tests.support.tiny_folder import make_folder

pytestmark = pytest.mark.usefixtures("tiny_home", "streams_small_matrices")

CONTEXT = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama", layers=6, context=CONTEXT)


@contextmanager
def loaded(folder: Path, **memory: Any) -> Iterator[LoadedPair]:
    pair = load_pair(str(folder), NO_DRAFT, False, MemoryOptions(**memory))
    yield pair
    pair.release()


def made_up(rate: float | None = 100e6, interrupted: bool = False) -> Growth:
    points = [
        GrowthPoint("bytes", num_bytes, 16, 256, tuple(TimedPass(s, 0.1) for s in seconds))
        for num_bytes, seconds in ((30_000_000, (0.9, 0.5, 0.4)), (0, (0.2, 0.3, 0.25)))
    ]
    if not interrupted:
        points += [GrowthPoint("nodes", 0, count, 256, (TimedPass(0.1 * count, 0.0),)) for count in (1, 2)]
        points += [GrowthPoint("context", 0, 16, length, (TimedPass(0.1, 0.0),)) for length in (64, 256)]
    return Growth("tiny", MemoryOptions(read_bandwidth=rate), points=points, interrupted=interrupted)


def test_every_question_gets_all_its_points_with_a_pass_for_each_repetition(folder: Path) -> None:
    """Everything in memory as given: nodes and context grow without reads."""
    measured = Growth(str(folder), MemoryOptions(read_bandwidth=1e9))
    measured.measure()
    assert [p.nodes for p in measured.of("nodes")] == list(NODES)
    assert [p.context for p in measured.of("context")] == [64, 256, CONTEXT - 16]
    assert all(len(p.passes) == 3 for p in measured.points)
    assert all(0.0 <= t.wait_s <= t.seconds > 0.0 for p in measured.points for t in p.passes)
    # only what a question asks for grows
    assert {(p.streamed_bytes, p.context) for p in measured.of("nodes")} == {(0, 256)}
    assert {(p.streamed_bytes, p.nodes) for p in measured.of("context")} == {(0, 16)}
    assert {(p.nodes, p.context) for p in measured.of("bytes")} == {(16, 256)}
    # in steps of layers, from nothing to all
    streamed = [p.streamed_bytes for p in measured.of("bytes")]
    assert streamed == sorted(set(streamed))
    assert len(streamed) == len(PINNED_SHARES)
    with loaded(folder, pinned=0) as pair:
        assert pair.plan is not None
        assert (streamed[0], streamed[-1]) == (0, pair.plan.streamed_bytes)


def test_given_pinned_bytes_hold_for_nodes_and_context_while_bytes_still_grow(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One target is held at a time."""
    held: list[LoadedPair] = []

    def counted(*arguments: Any) -> LoadedPair:
        assert not any(hasattr(pair, "target") for pair in held)
        held.append(load_pair(*arguments))
        return held[-1]

    monkeypatch.setattr(growth, "load_pair", counted)
    done = Growth(str(folder), MemoryOptions(pinned=0), repeat=1)
    steps: list[str] = []
    done.measure(on_turn=lambda name, total: steps.append(f"{name} of {total}"))
    most = done.of("bytes")[-1].streamed_bytes
    assert {p.streamed_bytes for p in done.of("nodes") + done.of("context")} == {most}
    assert done.of("bytes")[0].streamed_bytes == 0
    names = ["nodes", "context", *(f"{share}% pinned" for share in PINNED_SHARES)]
    assert sorted(steps) == sorted(f"{name} of {len(names)}" for name in names)
    assert len(held) == 1 + len(PINNED_SHARES)


def test_a_timed_pass_reads_the_whole_target_once_more(folder: Path) -> None:
    """Each measured pass comes after one of the same kind, so both are read."""
    with loaded(folder, pinned=0) as pair:
        assert pair.target.feed is not None
        timer = PassTimer(pair)
        timer.fill(100)
        assert pair.target.cache.length == 100
        taken: list[int] = []
        take = pair.target.feed.take
        pair.target.feed.take = lambda unit: taken.append(unit) or take(unit)  # type: ignore[method-assign,func-returns-value]
        timer.measure(4)
        assert len(taken) % 2 == 0
        assert taken[: len(taken) // 2] == taken[len(taken) // 2 :] == sorted(set(taken))
        timer.fill(40)
        assert pair.target.cache.length == 40


def test_trees_are_random_but_the_same_every_time() -> None:
    trees = [random_tree(count, 40) for count in NODES]
    assert [len(tree) for tree in trees] == list(NODES)
    assert random_tree(64, 40).parents == trees[NODES.index(64)].parents
    assert any(len(trees[-1].children(node)) > 1 for node in range(len(trees[-1])))
    assert random_tree(8, 40, line=True).parents == list(range(-1, 7))


def test_a_short_context_leaves_out_what_does_not_fit_and_too_short_a_one_is_refused(folder: Path) -> None:
    with loaded(folder, context=128) as pair:
        timer = PassTimer(pair)
        assert timer.contexts == [64, 112]
        assert timer.short_context == 112
        assert timer.node_counts == [1, 2, 4, 8, 16]
    with loaded(folder, context=127) as pair, pytest.raises(UsageError, match="context: room for 127 tokens"):
        PassTimer(pair)


def test_ctrl_c_keeps_the_questions_that_were_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = PassTimer.answer

    def answered(timer: PassTimer, asked: Any, repeat: int) -> list[GrowthPoint]:
        if asked == "context":
            raise KeyboardInterrupt
        return answer(timer, asked, repeat)

    monkeypatch.setattr(PassTimer, "answer", answered)
    done = Growth(str(folder), MemoryOptions(), repeat=1)
    done.measure()
    assert done.interrupted
    assert {p.question for p in done.points} == {"nodes"}
    report = growth_report(done)
    assert report.interrupted
    assert report.notes[-1] == "Interrupted: not measured: bytes, context."
    assert len(report.tables) == 1


def test_the_table_has_median_extremes_ratio_computing_and_prediction() -> None:
    by_bytes, by_nodes, by_context = growth_report(made_up()).tables
    assert by_bytes.header == (
        "streamed", "median, ms", "min, ms", "max, ms", "× first", "computing, ms", "bytes/rate, ms",
    )  # fmt: skip
    assert by_bytes.rows == (
        ("0 kB", "250.0", "200.0", "300.0", "1.00", "150.0", "0.0"),
        ("30 MB", "500.0", "400.0", "900.0", "2.00", "400.0", "300.0"),
    )
    assert [row[:5] for row in by_nodes.rows] == [
        ("1", "100.0", "100.0", "100.0", "1.00"),
        ("2", "200.0", "200.0", "200.0", "2.00"),
    ]
    assert "bytes/rate, ms" not in by_nodes.header + by_context.header
    assert "16 nodes after 256 tokens" in by_bytes.title
    first = growth_report(made_up()).document["points"][1]
    assert first["passes"][0] == {"seconds": 0.9, "wait_s": 0.1}
    assert (first["question"], first["median_s"], first["predicted_s"]) == ("bytes", 0.5, 0.3)
    # only an emulated rate predicts
    report = growth_report(made_up(rate=None))
    assert "bytes/rate, ms" not in report.tables[0].header
    assert {point["predicted_s"] for point in report.document["points"]} == {None}
    assert not any("emulated" in note for note in report.notes)
    assert any("emulated at 100 MB/s" in note for note in growth_report(made_up()).notes)


def test_only_questions_with_something_to_compare_are_drawn() -> None:
    figure = drawn(*growth_report(made_up()).plots)
    assert [axes.get_xlabel() for axes in figure.axes] == ["read per pass, MB", "nodes", "tokens in the cache"]
    lines = {line.get_label(): [list(data) for data in line.get_data()] for line in figure.axes[0].lines}
    assert lines["bytes / rate"] == [[0.0, 30.0], [0.0, 300.0]]
    assert lines["computing: waits left out"] == [[0.0, 30.0], [150.0, 400.0]]
    assert {axes.get_ylabel() for axes in figure.axes} == {"ms per pass"}
    assert [axes.get_title() for axes in figure.axes] == [
        "16 nodes, 256 tokens", "0 kB read, 256 tokens", "0 kB read, 16 nodes",
    ]  # fmt: skip
    # From zero, and with room for the slowest pass.
    assert [axes.get_xlim() for axes in figure.axes] == [(0, pytest.approx(1.05 * most)) for most in (30, 2, 256)]
    assert [axes.get_ylim() for axes in figure.axes] == [
        (0, pytest.approx(1.1 * most)) for most in (900, 200, 100)
    ]
    (legend,) = figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    assert sorted(told) == ["bytes / rate", "computing: waits left out", "measured: median, min to max"]
    done = made_up(interrupted=True)
    assert len(drawn(*growth_report(done).plots).axes) == 1
    nothing = growth_report(replace(done, points=done.points[:1]))
    assert any("nothing to compare" in note for note in nothing.notes)
    assert nothing.plots[0].draw is None


def test_kernel_table_has_times_ratios_and_small_errors() -> None:
    times = growth.time_kernels(rows=(1, 4, 8), repeat=1, shape=(64, 128))
    assert (growth.OURS in {entry.kernel for entry in times}) == cpu_kernels_wanted()
    assert all(entry.error < 1e-5 for entry in times)
    assert {entry.rows for entry in times if entry.kernel == growth.MLX_DENSE} == {1, 4}
    report = growth.kernel_report(times)
    (table,) = report.tables
    assert [row[0] for row in table.rows] == ["1", "4", "8", "largest error"]
    assert table.rows[0][2] == "1.0"
    assert len(report.document["times"]) == len(times)
