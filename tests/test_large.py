"""Two thousand tokens of each real model, speculative against plain: not one may differ. The same for a streamed
target under several budgets.

Run with `make test-large`; the totals are printed.
"""

from __future__ import annotations

import re

import pytest

from llmcad_mlx import load
from llmcad_mlx.errors import BudgetError
from tests.support.real_text import PROMPTS, compare

pytestmark = pytest.mark.large

NUM_TOKENS = 200  # for each of the ten prompts
STREAMED_TOKENS = 40  # for each prompt and way of streaming
STREAMED_PROMPTS = PROMPTS[:3]


@pytest.mark.embedded
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_embedded_model_over_two_thousand_tokens(temperature: float, capsys: pytest.CaptureFixture[str]) -> None:
    total_over("smollm2-135m", temperature, capsys)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_qwen_pair_over_two_thousand_tokens(temperature: float, capsys: pytest.CaptureFixture[str]) -> None:
    total_over("qwen2.5-coder-1.5b", temperature, capsys)


def total_over(preset: str, temperature: float, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompts over and over, by turns under a forced tree and under what the policy chooses."""
    tokens = mismatches = rounds = 0
    passes = 0.0
    with load(preset) as engine:
        while tokens < 2000 or rounds < len(PROMPTS):
            prompt = PROMPTS[rounds % len(PROMPTS)]
            options = {} if (rounds + rounds // len(PROMPTS)) % 2 else {"tree_nodes": 16}
            found = compare(engine, prompt, NUM_TOKENS, temperature=temperature, seed=rounds, **options)
            tokens += found.tokens
            mismatches += found.mismatches
            passes += found.tokens / found.tokens_per_pass
            rounds += 1
            with capsys.disabled():
                print(f"\n{preset} T={temperature} {rounds}: {found}", end="", flush=True)
            assert rounds < 60, "the model hardly says anything"
    with capsys.disabled():
        print(
            f"\n{preset}, T={temperature}: {tokens} tokens in {rounds} generations, {mismatches} mismatches, "
            f"{tokens / passes:.2f} tokens per pass"
        )
    assert mismatches == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_streamed_text_is_the_resident_text(temperature: float, capsys: pytest.CaptureFixture[str]) -> None:
    """From a budget with next to nothing pinned to one in which all fits, with and without the pipeline."""
    target = "qwen2.5-coder-1.5b"
    options = {"max_tokens": STREAMED_TOKENS, "temperature": temperature, "seed": 3}
    with load(target) as engine:
        plain = [engine.generate(prompt, policy="plain", **options).tokens for prompt in STREAMED_PROMPTS]
    passes = tokens = 0
    streamed = []
    smallest = smallest_budget(target)
    for memory in (f"{smallest + more}MB" for more in (50, 400, 3000)):
        with load(target, memory=memory) as engine:
            assert engine.pair.plan is not None
            streamed.append(engine.pair.plan.streamed_bytes)
            for pipeline in (True, False):
                for prompt, expected in zip(STREAMED_PROMPTS, plain, strict=True):
                    result = engine.generate(prompt, pipeline=pipeline, **options)
                    assert result.tokens == expected
                    passes += result.stats.target_passes
                    tokens += len(result.tokens)
    assert streamed[0] > streamed[1] > streamed[2] == 0
    with capsys.disabled():
        print(
            f"\n{target}, {[round(n / 1e6) for n in streamed]} MB read per pass, T={temperature}: {tokens} tokens "
            f"in {passes} passes, none differs from plain decoding in memory"
        )


def smallest_budget(target: str) -> int:
    """In MB, of this process as it is: what it holds already counts, so it is more than for one that starts."""
    try:
        load(target, memory="1MB")
    except BudgetError as error:  # `pytest.raises` would keep the frames, and with them the draft's weights
        (smallest,) = re.findall(r"the smallest that works is (\d+) MB", str(error))
        return int(smallest)
    raise AssertionError("1 MB was enough")
