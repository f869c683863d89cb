"""docs/what-people-bring.md and docs/ready-for-a-mac.md name tests that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGE = (DOCS / "what-people-bring.md").read_text(encoding="utf-8")
MAC = (DOCS / "ready-for-a-mac.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([RNG]\d\d) .*$", PAGE, re.MULTILINE)
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE + MAC)))


@cache
def functions(path: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", (TESTS / path).read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists(path: str, name: str) -> None:
    assert name in functions(path)


def test_every_report_stands_there_once_with_a_test() -> None:
    assert len(set(ROWS)) == len(ROWS) > 50
    for row in re.findall(r"^\| [RNG]\d\d .*$", PAGE, re.MULTILINE):
        assert "::test_" in row, row


def test_every_finding_about_macs_has_a_test() -> None:
    rows = re.findall(r"^\| (\d+) .*::test_.* \|$", MAC, re.MULTILINE)
    assert rows == [str(number) for number in range(1, 17)]
