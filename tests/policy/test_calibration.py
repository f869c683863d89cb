"""Calibration of drafters' confidences."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx.policy.calibration import HALF_LIFE, NUM_BUCKETS, Calibration, ngram_confidence
from llmcad_mlx.tree.token_tree import MODEL, NGRAM, ROOT, TokenTree

PROBABILITIES = st.floats(0.0, 1.0)


def probability(calibration: Calibration, confidence: float, source: str) -> float:
    return calibration.probabilities([confidence], source)[0]


def test_unseen_confidence_is_trusted() -> None:
    calibration = Calibration()
    for confidence in (0.0, 0.001, 0.3, 0.999, 1.0):
        assert probability(calibration, confidence, MODEL) == confidence
    calibration.observe(0.6, MODEL, False)
    assert probability(calibration, 0.2, MODEL) == pytest.approx(0.2)  # another bucket
    assert probability(calibration, 0.6, NGRAM) == 0.6  # another source


def test_posterior_mean_on_paper() -> None:
    calibration = Calibration()
    calibration.observe(0.6, MODEL, False)
    assert probability(calibration, 0.6, MODEL) == pytest.approx(8 * 0.6 / 9)
    calibration.observe(0.6, NGRAM, True)
    assert probability(calibration, 0.6, NGRAM) == pytest.approx((1 + 4 * 0.6) / 5)


def test_old_observations_fade_with_the_half_life() -> None:
    calibration = Calibration()
    for _ in range(10 * HALF_LIFE):
        calibration.observe(0.9, MODEL, True)
    for _ in range(HALF_LIFE):
        calibration.observe(0.9, MODEL, False)
    assert probability(calibration, 0.9, MODEL) == pytest.approx(0.5, abs=0.01)


@given(st.lists(st.tuples(PROBABILITIES, st.booleans()), max_size=50), PROBABILITIES)
def test_always_a_probability_and_survives_json(seen: list[tuple[float, bool]], confidence: float) -> None:
    calibration = Calibration()
    for raw, accepted in seen:
        calibration.observe(raw, MODEL, accepted)
        calibration.observe(raw, NGRAM, not accepted)
    restored = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
    for source in (MODEL, NGRAM, "unheard-of"):
        assert 0.0 <= probability(calibration, confidence, source) <= 1.0
        assert probability(restored, confidence, source) == probability(calibration, confidence, source)


def test_choices_judge_every_child_of_the_nodes_they_were_made_at_by_raw_confidence() -> None:
    tree = TokenTree(0)
    right = tree.add(ROOT, 1, 0.9, MODEL, raw=0.6)
    tree.add(ROOT, 2, 0.9, NGRAM, raw=0.4)
    tree.add(tree.add(right, 3, 0.9, raw=0.9), 4, 0.9, raw=0.3)  # 4 is never reached
    calibration = Calibration()
    calibration.observe_choices(tree, [1, 8, 4])  # the last one says nothing about the tree
    assert probability(calibration, 0.6, MODEL) == pytest.approx((1 + 8 * 0.6) / 9)
    assert probability(calibration, 0.4, NGRAM) == pytest.approx(4 * 0.4 / 5)
    assert probability(calibration, 0.9, MODEL) == pytest.approx(8 * 0.9 / 9)
    assert probability(calibration, 0.3, MODEL) == pytest.approx(0.3)


def test_ngram_prior_grows_with_the_match() -> None:
    priors = [ngram_confidence(length) for length in range(1, 30)]
    assert priors[0] == 0.4
    assert priors == sorted(priors)
    assert priors[-1] < 1.0


def _damaged(**changes: Any) -> dict[str, Any]:
    calibration = Calibration()
    calibration.observe(0.5, MODEL, True)
    return {**calibration.to_dict(), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "format version"),
        ([], "format version"),
        ({}, "format version"),
        (_damaged(version=2), "format version"),
        (_damaged(edges=[0.5]), "other confidence buckets"),
        (_damaged(sources=None), "'sources'"),
        (_damaged(sources={"model": 3}), "'sources'"),
        (_damaged(sources={"model": {"tested": [1.0]}}), "'tested' of 'model'"),
        (_damaged(sources={"model": {"tested": ["1"] * NUM_BUCKETS}}), "'tested' of 'model'"),
        (_damaged(sources={"model": {"tested": [float("nan")] * NUM_BUCKETS}}), "'tested' of 'model'"),
        (_damaged(sources={"model": {"tested": [1.0] * NUM_BUCKETS}}), "'accepted' of 'model'"),
        (_damaged(sources={"model": {"tested": [1.0] * 12, "accepted": [2.0] * 12}}), "more accepted"),
    ],
)
def test_foreign_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration.from_dict(data)
