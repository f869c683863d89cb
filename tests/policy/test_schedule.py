"""Which mode a round of the default policy is in, and what it may turn into."""

from __future__ import annotations

import pytest

from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.schedule import Mode, Schedule


def schedule(forced: bool = False, plain_rounds: int = 2, rounds_with_rows: int = 0) -> Schedule:
    """After so many rounds without the model."""
    costs = CostModel()
    made = Schedule(costs, forced)
    for rows in [1] * plain_rounds + [2] * rounds_with_rows:
        costs.verify.observe(rows, float(rows))
        costs.draft.observe(1, 0.1)
        made.begin(new_text=False, broke=False)
        made.verified(rows, 1, model_used=False, model_right=False)
    return made


@pytest.mark.parametrize(
    ("due", "broke", "mode"),
    [
        (False, False, Mode.ORDINARY),
        (False, True, Mode.RESTING),
        (True, False, Mode.PLAIN),
        (True, True, Mode.PLAIN_RESTING),
    ],
)
def test_a_round_begins_with_what_is_due(due: bool, broke: bool, mode: Mode) -> None:
    made = schedule(rounds_with_rows=40 if due else 2)
    made.begin(new_text=False, broke=broke)
    assert made.mode is mode
    made.begin(new_text=False, broke=broke)
    assert made.mode is (Mode.PLAIN if due else Mode.ORDINARY)  # rest is for every other round at most
    assert made.considers_model() is not due


def test_trees_of_a_given_size_are_always_ordinary() -> None:
    made = schedule(forced=True, rounds_with_rows=40)
    made.begin(new_text=False, broke=True)
    assert made.mode is Mode.ORDINARY


def test_a_plain_pass_is_not_due_where_loading_hides_rows() -> None:
    made = schedule(rounds_with_rows=40)
    made._costs.verify.observe(2, 10.0, busy=0.1)
    made.begin(new_text=False, broke=False)
    assert made.mode is Mode.ORDINARY


@pytest.mark.parametrize("broke", [False, True])
def test_a_likely_second_row_is_looked_at_while_its_price_is_unknown(broke: bool) -> None:
    made = schedule()
    made.begin(new_text=False, broke=broke)
    assert not made.looks_at_two(0.2, balance=1.0)
    assert not made.looks_at_two(0.8, balance=0.0)
    assert made.mode is (Mode.RESTING if broke else Mode.ORDINARY)
    assert made.looks_at_two(0.8, balance=1.0)
    assert made.mode is Mode.LOOKING


def test_a_round_that_tries_the_draft_stays_one_when_it_looks_at_two_rows() -> None:
    made = schedule(plain_rounds=40)
    made.begin(new_text=False, broke=False)
    assert made.tries_model(balance=1.0)
    assert made.mode is Mode.TRYING
    assert made.looks_at_two(0.8, balance=1.0)
    assert made.mode is Mode.TRYING


def test_trials_in_vain_become_rare_and_one_that_helps_makes_them_frequent_again() -> None:
    made = schedule(plain_rounds=40)
    waits = []
    for right in (False, False, False, True, False):
        wait = 0
        while not made.tries_model(balance=1.0):
            made.verified(1, 1, model_used=False, model_right=False)
            made.begin(new_text=False, broke=False)
            wait += 1
        waits.append(wait)
        made.verified(2, 1, model_used=True, model_right=right)
        made.begin(new_text=False, broke=False)
        if right:  # used from then on, until it does not pay any more
            made.verified(2, 2, model_used=True, model_right=True)
            made.begin(new_text=False, broke=False)
    assert waits == [0, 64, 128, 256, 32]
