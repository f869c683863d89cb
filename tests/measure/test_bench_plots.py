"""Plots of a benchmark: which are drawn of which figures, and that the axes tell the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from llmcad_mlx.measure.bench import VariantSummary, summarise, write_plots
from llmcad_mlx.measure.variants import parse_variants
from tests.measure.runs import made_up

ALWAYS = {"tokens_per_s.png", "time_split.png"}
ALL = ALWAYS | {"tokens_per_pass.png", "ablation.png", "bound.png"}


def lines_of(*variants: str, rate: float | None = None, ours: bool = True) -> list[VariantSummary]:
    """Made-up runs, each variant a little faster than the one before."""
    runs = []
    for order, variant in enumerate(variants):
        decode_s = 1.0 / (order + 1)
        counts = {
            "generated_tokens": 8, "target_passes": 8 // min(order + 1, 8), "draft_s": decode_s / 8,
            "verify_s": decode_s / 4, "io_wait_s": decode_s / 2,
        }  # fmt: skip
        runs += [made_up(variant, 0, decode_s, domain=domain, ours=ours, **counts) for domain in "ab"]
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


def widths(axes: Any) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


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
    write_plots(lines_of(*variants, rate=rate), "tiny", tmp_path)
    assert names(tmp_path) == ALWAYS | more
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())


def test_plots_of_an_earlier_run_do_not_stay_beside_this_one(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"not ours")
    write_plots(lines_of("plain", "paper", "paper-no-tree", "tree:4", "tree:8", rate=1e8), "tiny", tmp_path)
    assert names(tmp_path) == ALL | {"mine.png"}
    write_plots(lines_of("mlx-lm", ours=False), "tiny", tmp_path)
    assert names(tmp_path) == {"tokens_per_s.png", "mine.png"}


def test_bars_start_at_zero_and_are_the_summary(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    lines = lines_of("plain", "paper", "paper-no-tree", "throughput", "throughput-no-tree", rate=1e6)
    write_plots(lines, "tiny; reads emulated at 1 MB/s", tmp_path)
    overall = [line for line in lines if line.domain == "all"]
    for name, attribute, scale in (("tokens_per_s.png", "tokens_per_s", 1), ("bound.png", "bound_share", 100)):
        assert widths(drawn[name].axes[0]) == pytest.approx([scale * getattr(line, attribute) for line in overall])
    for figure in drawn.values():
        assert "emulated at 1 MB/s" in figure.get_suptitle()
        assert all(axes.get_xlim()[0] == 0.0 and axes.get_xlabel() for axes in figure.axes)


def test_the_parts_of_decoding_time_add_up_and_are_named(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    write_plots(lines_of("plain", "chain"), "tiny", tmp_path)
    figure = drawn["time_split.png"]
    total: dict[float, float] = {}
    for bar in figure.axes[0].patches:
        total[bar.get_y()] = total.get(bar.get_y(), 0.0) + bar.get_width()
    assert list(total.values()) == pytest.approx([100.0, 100.0])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["verify", "draft", "wait for weights", "other"]
    assert len({bar.get_facecolor() for bar in figure.axes[0].patches}) == 4


def test_the_ablation_groups_both_policies_by_missing_part(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    variants = [variant.name for variant in parse_variants("ablation")]
    lines = lines_of(*variants)
    write_plots(lines, "tiny", tmp_path)
    speed, passes = drawn["ablation.png"].axes
    labels = [tick.get_text().replace("\n", " ") for tick in speed.get_yticklabels()]
    assert labels == ["whole", "no tree", "no fallback", "no pipeline", "no tree, no fallback, no pipeline"]
    found = {line.variant: line for line in lines if line.domain == "all"}
    for axes, attribute in ((speed, "tokens_per_s"), (passes, "tokens_per_pass")):
        expected = [getattr(found[name], attribute) for name in variants if name != "plain"]
        assert widths(axes) == pytest.approx(expected)
    legend = {text.get_text() for text in drawn["ablation.png"].legends[0].get_texts()}
    assert legend == {"paper", "throughput", "plain"}


def test_tokens_per_pass_are_drawn_in_the_order_of_nodes(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    """Trees of the draft alone are a curve of their own."""
    write_plots(lines_of("tree:16", "tree:4", "draft:4", "draft:16"), "tiny", tmp_path)
    (axes,) = drawn["tokens_per_pass.png"].axes
    curves = {line.get_label(): [list(data) for data in line.get_data()] for line in axes.lines}
    assert curves["tree:N"] == [[4, 16], [2.0, 1.0]]
    assert curves["draft:N"][0] == [4, 16]
    assert axes.get_ylim()[0] == 0.0
