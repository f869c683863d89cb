"""The embedded model, for real: same text with and without drafting, in far fewer passes where text repeats."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmcad_mlx import Engine, load
from llmcad_mlx.sources.resolve import DEFAULT_PRESET, resolve_target
from tests.real_text import PROMPTS, REPEAT, chat, compare

pytestmark = pytest.mark.embedded


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    folder = resolve_target(DEFAULT_PRESET)  # pulls it where it is missing
    with load(str(folder), draft="ngram") as loaded:
        yield loaded


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculative_text_equals_plain_text(engine: Engine, temperature: float) -> None:
    """By turns under what the policy chooses and under a forced tree, which drafts whatever it costs."""
    for seed, prompt in enumerate(PROMPTS[:4]):
        options = {"tree_nodes": 16} if seed % 2 == 0 else {}
        found = compare(engine, prompt, 64, temperature=temperature, seed=seed, **options)
        assert found.tokens > 20
        assert found.mismatches == 0, prompt


def test_repeated_text_takes_few_passes(engine: Engine) -> None:
    """Sixteen nodes are forced: what the policy would choose depends on the machine's speed."""
    result = engine.generate(chat(REPEAT), max_tokens=64, tree_nodes=16)
    assert result.stats.tokens_per_pass > 3
    assert result.stats.accepted > result.stats.target_passes


def test_text_makes_sense(engine: Engine) -> None:
    """Equality alone would also hold for garbage."""
    answer = engine.generate(chat("What is the capital of France?"), max_tokens=24)
    assert "Paris" in answer.text
    assert engine.generate(chat(REPEAT), max_tokens=24).text.strip()[:40].startswith("The lighthouse keeper")
