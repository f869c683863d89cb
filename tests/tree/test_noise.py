"""Position-keyed Gumbel noise: reproducible, independent of size, and really Gumbel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx.tree.noise import PositionNoise, gumbel

KEYS = st.integers(0, 2**64 - 1)
KNOWN_0_0 = [3.3421805, 4.4555497, 0.05485566, 1.2856264]
KNOWN_MAX_7 = [1.7618314, 2.553191, 0.35195962, -0.63781506]


@given(KEYS, KEYS, st.integers(0, 5000), st.integers(0, 20000))
@settings(max_examples=50)
def test_first_entries_do_not_depend_on_size(seed: int, position: int, short: int, more: int) -> None:
    vector = gumbel(seed, position, short + more)
    assert vector.shape == (short + more,)
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(gumbel(seed, position, short), vector[:short])


def test_keys_give_different_vectors() -> None:
    vectors = [gumbel(seed, position, 64) for seed in (0, 1, 2**63) for position in (0, 1, 2)]
    for index, vector in enumerate(vectors):
        assert all(not np.array_equal(vector, other) for other in vectors[:index])


def test_known_values_stay() -> None:
    """Seeds are a promise to users: the stream must not change between releases."""
    np.testing.assert_allclose(gumbel(0, 0, 4), KNOWN_0_0, rtol=1e-5)
    np.testing.assert_allclose(gumbel(2**64 - 1, 7, 4), KNOWN_MAX_7, rtol=1e-5)


def test_moments_and_finiteness() -> None:
    sample = np.concatenate([gumbel(11, position, 151_936) for position in range(20)]).astype(np.float64)
    assert np.isfinite(sample).all()
    error = math.pi / math.sqrt(6 * len(sample))
    assert abs(sample.mean() - np.euler_gamma) < 4 * error
    assert abs(sample.var() - math.pi**2 / 6) < 0.02


def test_neighbouring_positions_and_seeds_are_uncorrelated() -> None:
    base = gumbel(5, 100, 100_000)
    for other in (gumbel(5, 101, 100_000), gumbel(6, 100, 100_000), gumbel(100, 5, 100_000)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / math.sqrt(100_000)


def test_upper_tail_is_not_cut() -> None:
    """P(g > x) = 1 − exp(−exp(−x)): counts far out in the tail, past where 24-bit uniforms would end."""
    num_vectors, size = 400, 151_936
    tail = np.concatenate([vector[vector > 10] for vector in _vectors(num_vectors, size)])
    for threshold in (10.0, 12.0, 14.0):
        expected = num_vectors * size * -math.expm1(-math.exp(-threshold))
        assert abs((tail > threshold).sum() - expected) < 4 * math.sqrt(expected)
    assert len(np.unique(tail)) > 0.98 * len(tail)
    assert tail.max() > 16.7


def _vectors(count: int, size: int) -> list[np.ndarray]:
    return [gumbel(1, position, size) for position in range(count)]


def test_lowest_steps_are_refined_from_a_counter_of_their_own() -> None:
    position, index = 292, 140_946  # of seed 1, one of the lowest 256 of 2^32 steps: found by search
    key = np.array([1, position], np.uint64)
    word = int(np.random.Philox(key=key).random_raw(index // 2 + 1)[-1]) & 0xFFFFFFFF  # even: the low half
    fine = int(np.random.Philox(key=key, counter=np.array([index, 0, 0, 1], np.uint64)).random_raw())
    assert word < 256
    vector = gumbel(1, position, 151_936)
    assert vector.argmax() == index
    assert vector[index] == pytest.approx(-math.log((word + fine / 2**64) / 2**32), rel=1e-6)
    assert abs(vector[index] + math.log((word + 0.5) / 2**32)) > 1e-4
    assert gumbel(1, position, index + 1)[index] == vector[index]


def test_gumbel_max_samples_the_softmax() -> None:
    probs = np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    logprobs = np.log(probs).astype(np.float32)
    num = 20_000
    chosen = [int((logprobs + gumbel(1234, position, 6)).argmax()) for position in range(num)]
    counts = np.bincount(chosen, minlength=6)
    chi_square = float(((counts - num * probs) ** 2 / (num * probs)).sum())
    assert chi_square < 20.5  # 99.9 % quantile at 5 degrees of freedom


@pytest.mark.parametrize(("seed", "position", "size"), [(-1, 0, 4), (2**64, 0, 4), (0, -1, 4), (0, 0, -1)])
def test_out_of_range_keys_are_refused(seed: int, position: int, size: int) -> None:
    with pytest.raises(ValueError, match="noise needs"):
        gumbel(seed, position, size)


def test_position_noise_returns_the_same_vector_and_forgets_the_oldest() -> None:
    noise = PositionNoise(seed=3, size=10, keep=2)
    first = noise.at(0)
    np.testing.assert_array_equal(first, gumbel(3, 0, 10))
    noise.at(1)
    assert noise.at(0) is first
    noise.at(2)  # drops 1, the least recently used
    assert noise.at(0) is first
    noise.at(1)
    noise.at(2)
    again = noise.at(0)
    assert again is not first
    np.testing.assert_array_equal(again, first)


def test_shared_vectors_cannot_be_changed() -> None:
    vector = PositionNoise(seed=3, size=10).at(0)
    with pytest.raises(ValueError, match="read-only"):
        vector += 1


def test_keeping_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PositionNoise(0, 10, keep=0)
