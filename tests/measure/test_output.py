"""What all measuring commands have in common: options that are refused, Ctrl-C, one JSON object, files."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmcad_mlx.measure import growth
from llmcad_mlx.measure.output import NO_PLOTS, Plot, Report, Table

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture
def words(folder: Path, draft: Path, prompts: Path) -> dict[str, list[Any]]:
    """The commands by the name of their files."""
    short = ["--prompts", prompts, "--max-tokens", 6, "--repeat", 1, "--warmup", 0]
    return {
        "bench": ["bench", "--target", folder, "--draft", draft, "--variants", "plain,tree:6", *short],
        "growth": ["bench", "--growth", "--target", folder, "--repeat", 1, "--context", 128],
        "tune": ["tune", folder, "--drafts", draft, "--bits", "none", "--trim", "none", *short],
    }


@pytest.mark.parametrize(
    ("name", "pictures"),
    [("bench", {"tokens_per_s.png", "time_split.png"}), ("growth", {"growth.png"}), ("tune", {"tune.png"})],
)
def test_files_hold_what_is_printed_versions_and_the_command(
    name: str, pictures: set[str], words: dict[str, list[Any]], document: Any, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    found = document(*words[name], "--out", out)
    assert found == json.loads((out / f"{name}.json").read_text())
    assert {"device", "target", "options"} <= set(found)
    assert (found["format"], found["emulated"], found["interrupted"]) == (1, False, False)
    assert {"mlx", "mlx-lm", "numba"} <= set(found["machine"]["versions"])
    text = (out / f"{name}.md").read_text()
    assert text.startswith(f"# {found['target']}")
    assert f"    {' '.join(found['argv'])}\n" in text
    assert all(f"\n- {note}" in text for note in found["notes"])
    assert {file.name for file in out.iterdir()} == pictures | {f"{name}.json", f"{name}.md"}
    assert all((out / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def report_of(*plots: Plot) -> Report:
    table = Table.of("a title", [{"name": "x", "ms": "1.0"}, {"name": "longer", "ms": "22.0"}])
    return Report.of_runs("mine", "tiny", 1e6, [table], ["A note."], {"a": 1}, plots=plots)


@pytest.mark.parametrize("width", [24, 40, 80])
def test_a_narrow_terminal_cuts_nothing_off(width: int) -> None:
    cells = {"": "speculative, A / (max(W/B, C) + D) [x]", "tokens per s": "not measured", "size": "1234.5 MB"}
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, markup=False)
    console.print(Table.of("[model]: a title that is longer than the lines are", [cells]).to_rich())
    assert "…" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= width
    shown = Counter("".join(out.getvalue().split()))
    for text in (*cells, *cells.values(), "[model]:"):
        assert Counter("".join(text.split())) <= shown


def test_a_table_is_aligned_and_the_document_complete() -> None:
    report = report_of()
    assert report.to_markdown().splitlines() == [
        "**a title**", "", "| name   |   ms |", "| ------ | ---: |", "| x      |  1.0 |", "| longer | 22.0 |", "",
        "- A note.",
    ]  # fmt: skip
    assert report.document["a"] == 1
    assert report.document["emulated"]
    assert report.subtitle == "tiny; reads emulated at 1 MB/s"


def test_pictures_of_an_earlier_run_do_not_stay_beside_this_one(tmp_path: Path) -> None:
    for name in ("mine.png", "first.png", "second.png"):
        (tmp_path / name).write_bytes(b"earlier")
    report = report_of(Plot("first", "A", lambda figure: figure.subplots()), Plot("second", "B", None))
    assert report.write(tmp_path) is None
    assert {file.name for file in tmp_path.iterdir()} == {"mine.png", "first.png", "mine.json", "mine.md"}
    assert (tmp_path / "mine.png").read_bytes() == b"earlier"
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_everything_but_the_plots_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report_of(Plot("first", "A", lambda figure: None)).write(tmp_path) == NO_PLOTS
    assert {file.name for file in tmp_path.iterdir()} == {"mine.json", "mine.md"}


@pytest.mark.parametrize(
    "words",
    [
        "bench --variants fast", "bench --domains x", "bench --repeat 0", "bench --prompts /no/such/file",
        "bench --max-tokens 0", "bench --max-tokens -1", "bench --warmup -1",
        "bench --compare ollama", "bench --kernels --repeat 0", "bench --growth --draft auto",
        "bench --growth --variants plain", "bench --growth --max-tokens 8", "bench --growth --per-domain 1",
        "bench --growth --warmup 1", "bench --growth --temp 0", "bench --growth --seed 1",
        "bench --growth --kernels",
        "bench --kernels --memory 1GB", "bench --kernels --target x", "bench --growth --repeat 0",
        "bench --growth --context 100", "bench --growth --memory much", "tune /nowhere --bits 7",
        "tune /nowhere --drafts ,", "tune /nowhere --repeat 0", "tune /nowhere --prompts /no/such/file",
        "tune /nowhere --per-domain 1", "tune /nowhere --memory much", "tune /nowhere --max-tokens 1",
        "plan --memory much", "plan --pinned all", "plan --context 0", "plan --read-bandwidth fast",
    ],
)  # fmt: skip
def test_bad_options_end_with_2_and_one_line_before_anything_is_loaded(
    words: str, output: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "load_pair", lambda *_: pytest.fail("loaded"))
    out, err = output(*words.split(), code=2)
    option = words.split()[-2].removeprefix("--").replace("_", "-")
    assert out == ""
    assert err.replace("_", "-").startswith(f"error: {option}: ")
    assert err.count("\n") == 1


def test_a_terminal_gets_drawn_tables(folder: Path, output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out, _ = output("plan", "--target", folder, "--pinned", "0", "--read-bandwidth", "1MB/s")
    assert "streamed per pass" in out
    assert "| " not in out
