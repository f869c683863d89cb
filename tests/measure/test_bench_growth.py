"""`bench --growth`: what is measured, and what is made of it. Tiny models, no time is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmcad_mlx.cli.main import run as run_cli
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import load_pair
from llmcad_mlx.machine import this_machine
from llmcad_mlx.measure import growth
from llmcad_mlx.measure.growth import (
    NODES,
    GrowthPlan,
    GrowthPoint,
    GrowthReport,
    PassTimer,
    TimedPass,
    measure_growth,
    random_tree,
)
from llmcad_mlx.measure.growth_report import (
    growth_curves,
    growth_json,
    growth_notes,
    growth_tables,
    predicted_s,
    write_growth,
)
from llmcad_mlx.measure.plots import MISSING
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.names import NO_DRAFT
from llmcad_mlx.streaming import weights as parts
from tests.support.tiny_folder import make_folder, tiny_environment

CONTEXT = 512
LAYERS = 6


@pytest.fixture(autouse=True, scope="module")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny_environment(tmp_path_factory.mktemp("home")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "SMALL_BYTES", 0)  # the matrices of a tiny model are all small
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama", layers=LAYERS, context=CONTEXT)


@pytest.fixture(scope="module")
def report(folder: Path) -> GrowthReport:
    """Everything in memory as given: nodes and context grow without reads."""
    return measure_growth(GrowthPlan(str(folder), MemoryOptions(read_bandwidth=1e9), repeat=3), False)


def made_up(rate: float | None = 100e6, interrupted: bool = False) -> GrowthReport:
    """A report of times on paper."""
    points = [
        GrowthPoint("bytes", num_bytes, 16, 256, tuple(TimedPass(s, 0.1) for s in seconds))
        for num_bytes, seconds in ((30_000_000, (0.9, 0.5, 0.4)), (0, (0.2, 0.3, 0.25)))
    ]
    if not interrupted:
        points += [GrowthPoint("nodes", 0, count, 256, (TimedPass(0.1 * count, 0.0),)) for count in (1, 2)]
        points += [GrowthPoint("context", 0, 16, length, (TimedPass(0.1, 0.0),)) for length in (64, 256)]
    plan = GrowthPlan("tiny", MemoryOptions(read_bandwidth=rate), repeat=3)
    return GrowthReport(plan, "tiny", "cpu", this_machine(), None, points, interrupted)


# -- what is measured ------------------------------------------------------------------------------------


def test_every_question_gets_all_its_points_with_a_pass_for_each_repetition(report: GrowthReport) -> None:
    assert [p.nodes for p in report.of("nodes")] == list(NODES)
    assert [p.context for p in report.of("context")] == [64, 256, CONTEXT - 16]
    assert all(len(p.passes) == 3 for p in report.points)
    assert all(0.0 < min(p.seconds) <= p.median_s <= max(p.seconds) for p in report.points)
    assert all(0.0 <= t.wait_s <= t.seconds for p in report.points for t in p.passes)


def test_only_what_a_question_asks_for_grows(report: GrowthReport) -> None:
    assert {(p.streamed_bytes, p.context) for p in report.of("nodes")} == {(0, 256)}
    assert {(p.streamed_bytes, p.nodes) for p in report.of("context")} == {(0, 16)}
    assert {(p.nodes, p.context) for p in report.of("bytes")} == {(16, 256)}


def test_streamed_bytes_go_from_nothing_to_all_in_steps_of_layers(report: GrowthReport, folder: Path) -> None:
    streamed = [p.streamed_bytes for p in report.of("bytes")]
    assert streamed == sorted(set(streamed))
    assert len(streamed) == len(growth.SHARES)
    pair = load_pair(str(folder), NO_DRAFT, False, MemoryOptions(pinned=0))
    assert pair.plan is not None
    assert (streamed[0], streamed[-1]) == (0, pair.plan.streamed_bytes)
    pair.release()


def test_given_pinned_bytes_hold_for_nodes_and_context_while_bytes_still_grow(folder: Path) -> None:
    plan = GrowthPlan(str(folder), MemoryOptions(pinned=0), repeat=1)
    steps: list[str] = []
    report = measure_growth(plan, False, steps.append)
    most = report.of("bytes")[-1].streamed_bytes
    assert {p.streamed_bytes for p in report.of("nodes") + report.of("context")} == {most}
    assert report.of("bytes")[0].streamed_bytes == 0
    assert sorted(steps) == sorted(["nodes", "context", *(f"{share}% pinned" for share in growth.SHARES)])
    assert len(steps) == growth.NUM_STEPS


def test_a_timed_pass_reads_the_whole_target_once_more(folder: Path) -> None:
    """Each measured pass comes after one of the same kind, so both are read."""
    pair = load_pair(str(folder), NO_DRAFT, False, MemoryOptions(pinned=0))
    assert pair.target.feed is not None
    timer = PassTimer(pair)
    timer.fill(100)
    assert pair.target.num_cached == 100
    taken: list[int] = []
    take = pair.target.feed.take
    pair.target.feed.take = lambda unit: taken.append(unit) or take(unit)  # type: ignore[method-assign,func-returns-value]
    timer.measure(4)
    assert len(taken) % 2 == 0
    assert taken[: len(taken) // 2] == taken[len(taken) // 2 :] == sorted(set(taken))
    timer.fill(40)
    assert pair.target.num_cached == 40
    pair.release()


def test_one_target_is_held_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    most: list[int] = []
    load = growth.load_pair

    def counted(*arguments: object) -> object:
        pair = load(*arguments)  # type: ignore[arg-type]
        close = pair.target.close
        held.append(1)
        most.append(len(held))
        monkeypatch.setattr(pair.target, "close", lambda: (held.pop(), close()))
        return pair

    monkeypatch.setattr(growth, "load_pair", counted)
    measure_growth(GrowthPlan(str(folder), repeat=1), False)
    assert not held
    assert set(most) == {1}


def test_trees_are_random_but_the_same_every_time() -> None:
    trees = [random_tree(count, 40) for count in NODES]
    assert [len(tree) for tree in trees] == list(NODES)
    assert random_tree(64, 40).parents == trees[NODES.index(64)].parents
    assert any(len(trees[-1].children(node)) > 1 for node in range(len(trees[-1])))
    assert random_tree(8, 40, line=True).parents == list(range(-1, 7))


def test_a_short_context_leaves_out_what_does_not_fit(folder: Path) -> None:
    pair = load_pair(str(folder), NO_DRAFT, False, MemoryOptions(context=128))
    timer = PassTimer(pair)
    assert timer.contexts == [64, 112]
    assert timer.short_context == 112
    assert timer.node_counts == [1, 2, 4, 8, 16]
    pair.release()


@pytest.mark.parametrize("context", [1, 127])
def test_too_little_context_is_refused_before_and_after_loading(folder: Path, context: int) -> None:
    with pytest.raises(UsageError, match="context"):
        GrowthPlan(None, MemoryOptions(context=context))
    pair = load_pair(str(folder), NO_DRAFT, False, MemoryOptions(context=context))
    with pytest.raises(UsageError, match=f"context: room for {context} tokens"):
        PassTimer(pair)
    pair.release()


def test_ctrl_c_keeps_the_questions_that_were_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(timer: PassTimer, repeat: int) -> list[GrowthPoint]:
        raise KeyboardInterrupt

    monkeypatch.setattr(growth, "by_context", interrupted)
    report = measure_growth(GrowthPlan(str(folder), repeat=1), False)
    assert report.interrupted
    assert {p.question for p in report.points} == {"nodes"}
    assert growth_notes(report)[-1] == "Interrupted: not measured: bytes, context."
    assert len(growth_tables(report)) == 1
    monkeypatch.setattr(growth, "by_nodes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_growth(GrowthPlan(str(folder), repeat=1), False)


# -- tables, JSON, files -----------------------------------------------------------------------------------


def test_the_table_has_median_extremes_ratio_computing_and_prediction() -> None:
    by_bytes, by_nodes, by_context = growth_tables(made_up())
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


def test_without_an_emulated_rate_nothing_is_predicted_and_nothing_called_emulated() -> None:
    report = made_up(rate=None)
    assert "bytes/rate, ms" not in growth_tables(report)[0].header
    assert predicted_s(report, report.points[0]) is None
    assert not any("emulated" in note for note in growth_notes(report))
    assert not growth_json(report, [])["emulated"]
    assert any("emulated at 100 MB/s" in note for note in growth_notes(made_up()))
    assert growth_json(made_up(), [])["emulated"]


def test_json_holds_every_pass_versions_and_the_command(report: GrowthReport, tmp_path: Path) -> None:
    assert write_growth(report, tmp_path / "new" / "out", ["llmcad-mlx", "bench", "--growth"]) is None
    written = json.loads((tmp_path / "new" / "out" / "growth.json").read_text())
    assert written["argv"] == ["llmcad-mlx", "bench", "--growth"]
    assert {"mlx", "mlx-lm", "numba"} <= set(written["machine"]["versions"])
    assert written["options"]["repeat"] == 3
    assert written["options"]["read_bandwidth"] == 1e9
    assert len(written["points"]) == len(report.points)
    for point in written["points"]:
        seconds = sorted(timed["seconds"] for timed in point["passes"])
        assert [point["min_s"], point["median_s"], point["max_s"]] == seconds
        assert point["predicted_s"] == pytest.approx(point["streamed_bytes"] / 1e9)
    firsts = {p["question"]: p for p in reversed(written["points"])}
    assert {p["ratio_to_first"] for p in firsts.values()} == {1.0}
    assert (tmp_path / "new" / "out" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "| streamed" in (tmp_path / "new" / "out" / "growth.md").read_text()


def test_only_questions_with_something_to_compare_are_drawn(tmp_path: Path) -> None:
    curves = growth_curves(made_up())
    assert [curve.label for curve in curves] == ["read per pass, MB", "nodes", "tokens in the cache"]
    assert (curves[0].x, curves[0].y) == ([0.0, 30.0], [250.0, 500.0])
    assert (curves[0].bound, curves[1].bound) == ([0.0, 300.0], None)
    report = made_up(interrupted=True)
    assert write_growth(report, tmp_path, []) is None
    assert (tmp_path / "growth.png").exists()
    nothing = replace(report, points=report.points[:1])
    assert any("nothing to compare" in note for note in growth_notes(nothing))
    assert write_growth(nothing, tmp_path, []) is None
    assert not (tmp_path / "growth.png").exists(), "the plot of an earlier run"


def test_without_matplotlib_the_figures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_growth(made_up(), tmp_path, []) == MISSING
    assert sorted(file.name for file in tmp_path.iterdir()) == ["growth.json", "growth.md"]


# -- command line ------------------------------------------------------------------------------------------


def test_json_is_the_only_thing_on_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", "--growth", "--target", str(folder), "--repeat", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["target"] == str(folder)
    assert {p["question"] for p in shown["points"]} == {"bytes", "nodes", "context"}


def test_a_pipe_gets_markdown_and_out_gets_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--growth", "--target", str(folder), "--repeat", "1", "--out", str(tmp_path / "out")]
    assert run_cli(arguments) == 0
    shown = capsys.readouterr().out
    assert "| nodes |" in shown
    assert "| context |" in shown
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["growth.json", "growth.md", "growth.png"]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--growth", "--draft", "auto"], "draft"),
        (["--growth", "--variants", "plain"], "variants"),
        (["--growth", "--max-tokens", "8"], "max-tokens"),
        (["--growth", "--per-domain", "1"], "per-domain"),
        (["--growth", "--warmup", "1"], "warmup"),
        (["--growth", "--temp", "0"], "temp"),
        (["--growth", "--seed", "1"], "seed"),
        (["--growth", "--kernels"], "growth"),
        (["--kernels", "--memory", "1GB"], "memory"),
        (["--kernels", "--target", "x"], "target"),
        (["--growth", "--repeat", "0"], "repeat"),
        (["--growth", "--context", "100"], "context"),
        (["--growth", "--memory", "much"], "memory"),
    ],
)
def test_options_that_do_not_go_together_end_with_2_and_one_line(
    arguments: list[str], option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "load_pair", lambda *_: pytest.fail("loaded"))
    assert run_cli(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {option}: ")
    assert shown.err.count("\n") == 1
