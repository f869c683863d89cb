"""docs/troubleshooting.md quotes messages that the program really has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import llmcad_mlx

PACKAGE = Path(llmcad_mlx.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### (`.+`)$", PAGE, re.MULTILINE)
VALUE = "…"


@cache
def messages() -> list[str]:
    """Every string of the package but docstrings, with `VALUE` where a value is put in."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in documentation:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
                found.append("".join(map(str, parts)))
    return found


def is_a_message(heading: str) -> bool:
    """Whether some message has the heading's words, the whole of them one after the other.

    What a message is about (`…: ` in front) may be put before it elsewhere.
    """
    words = [part for part in heading.strip("`").strip().removeprefix(f"{VALUE}: ").split(VALUE) if part.strip()]
    pattern = re.compile(".*?".join(map(re.escape, words)), re.DOTALL)
    return any(pattern.search(message) for message in messages())


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_is_a_message_of_the_program(heading: str) -> None:
    letters = sum(letter.isalpha() for letter in heading)
    assert letters >= 10, "too little of it to be told from others"
    assert is_a_message(heading)


def test_messages_that_do_not_exist_are_noticed() -> None:
    assert not is_a_message("`memory: … is too small; the smallest that works is …`")
    assert not is_a_message("`the smallest that works is …; memory: … is too little`")
    assert is_a_message("`memory: … is too little; the smallest that works is …`")


def test_there_are_many_and_none_twice() -> None:
    assert len(HEADINGS) > 70
    assert len(set(HEADINGS)) == len(HEADINGS)


def test_every_heading_is_followed_by_advice() -> None:
    """Headings may share it: then they stand together."""
    for block in re.split(r"\n\n(?=#)", PAGE)[1:]:
        *_, last = block.strip().splitlines()
        assert block.startswith("## ") or not last.startswith("#"), last


@pytest.mark.parametrize(
    "page",
    [*sorted(DOCS.glob("*.md")), *(DOCS.parent / folder / "README.md" for folder in ("", "convert", "distill"))],
    ids=lambda page: f"{page.parent.name}-{page.name}",
)
def test_links_lead_to_pages_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
