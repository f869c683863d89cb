"""What may be risked and must be measured: prices, accounts of gains and losses, modes of rounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.ledger import DraftAccount, LookupAccount, Mode, Prices, Schedule
from tests.support.trees import measured

ROUNDS = st.lists(st.tuples(st.integers(1, 8), st.floats(-5.0, 5.0)), max_size=60)


def test_a_draft_that_loses_is_left_alone_and_tried_again() -> None:
    account = DraftAccount()
    rounds = 0
    while account.drafting:
        account.book(1, -0.5)
        rounds += 1
    assert 6 <= rounds * 0.5 <= 7  # so many tokens a useless draft may cost
    tokens = 0
    while not account.drafting:
        account.book(1, None)
        tokens += 1
    assert 400 <= tokens <= 450  # 1.5 % of them pay for the next try
    assert account.balance > 0
    account.book(1, -1000.0)
    assert account.drafting  # one disturbed round does not give it up


@given(ROUNDS)
def test_a_draft_account_saves_no_more_than_two_tries(rounds: list[tuple[int, float]]) -> None:
    account = DraftAccount()
    for tokens, net in rounds:
        account.book(tokens, net)
        assert account.balance <= 6.0
        assert account.drafting or account.balance < 3.0


@given(ROUNDS)
def test_lookups_lose_no_more_than_they_won_and_were_allowed(rounds: list[tuple[int, float]]) -> None:
    """For whoever risks only what the account pays for."""
    account = LookupAccount()
    gained = risked = allowed = 0.0
    for tokens, net in rounds:
        if net < 0.0 and -net > account.balance:
            continue  # not paid for
        account.book(tokens, net)
        gained, risked, allowed = gained + max(net, 0.0), risked + max(-net, 0.0), allowed + 0.015 * tokens
        assert risked <= gained + allowed + 1e-9
        assert account.balance <= 8.0


@given(st.lists(st.tuples(st.integers(1, 8), st.one_of(st.none(), st.floats(-5.0, 5.0))), max_size=60))
def test_what_is_earned_without_a_row_does_not_let_a_text_lose_on(rounds: list[tuple[int, float | None]]) -> None:
    """Once it has lost half a token more than it was allowed, nothing more is risked."""
    account = LookupAccount()
    real = 0.0
    for tokens, net in rounds:
        if net is None:
            account.book(tokens, 0.0, missed=True)
        elif net < 0.0 and -net > account.balance:
            continue  # not paid for
        else:
            assert net >= 0.0 or real > -0.5
            account.book(tokens, net)
        real = min(real + (net or 0.0) + 0.015 * tokens, 8.0)


def test_a_text_that_has_lost_nothing_may_risk_all_it_has_earned() -> None:
    """However dear a row is."""
    account = LookupAccount()
    for _ in range(4):
        account.book(1, 0.0, missed=True)
    assert account.balance > 1.5


def test_a_new_text_starts_afresh() -> None:
    account = LookupAccount()
    opening = account.balance
    for net in (3.0, -4.0):
        account.book(1, net)
        assert account.balance != opening
        account.begin(new_text=True)
        assert account.balance == opening


def priced(passes: dict[int, float], steps: dict[int, float] | None = None, max_nodes: int = 64) -> Prices:
    prices = Prices(measured(passes, steps), max_nodes)
    prices.begin()
    return prices


def test_a_second_costs_what_it_yields() -> None:
    prices = priced({1: 2.0, 4: 3.5}, {1: 0.5, 3: 0.7})
    assert prices.rate == pytest.approx(0.5)  # tokens of plain decoding
    assert prices.more_rows(1, 3) == pytest.approx(0.75)
    assert prices.more_rows(1, 1) == pytest.approx(0.25)
    assert prices.step(2) == pytest.approx(0.3)
    assert prices.step(2, free_seconds=0.4) == pytest.approx(0.1)
    assert prices.step(2, free_seconds=9.0) == 0.0


def test_a_second_is_worth_what_rounds_have_yielded_lately_or_plain_decoding_does() -> None:
    prices = priced({1: 1.0})

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
    prices = priced({1: 1.0, 2: 1.5})
    before = prices.more_rows(1, 1)
    for _ in range(20):
        prices._costs.verify.observe(2, 1.9)
    assert prices.more_rows(1, 1) == before
    prices.begin()
    assert prices.more_rows(1, 1) == pytest.approx(0.9)


def test_the_first_tree_is_priced_by_what_it_promises() -> None:
    """Not as if its seconds were worth no more than plain decoding; once a round has told, that counts."""
    prices = priced({1: 1.0, 4: 1.0}, max_nodes=4)
    prices.begin()
    assert not prices.expect([1.0], drafted_s=0.5)  # less than plain decoding
    assert prices.rate == pytest.approx(1.0)
    assert prices.more_rows(1, 3) == 0.0
    assert prices.expect([1.0, 0.9, 0.8, 0.0], drafted_s=0.5)
    assert prices.rate == pytest.approx(2.7 / 1.5)
    assert not prices.expect([1.0, 0.9, 0.8, 0.0], drafted_s=1.0)  # it promised more once
    prices.observe_round(2, 2.0)
    prices.begin()
    assert not prices.expect([1.0, 0.9, 0.8, 0.0], drafted_s=0.5)
    assert prices.rate == pytest.approx(1.0)


def test_rows_beyond_the_largest_pass_cost_no_more() -> None:
    """Where the tree is full, another row would take another's place."""
    prices = priced({1: 1.0, 4: 2.0, 5: 2.5}, max_nodes=4)
    assert prices.more_rows(4, 1) == pytest.approx(0.5)
    assert prices.more_rows(4, 60) == prices.more_rows(9, 60) == pytest.approx(0.5)


