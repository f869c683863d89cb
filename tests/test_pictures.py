"""The pictures of docs/how-it-works.md are drawn from the recorded run, by a script that works."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "pictures"


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
