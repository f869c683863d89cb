"""What the tests of all measuring commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import Interrupting


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of two domains with two short prompts each."""
    file = tmp_path / "prompts.toml"
    file.write_text(
        "\n".join(
            f'[[{domain}]]\nname = "{number}"\ntext = "the {domain} in an{number * 7} hour on the other {number}"'
            for domain in ("chat", "code")
            for number in (1, 2)
        )
    )
    return file


@pytest.fixture
def document(output: Callable[..., tuple[str, str]]) -> Callable[..., dict[str, Any]]:
    """Run a command with --json; the object, which is all that it prints."""

    def call(*argv: object) -> dict[str, Any]:
        out, _ = output(*argv, "--json")
        assert out.count("\n") == 1
        found: dict[str, Any] = json.loads(out)
        return found

    return call


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Press Ctrl-C in the n-th generation from now on."""
    from llmcad_mlx.measure.runner import EngineContender

    def arm(number: int) -> None:
        monkeypatch.setattr(EngineContender, "generate", EngineContender.generate)  # what comes back afterwards
        Interrupting(number, after=False).around(EngineContender, "generate")

    return arm
