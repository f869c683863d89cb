"""What is learned: how far drafters can be believed, what steps cost; and what of it survives a file."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx.policy.calibration import HALF_LIFE, NUM_BUCKETS, Calibration
from llmcad_mlx.policy.costs import CostModel, StepTimes
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


def _damaged(**changes: Any) -> dict[str, Any]:
    calibration = Calibration()
    calibration.observe(0.5, MODEL, True)
    return {**calibration.to_dict(), **changes}


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        _damaged(version=2),
        _damaged(edges=[0.5]),
        _damaged(sources=None),
        _damaged(sources={"model": 3}),
        _damaged(sources={"model": {"tested": [1.0]}}),
        _damaged(sources={"model": {"tested": ["1"] * NUM_BUCKETS}}),
        _damaged(sources={"model": {"tested": [float("nan")] * NUM_BUCKETS}}),
        _damaged(sources={"model": {"tested": [1.0] * NUM_BUCKETS}}),
        _damaged(sources={"model": {"tested": [1.0] * 12, "accepted": [2.0] * 12}}),
    ],
)
def test_foreign_data_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        Calibration.from_dict(data)


# -- costs -------------------------------------------------------------------------------------------------

seconds = st.floats(1e-6, 10.0)
observations = st.lists(st.tuples(st.integers(1, 64), seconds), min_size=1, max_size=40)


def times_of(*pairs: tuple[int, float]) -> StepTimes:
    times = StepTimes()
    for rows, took in pairs:
        times.observe(rows, took)
    return times


def test_measured_counts_are_predicted_as_measured_and_others_on_the_line_between() -> None:
    assert not StepTimes()
    assert StepTimes().predict(5) == 0.0
    times = times_of((1, 1.0), (5, 3.0), (9, 3.0))
    assert times
    assert [times.predict(rows) for rows in (1, 2, 3, 5, 7, 9)] == [1.0, 1.5, 2.0, 3.0, 3.0, 3.0]


def test_beyond_the_largest_the_average_slope_goes_on_and_a_row_always_costs_something() -> None:
    assert times_of((1, 1.0), (5, 3.0)).predict(9) == pytest.approx(5.0)
    times = times_of((1, 1.0), (4, 1.0))  # two equal times must not promise that rows are free for ever
    assert 1.0 < times.predict(40) < times.predict(80)
    times = times_of((8, 1.7))  # a single measurement tells about all counts
    assert 0.0 < times.predict(1) < times.predict(4) < 1.7 < times.predict(16)


def test_waiting_tells_how_many_rows_cost_nothing() -> None:
    times = StepTimes()
    times.observe(2, 10.0, busy=1.0)
    assert times.hidden_rows == 20
    assert times.predict(20) == 10.0
    assert times.predict(24) == pytest.approx(10.0 + 4 * 0.5)  # a row computes for half a second at most
    times.observe(2, 10.0, busy=9.0)
    assert times.hidden_rows == 0
    assert times.predict(4) > 10.0


def test_what_was_read_gives_way_to_what_is_measured() -> None:
    times = StepTimes.from_dict({"1": 9.0, "4": 10.0})
    assert (times.times_seen(1), times.times_observed(1), times.predict(1)) == (1, 0, 9.0)
    times.observe(1, 1.0)
    assert (times.times_seen(1), times.times_observed(1), times.predict(1)) == (1, 1, 1.0)
    assert times.predict(4) == 10.0


def test_one_disturbed_measurement_changes_little_and_old_ones_are_forgotten() -> None:
    assert times_of(*[(1, 1.0)] * 4, (1, 50.0), (1, 1.0)).predict(1) == 1.0
    assert times_of(*[(1, 1.0)] * 50, *[(1, 3.0)] * 8).predict(1) == 3.0


def test_a_first_measurement_far_off_is_not_believed() -> None:
    """It may have compiled a kernel; what comes after is believed."""
    times = times_of((1, 1.0), (2, 90.0))
    assert 1.0 < times.predict(2) < 5.0
    for _ in range(8):
        times.observe(2, 4.0)
    assert times.predict(2) == 4.0


def test_more_rows_never_take_less_time() -> None:
    times = times_of((1, 2.0), (4, 1.0), (8, 3.0))
    # A single row cannot take longer than four: one of the two was disturbed, and who knows which.
    assert times.predict(1) == times.predict(4) == 1.5
    # What was seen more often weighs more.
    assert times_of((1, 2.0), (4, 1.0), (4, 1.0), (4, 1.0), (8, 3.0)).predict(1) == 1.25
    assert times.predict(6) == pytest.approx(2.25)  # midway to 8


@given(st.lists(st.tuples(st.integers(1, 6), seconds), min_size=1, max_size=80))
def test_asking_between_measurements_changes_nothing(pairs: list[tuple[int, float]]) -> None:
    """What was asked for is brought up to date; what was not is made when all is known."""
    asked = StepTimes()
    for rows, took in pairs:
        asked.observe(rows, took)
        asked.predict(1)
    assert asked.to_dict() == times_of(*pairs).to_dict()


@given(observations)
def test_predictions_never_fall_with_rows(pairs: list[tuple[int, float]]) -> None:
    times = times_of(*pairs)
    predicted = [times.predict(rows) for rows in range(1, 100)]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(predicted))
    assert predicted[0] > 0.0
    assert all(map(math.isfinite, predicted))


@given(observations, observations)
def test_what_was_saved_predicts_the_same(draft: list[tuple[int, float]], verify: list[tuple[int, float]]) -> None:
    model = CostModel()
    model.draft, model.verify = times_of(*draft), times_of(*verify)
    again = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
    for rows in range(1, 70):
        assert again.draft.predict(rows) == model.draft.predict(rows)
        assert again.verify.predict(rows) == model.verify.predict(rows)
    assert CostModel.from_dict(GOOD).to_dict() == GOOD  # what the damages below are made from


GOOD = CostModel().to_dict()


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {name: value for name, value in GOOD.items() if name != "rounds"},
        {name: value for name, value in GOOD.items() if name != "computing"},
        {**GOOD, "verify": []},
        {**GOOD, "verify": {"one": 1.0}},
        {**GOOD, "verify": {"0": 1.0}},
        {**GOOD, "verify": {"1": "fast"}},
        {**GOOD, "verify": {"1": True}},
        {**GOOD, "verify": {"1": -1.0}},
        {**GOOD, "verify": {"1": math.nan}},
        {**GOOD, "verify": {"1": math.inf}},
        {**GOOD, "verify": {"1": 10**400}},
        {**GOOD, "rounds": [1]},
        {**GOOD, "rounds": {**GOOD["rounds"], "tokens": -1.0}},
    ],
    ids=lambda data: repr(data)[:60],
)
def test_costs_of_bad_data_are_refused(data: object) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        CostModel.from_dict(data)


def test_rounds_are_kept_and_recent_ones_count_most() -> None:
    costs = CostModel()
    for tokens in [1] * 500 + [5] * 500:
        costs.observe_pass(8, 0.5, 0.2)
        costs.observe_round(tokens, 0.6)
    totals = CostModel.from_dict(json.loads(json.dumps(costs.to_dict()))).totals
    assert totals == costs.totals
    assert totals.tokens / totals.rounds == pytest.approx(5, abs=0.05)
    assert (totals.rows / totals.rounds, totals.rest_s / totals.rounds) == pytest.approx((8, 0.1))
