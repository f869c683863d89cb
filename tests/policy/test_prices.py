"""Prices of rows and draft steps in tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.ledger import Prices


def measured(passes: dict[int, float], steps: dict[int, float] | None = None, max_nodes: int = 64) -> Prices:
    costs = CostModel()
    for rows, seconds in passes.items():
        costs.verify.observe(rows, seconds)
    for rows, seconds in (steps or {}).items():
        costs.draft.observe(rows, seconds)
    prices = Prices(costs, max_nodes)
    prices.begin()
    return prices


def test_a_second_costs_what_it_yields() -> None:
    prices = measured({1: 2.0, 4: 3.5}, {1: 0.5, 3: 0.7})
    assert prices.rate == pytest.approx(0.5)  # tokens of plain decoding
    assert prices.more_rows(1, 3) == pytest.approx(0.75)
    assert prices.more_rows(1, 1) == pytest.approx(0.25)
    assert prices.step(2) == pytest.approx(0.3)
    assert prices.step(2, free_seconds=0.4) == pytest.approx(0.1)
    assert prices.step(2, free_seconds=9.0) == 0.0


def test_a_second_is_worth_what_rounds_have_yielded_lately_or_plain_decoding_does() -> None:
    prices = measured({1: 1.0})

    def rate_after(num_tokens: int, rounds: int = 1) -> float:
        for _ in range(rounds):
            prices.observe_round(num_tokens, 0.5)
        prices.begin()
        return prices.rate

    assert rate_after(3) == 6.0
    assert 2.0 < rate_after(1) < 6.0
    assert rate_after(1, rounds=100) == pytest.approx(2.0, rel=1e-3)
    assert rate_after(0, rounds=100) == 1.0
    rate_after(3)
    prices.forget_rounds()
    prices.begin()
    assert prices.rate == 1.0


def test_prices_stand_until_the_next_round() -> None:
    prices = measured({1: 1.0, 2: 1.5})
    before = prices.more_rows(1, 1)
    for _ in range(20):
        prices._costs.verify.observe(2, 1.9)
    assert prices.more_rows(1, 1) == before
    prices.begin()
    assert prices.more_rows(1, 1) == pytest.approx(0.9)


def test_rows_beyond_the_largest_pass_cost_no_more() -> None:
    """Where the tree is full, another row would take another's place."""
    prices = measured({1: 1.0, 4: 2.0, 5: 2.5}, max_nodes=4)
    assert prices.more_rows(4, 1) == pytest.approx(0.5)
    assert prices.more_rows(4, 60) == prices.more_rows(9, 60) == pytest.approx(0.5)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40),
    st.lists(st.floats(0.0, 1.0), min_size=40, max_size=40),
)
def test_as_many_rows_as_gain_most(found: list[float], dearer: list[float]) -> None:
    seconds, passes = 1.0, {}
    for rows, more in enumerate(dearer, 1):
        passes[rows] = seconds
        seconds += more
    prices = measured(passes)
    probabilities = [1.0, *sorted(found, reverse=True)]
    ranking = prices.rank(probabilities)
    likely = sum(probability >= 0.01 for probability in ranking.probabilities)
    nets = [
        sum(ranking.probabilities[1:rows]) - prices.more_rows(1, rows - 1) for rows in range(1, max(likely, 1) + 1)
    ]
    assert ranking.net == pytest.approx(max(nets), abs=1e-6)
    assert nets[ranking.rows - 1] == pytest.approx(max(nets), abs=1e-6)
