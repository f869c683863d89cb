"""What the tests of all measuring commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Press Ctrl-C in the n-th generation from now on; returns the names of those that began."""
    from llmcad_mlx.measure.runner import EngineContender

    generate = EngineContender.generate

    def arm(number: int) -> list[str]:
        calls: list[str] = []

        def generate_or_stop(self: EngineContender, prompt: Any, options: Any) -> Any:
            calls.append(self.name)
            if len(calls) == number:
                raise KeyboardInterrupt
            return generate(self, prompt, options)

        monkeypatch.setattr(EngineContender, "generate", generate_or_stop)
        return calls

    return arm
