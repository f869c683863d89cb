"""The pictures of docs/how-it-works.md come from the recorded run; its scripts work, and the run is whole."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "pictures"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return dict(json.loads((PICTURES / "round.json").read_text(encoding="utf-8")))


def test_every_picture_is_drawn_from_what_was_recorded(tmp_path: Path) -> None:
    script = runpy.run_path(str(DOCS / "draw_pictures.py"))
    script["draw"](tmp_path)
    drawn = {file.name for file in tmp_path.iterdir()}
    shown = set(re.findall(r"\]\(pictures/(\S+)\)", (DOCS / "how-it-works.md").read_text(encoding="utf-8")))
    assert drawn == shown == {file.name for file in PICTURES.glob("*.png")}
    for name in drawn:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50  # not an empty page


def test_the_recorded_round_is_one(recorded: dict[str, Any]) -> None:
    """The tree's own rules: parents come first, accepted nodes are one path that ends where the target went on."""
    tree = recorded["tree"]
    parents, states = tree["parents"], tree["states"]
    assert all(parent < node for node, parent in enumerate(parents))
    accepted = [node for node, state in enumerate(states) if state == "accepted" and node]
    assert len(accepted) > 1
    assert [parents[node] for node in accepted] == [0, *accepted[:-1]]
    assert tree["last"] == accepted[-1]
    assert {"rejected", "provisional"} < set(states)
    assert recorded["stats"]["generated_tokens"] > recorded["stats"]["target_passes"]


def test_the_recorded_pass_read_every_piece_in_order(recorded: dict[str, Any]) -> None:
    timeline = recorded["timeline"]
    assert len(timeline["passes"]) == 1
    units = [unit for unit, *_ in timeline["computes"]]
    assert units == list(range(len(units)))
    assert len(units) > 30
    for intervals in timeline.values():
        assert all(0 <= start <= end <= recorded["seconds"] + 1e-4 for _, start, end in intervals)
    (_, first, last), *_ = timeline["passes"]
    hidden = [start for source, start, _ in timeline["drafts"] if source == "model" and first <= start < last]
    assert hidden, "nothing was drafted while the weights loaded"


def test_the_curves_begin_with_plain_decoding() -> None:
    curves = json.loads((PICTURES / "curves.json").read_text(encoding="utf-8"))
    assert set(curves) == {"tree", "one branch"}
    for points in curves.values():
        nodes, tokens = zip(*points, strict=True)
        assert list(nodes) == sorted(nodes)
        assert tokens[0] == 1.0  # a lone root is plain decoding
        assert tokens[-1] > tokens[0]
