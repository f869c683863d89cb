"""Prompts for real models, and the comparison of speculative with plain text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from llmcad_mlx.api import Engine, load
from llmcad_mlx.store import names as pair_names

PASSAGE = (
    "The lighthouse keeper wrote every evening in a thick blue book. He noted the wind, the ships that passed, "
    "and the colour of the sea. On the third of May he wrote that a small boat had come close to the rocks, that "
    "he had rung the bell for an hour, and that the boat had turned away before the fog closed in again."
)

PROMPTS = (
    "Write a short story about a fox who learns to swim.",
    f"Repeat this text exactly, word for word:\n\n{PASSAGE}",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "List the planets of the solar system with one sentence about each.",
    "Explain to a child why the sky is blue.",
    "Translate into French: The cat sleeps on the warm roof while the children play in the garden.",
    "Write a SQL query that counts the orders of each customer, largest first.",
    f"Replace every 'he' by 'she' in this text:\n\n{PASSAGE}",
    "Name three advantages and three drawbacks of electric cars.",
    "Write a letter to a landlord about a broken heater.",
)
REPEAT = PROMPTS[1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Speculative against plain text for one prompt. `mismatches`: positions at which they differ."""

    tokens: int
    mismatches: int
    tokens_per_pass: float


@contextmanager
def default_engine(**options: Any) -> Iterator[Engine]:
    """The target and the draft that come by default, whatever `llmcad-mlx tune` has chosen on this machine.
    options: of `load`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_names, "find_choice", lambda *_: None)
        engine = load(**options)  # pulls the target where it is missing
    with engine:
        yield engine


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def compare(engine: Engine, prompt: str, num_tokens: int, **options: Any) -> Comparison:
    """Generate twice with the same seed, with and without drafting."""
    speculation = {name: options.pop(name) for name in ("policy", "tree_nodes") if name in options}
    found = engine.generate(chat(prompt), max_tokens=num_tokens, **options, **speculation)
    plain = engine.generate(chat(prompt), max_tokens=num_tokens, **options, policy="plain")
    pairs = zip(found.tokens, plain.tokens, strict=False)
    mismatches = sum(a != b for a, b in pairs) + abs(len(found.tokens) - len(plain.tokens))
    return Comparison(len(plain.tokens), mismatches, found.stats.tokens_per_pass)
