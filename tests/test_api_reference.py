"""docs/api.md is what its script makes of the docstrings."""

from __future__ import annotations

import runpy
from pathlib import Path

import llmcad_mlx

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "make_api_reference.py"))["page"]()
    committed = (DOCS / "api.md").read_text(encoding="utf-8")
    assert committed == page, "run: python docs/make_api_reference.py"


def test_every_public_name_is_on_the_page() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in set(llmcad_mlx.__all__) - {"__version__"}:
        assert f"### `llmcad_mlx.{name}`" in page