# -- modes of rounds ----------------------------------------------------------------------------------------


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


def test_a_plain_pass_is_not_due_for_trees_of_a_given_size_or_where_loading_hides_rows() -> None:
    given, hidden = schedule(forced=True, rounds_with_rows=40), schedule(rounds_with_rows=40)
    hidden._costs.verify.observe(2, 10.0, busy=0.1)
    given.begin(new_text=False, broke=True)
    hidden.begin(new_text=False, broke=False)
    assert given.mode is hidden.mode is Mode.ORDINARY


def test_one_plain_pass_that_waited_is_enough_and_stays_so() -> None:
    """Streamed, a pass takes as long as a whole round: the next one drafts, whatever passes came between."""
    costs = CostModel()
    made = Schedule(costs, forced=False)
    costs.draft.observe(1, 0.1)
    made.begin(new_text=True, broke=True)
    assert not made.considers_model()
    costs.verify.observe(1, 1.0, busy=0.1)
    made.verified(1, 1, model_used=False, model_right=False)
    for waited in (True, False):
        made.begin(new_text=False, broke=True)
        assert made.mode is Mode.ORDINARY
        assert made.considers_model()
        costs.verify.observe(32, 1.5, busy=0.1 if waited else 1.5)
        made.verified(32, 8, model_used=True, model_right=True)


@pytest.mark.parametrize("waits", [False, True])
def test_rounds_rest_where_asking_takes_time_that_waiting_does_not_hide(waits: bool) -> None:
    made = schedule(plain_rounds=4)
    made._costs.verify.observe(1, 1.0, busy=0.1 if waits else 1.0)
    made.begin(new_text=False, broke=True)
    assert made.mode is (Mode.ORDINARY if waits else Mode.RESTING)


@pytest.mark.parametrize("broke", [False, True])
def test_a_likely_second_row_is_tried_while_its_price_is_unknown(broke: bool) -> None:
    made = schedule(plain_rounds=3)
    made.begin(new_text=False, broke=broke)
    assert not made.tries_row(0.2, balance=1.0)
    assert not made.tries_row(0.8, balance=0.0)
    assert made.mode is (Mode.RESTING if broke else Mode.ORDINARY)
    assert made.tries_row(0.8, balance=1.0)
    assert made.mode is Mode.TRYING_ROW

    made = schedule(plain_rounds=40)
    made.begin(new_text=False, broke=False)
    assert made.tries_model(balance=1.0)
    assert made.tries_row(0.8, balance=1.0)
    assert made.mode is Mode.TRYING_DRAFT  # it stays one


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
