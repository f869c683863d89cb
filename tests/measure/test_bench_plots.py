"""Plots of a benchmark: which are drawn of which figures, and that the axes tell the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from llmcad_mlx.measure import plots
from llmcad_mlx.measure.plots import Curve, write_curves, write_plots
from llmcad_mlx.measure.records import Generation, Place, Run
from llmcad_mlx.measure.summary import VariantSummary, summarise
from llmcad_mlx.measure.variants import Ablated, ablated, forced_nodes, parse_variants
from llmcad_mlx.results import GenerationStats

ALWAYS = {"tokens_per_s.png", "time_split.png"}


def lines_of(*variants: str, rate: float | None = None, stats: bool = True) -> list[VariantSummary]:
    """Made-up runs, each variant a little faster than the one before; 1 MB is read on each pass."""
    runs = []
    for order, variant in enumerate(variants):
        decode_s = 1.0 / (order + 1)
        known = GenerationStats(
            generated_tokens=8, target_passes=8 // min(order + 1, 8), draft_s=decode_s / 8, verify_s=decode_s / 4,
            io_wait_s=decode_s / 2,
        )  # fmt: skip
        done = Generation(tuple(range(8)), 8, 10, 0.5, decode_s, known if stats else None, 10**6)
        runs += [Run(variant, Place(domain, "p", 0), order, done) for domain in "ab"]
    return summarise(runs, True, rate)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Every figure that is saved, by the name of its file."""
    saved: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(self: Figure, file: Path, **options: Any) -> None:
        saved[file.name] = self
        save(self, file, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("variants", "rate", "more"),
    [
        (("plain", "chain"), None, set()),
        (("plain", "tree:4"), None, set()),
        (("tree:4", "tree:8"), None, {"tokens_per_pass.png"}),
        (("plain", "paper", "throughput"), None, set()),
        (("paper-no-tree", "throughput-no-tree"), None, set()),
        (("plain", "paper", "paper-no-tree"), None, {"ablation.png"}),
        (("plain", "throughput"), 1e8, {"bound.png"}),
    ],
)
def test_a_plot_is_written_only_where_it_says_something(
    tmp_path: Path, variants: tuple[str, ...], rate: float | None, more: set[str]
) -> None:
    written = write_plots(lines_of(*variants, rate=rate), tmp_path)
    assert names(tmp_path) == {file.name for file in written} == ALWAYS | more
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


def test_plots_of_an_earlier_run_do_not_stay_beside_this_one(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"not ours")
    write_plots(lines_of("plain", "paper", "paper-no-tree", "tree:4", "tree:8", rate=1e8), tmp_path)
    assert names(tmp_path) == {plot.file for plot in plots._PLOTS} | {"mine.png"}
    write_plots(lines_of("mlx-lm", stats=False), tmp_path)
    assert names(tmp_path) == {"tokens_per_s.png", "mine.png"}


def test_bars_start_at_zero_and_are_the_summary(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    lines = lines_of("plain", "paper", "paper-no-tree", "throughput", "throughput-no-tree", rate=1e6)
    write_plots(lines, tmp_path, "tiny; reads emulated at 1 MB/s")
    overall = [line for line in lines if line.domain == "all"]
    for name, attribute, scale in (("tokens_per_s.png", "tokens_per_s", 1), ("bound.png", "bound_share", 100)):
        (axes,) = drawn[name].axes
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(
            [scale * getattr(line, attribute) for line in overall]
        )
    for figure in drawn.values():
        assert "emulated at 1 MB/s" in figure.get_suptitle()
        assert all(axes.get_xlim()[0] == 0.0 and axes.get_xlabel() for axes in figure.axes)


def test_the_parts_of_decoding_time_add_up_and_are_named(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    write_plots(lines_of("plain", "chain"), tmp_path)
    figure = drawn["time_split.png"]
    widths: dict[float, float] = {}
    for bar in figure.axes[0].patches:
        widths[bar.get_y()] = widths.get(bar.get_y(), 0.0) + bar.get_width()
    assert list(widths.values()) == pytest.approx([100.0, 100.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "verify", "draft", "wait for weights", "other",
    ]  # fmt: skip
    colours = {bar.get_facecolor() for bar in figure.axes[0].patches}
    assert len(colours) == 4


def test_the_ablation_groups_both_policies_by_missing_part(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    variants = [variant.name for variant in parse_variants("ablation")]
    lines = lines_of(*variants)
    write_plots(lines, tmp_path)
    speed, passes = drawn["ablation.png"].axes
    labels = [tick.get_text().replace("\n", " ") for tick in speed.get_yticklabels()]
    assert labels == ["whole", "no tree", "no fallback", "no pipeline", "no tree, no fallback, no pipeline"]
    found = {line.variant: line for line in lines if line.domain == "all"}
    for axes, attribute in ((speed, "tokens_per_s"), (passes, "tokens_per_pass")):
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(
            [getattr(found[name], attribute) for name in variants if name != "plain"]
        )
    assert {text.get_text() for text in drawn["ablation.png"].legends[0].get_texts()} == {
        "paper", "throughput", "plain",
    }  # fmt: skip


def test_tokens_per_pass_are_drawn_in_the_order_of_nodes(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    write_plots(lines_of("tree:16", "tree:4"), tmp_path)
    (axes,) = drawn["tokens_per_pass.png"].axes
    assert [list(data) for data in axes.lines[0].get_data()] == [[4, 16], [2.0, 1.0]]
    assert axes.get_ylim()[0] == 0.0


def test_trees_of_the_draft_alone_are_a_curve_of_their_own(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    write_plots(lines_of("tree:16", "draft:4", "tree:4", "draft:16"), tmp_path)
    (axes,) = drawn["tokens_per_pass.png"].axes
    assert {line.get_label(): list(line.get_xdata()) for line in axes.lines} == {
        "tree:N": [4, 16],
        "draft:N": [4, 16],
    }


def test_curves_share_a_legend_and_start_at_zero(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    bound = Curve("a", "x", [1, 2], [10, 20], [9, 18], [11, 25], [10, 20], [8, 40])
    waits = Curve("b", "y", [1, 2], [10, 20], [9, 18], [11, 25], [5, 6])
    write_curves([bound, waits], "tiny", tmp_path / "growth.png")
    figure = drawn["growth.png"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "bytes / rate", "measured: median, min to max", "computing: waits left out",
    ]  # fmt: skip
    assert all((axes.get_xlim()[0], axes.get_ylim()[0]) == (0.0, 0.0) for axes in figure.axes)
    assert figure.axes[0].get_ylim()[1] > 40, "the bound is not cut off"


def test_names_of_variants_tell_nodes_and_missing_parts() -> None:
    assert [forced_nodes(name) for name in ("tree:16", "draft:4", "tree", "chain:4", "plain")] == [
        16, 4, None, None, None,
    ]  # fmt: skip
    assert ablated("paper") == Ablated("paper", ())
    assert ablated("throughput-no-tree-no-pipeline") == Ablated("throughput", ("tree", "pipeline"))
    assert [ablated(name) for name in ("plain", "no-draft", "tree:4")] == [None, None, None]
