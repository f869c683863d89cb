"""Choosing the target's token: mlx-lm's semantics, noise that is really Gumbel, checked options."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import sample_utils

from llmcad_mlx.errors import GenerationError
from llmcad_mlx.sampling import TargetSampler, gumbel
from llmcad_mlx.settings import SamplingSettings

VOCAB = 40


def random_row(seed: int, size: int = VOCAB, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def sampler(vocab_size: int = VOCAB, **options: Any) -> TargetSampler:
    return TargetSampler(SamplingSettings(**options), vocab_size)


def test_defaults_are_greedy_and_off() -> None:
    row = np.array([0.0] * 37 + [3.0, 3.0, 1.0], np.float32)
    for chooser in (sampler(), sampler(top_k=5, top_p=0.5, min_p=0.5, repetition_penalty=1.0)):
        assert chooser.choose(row, [1], 5) == 37


def test_the_rule_is_argmax_of_logprobs_over_temperature_plus_noise() -> None:
    for position in range(50):
        row = random_row(position)
        logprobs = row - np.log(np.exp(row.astype(np.float64)).sum())
        expected = int((logprobs / 0.7 + gumbel(9, position, VOCAB)).argmax())
        assert sampler(temperature=0.7, seed=9).choose(row, [1], position) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("rounding", [0.0, 0.5, 2.0])
def test_near_ties_are_choices_that_rounding_could_turn(temperature: float, rounding: float) -> None:
    """The second best, ruled out, tells how far the best was ahead."""
    chooser = TargetSampler(SamplingSettings(temperature=temperature, seed=9), VOCAB, rounding)
    expected = 0
    for position in range(60):
        row = random_row(position)
        best = chooser.choose(row, [1], position)
        scores = row / temperature + gumbel(9, position, VOCAB) if temperature else row
        first, second = sorted(scores, reverse=True)[:2]
        assert scores[best] == first
        expected += bool(rounding) and first - second <= rounding / (temperature or 1.0)
    assert chooser.near_ties == expected
    assert (expected > 0) == (rounding > 0.0)


def kept_by_mlx_lm(row: np.ndarray, top_p: float, min_p: float, top_k: int) -> set[int]:
    logprobs = mx.array(row)[None]
    logprobs = logprobs - mx.logsumexp(logprobs, keepdims=True)
    if top_p < 1.0:
        logprobs = sample_utils.apply_top_p(logprobs, top_p)
    if min_p > 0.0:
        logprobs = sample_utils.apply_min_p(logprobs, min_p)
    if top_k > 0:
        logprobs = sample_utils.apply_top_k(logprobs, top_k)
    return set(np.flatnonzero(np.asarray(logprobs[0]) > -np.inf).tolist())


@pytest.mark.parametrize("size", [VOCAB, 3000])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_filters_keep_what_mlx_lm_keeps(size: int, scale: float) -> None:
    """Every kept token can be chosen and no other: read off by asking the filter itself, many settings."""
    for seed, (top_p, min_p, top_k) in enumerate(
        [(0.9, 0.0, 0), (0.31, 0.0, 0), (1.0, 0.05, 0), (1.0, 0.0, 7), (0.8, 0.02, 5), (0.99, 0.3, 39)]
    ):
        row = random_row(seed, size, scale)
        chooser = sampler(size, temperature=0.8, top_p=top_p, min_p=min_p, top_k=top_k)
        kept = np.flatnonzero(chooser._filter(chooser.logprobs(row)) > -np.inf)
        assert set(kept.tolist()) == kept_by_mlx_lm(row, top_p, min_p, top_k)


def test_ties_at_the_border_of_a_filter() -> None:
    row = np.log(np.array([0.1, 0.2, 0.2, 0.2, 0.3], np.float32))

    def kept(**options: Any) -> list[int]:
        chooser = sampler(5, temperature=1.0, **options)
        return np.flatnonzero(chooser._filter(chooser.logprobs(row)) > -np.inf).tolist()

    assert kept(top_k=2) == [1, 4]  # exactly k, the lowest ids first
    assert kept(top_k=3) == [1, 2, 4]
    assert kept(top_k=5) == kept(top_k=50) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.4) == [1, 2, 3, 4]  # all ties of the last token that is needed
    assert kept(top_p=0.2) == [4]
    assert kept(top_p=0.95, top_k=4) == [0, 1, 2, 3, 4][1:]


def test_filters_act_before_temperature() -> None:
    # p = (0.6, 0.4): at T = 10 both are near 0.5, and top_p = 0.55 would keep both if it came after.
    row = np.log(np.array([0.6, 0.4], np.float32))
    chooser = sampler(2, temperature=10.0, top_p=0.55)
    assert {chooser.choose(row, [], position) for position in range(200)} == {0}


def test_samples_have_the_filtered_distribution() -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    row = np.log(probs).astype(np.float32)
    chooser = sampler(4, temperature=0.5, top_k=3, seed=77)
    num = 8000
    counts = np.bincount([chooser.choose(row, [], position) for position in range(num)], minlength=4)
    expected = num * probs[:3] ** 2 / (probs[:3] ** 2).sum()
    assert counts[3] == 0
    assert ((counts[:3] - expected) ** 2 / expected).sum() < 13.8  # 99.9 % at 2 degrees of freedom


def mlx_lm_processed(row: np.ndarray, tokens: list[int], **options: Any) -> np.ndarray:
    logits = mx.array(row)[None]
    for processor in sample_utils.make_logits_processors(**options):
        logits = processor(mx.array(tokens), logits)
    return np.asarray(logits[0])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "presence_context_size": 3},
        {"frequency_penalty": -0.4, "frequency_context_size": 30},
        {"logit_bias": {3: -5.0, 39: 2.5}},
        {"repetition_penalty": 0.8, "presence_penalty": 1, "frequency_penalty": 0.1, "logit_bias": {0: 1}},
    ],
)
def test_penalties_are_mlx_lms(options: dict[str, Any]) -> None:
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, 60)] + [7, 7, 7]
    row = random_row(1)
    before = row.copy()
    result = sampler(**options).processed(row, tokens)
    np.testing.assert_array_equal(result, mlx_lm_processed(row, tokens, **options))
    np.testing.assert_array_equal(row, before)
    assert not np.array_equal(result, before)
    if "logit_bias" not in options:  # before the first token there is nothing to repeat
        np.testing.assert_array_equal(sampler(**options).processed(row, []), row)


def test_custom_processors_see_the_whole_history_and_the_padded_row() -> None:
    seen = []

    def force_three(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append((tokens.tolist(), logits.shape))
        return mx.where(mx.arange(logits.shape[-1]) == 3, 0.0, -mx.inf)[None]

    for temperature in (0.0, 1.0):
        chooser = sampler(VOCAB - 4, temperature=temperature, logits_processors=[force_three])
        assert chooser.choose(random_row(0), list(range(30)), 30) == 3
    assert seen == [(list(range(30)), (1, VOCAB))] * 2


def test_processors_run_in_order_after_the_penalties() -> None:
    def halve(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits / 2

    chooser = sampler(3, logit_bias={1: 4.0}, logits_processors=(halve, lambda tokens, logits: logits + 1))
    assert chooser.processed(np.zeros(3, np.float32), [0]).tolist() == [1.0, 3.0, 1.0]


def test_processor_with_a_wrong_shape_is_named() -> None:
    def drop_axis(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits[0]

    with pytest.raises(GenerationError, match="drop_axis must return logits of shape"):
        sampler(logits_processors=[drop_axis]).choose(random_row(0), [1], 1)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0, 5.0]))
@settings(max_examples=30)
def test_mlx_and_padded_rows_give_the_same_token(seed: int, temperature: float) -> None:
    row = random_row(seed)
    padded = np.concatenate([row, np.full(24, 50.0, np.float32)])
    chooser = sampler(temperature=temperature, seed=seed, top_p=0.9)
    token = chooser.choose(row, [1], 12)
    assert token < VOCAB
    assert chooser.choose(mx.array(row), [1], 12) == token
    assert chooser.choose(padded, [1], 12) == token
    half = mx.array(row).astype(mx.bfloat16)
    assert chooser.choose(half, [1], 12) == chooser.choose(half.astype(mx.float32), [1], 12)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 300))
@settings(max_examples=30)
def test_a_draft_equal_to_the_target_ranks_its_token_first(seed: int, temperature: float, position: int) -> None:
    row = random_row(seed)
    chooser = sampler(temperature=temperature, seed=seed)
    for draft_row in (row, np.concatenate([row, np.full(8, 50.0, np.float32)])):
        scores = chooser.draft_scores(chooser.logprobs(draft_row), position)
        assert scores.shape == (VOCAB,)
        assert int(scores.argmax()) == chooser.choose(row, [], position)
    assert chooser.draft_scores(chooser.logprobs(row)[:30], position).shape == (30,)


def test_masked_logits_do_not_warn() -> None:
    row = random_row(0)
    row[5:] = np.finfo(np.float32).min
    assert sampler(temperature=0.3).choose(row, [], 0) < 5


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "contain NaN"), (math.inf, "contain infinity"), (-math.inf, "every token is ruled out")],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_no_token_can_be_chosen_from(value: float, message: str, temperature: float) -> None:
    row = random_row(0)
    row[slice(None) if value == -math.inf else 17] = value
    with pytest.raises(GenerationError, match=message) as error:
        sampler(temperature=temperature).choose(row, [1], 3)
    assert "\n" not in str(error.value)


def test_too_few_logits_are_refused() -> None:
    with pytest.raises(GenerationError, match="gave 40 logits for a vocabulary of 41"):
        sampler(41).choose(random_row(0), [], 0)


def test_settings_are_frozen_and_own_their_values() -> None:
    bias = {1: 2.0}
    processors = [lambda tokens, logits: logits]
    options = SamplingSettings(logit_bias=bias, logits_processors=processors)  # type: ignore[arg-type]
    bias[99] = math.nan
    processors.append(None)  # type: ignore[arg-type]
    assert options.logit_bias == {1: 2.0}
    assert len(options.logits_processors) == 1
    with pytest.raises(AttributeError):
        options.temperature = 1.0  # type: ignore[misc]


# -- noise -------------------------------------------------------------------------------------------------

KEYS = st.integers(0, 2**64 - 1)


@given(KEYS, KEYS, st.integers(0, 5000), st.integers(0, 20000))
@settings(max_examples=50)
def test_first_entries_do_not_depend_on_size(seed: int, position: int, short: int, more: int) -> None:
    vector = gumbel(seed, position, short + more)
    assert vector.shape == (short + more,)
    assert vector.dtype == np.float32
    assert np.isfinite(vector).all()
    np.testing.assert_array_equal(gumbel(seed, position, short), vector[:short])


def test_known_values_stay() -> None:
    """Seeds are a promise to users: the stream must not change between releases."""
    np.testing.assert_allclose(gumbel(0, 0, 4), [3.3421805, 4.4555497, 0.05485566, 1.2856264], rtol=1e-5)
    np.testing.assert_allclose(gumbel(2**64 - 1, 7, 4), [1.7618314, 2.553191, 0.35195962, -0.63781506], rtol=1e-5)
    refined = gumbel(1, 292, 140_947)  # its last one is of the lowest 256 of 2^32 steps
    assert refined[-1] == pytest.approx(18.483095, rel=1e-6)


def test_neighbouring_positions_and_seeds_are_uncorrelated() -> None:
    base = gumbel(5, 100, 100_000)
    for other in (gumbel(5, 101, 100_000), gumbel(6, 100, 100_000), gumbel(100, 5, 100_000)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / math.sqrt(100_000)


def test_upper_tail_is_not_cut() -> None:
    """P(g > x) = 1 − exp(−exp(−x)): counts far out in the tail, past where 24-bit uniforms would end."""
    num_vectors, size = 400, 151_936
    vectors = (gumbel(1, position, size) for position in range(num_vectors))
    tail = np.concatenate([vector[vector > 10] for vector in vectors])
    for threshold in (10.0, 12.0, 14.0):
        expected = num_vectors * size * -math.expm1(-math.exp(-threshold))
        assert abs((tail > threshold).sum() - expected) < 4 * math.sqrt(expected)
    assert len(np.unique(tail)) > 0.98 * len(tail)
    assert tail.max() > 16.7


def test_the_last_positions_are_kept_and_shared() -> None:
    chooser = sampler(10, seed=3)
    first = chooser.noise_at(0)
    np.testing.assert_array_equal(first, gumbel(3, 0, 10))
    with pytest.raises(ValueError, match="read-only"):
        first += 1
    for position in range(1, 16):
        chooser.noise_at(position)
    assert chooser.noise_at(0) is first
    for position in range(16, 32):
        chooser.noise_at(position)
    again = chooser.noise_at(0)
    assert again is not first
    np.testing.assert_array_equal(again, first)
