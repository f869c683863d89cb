"""Accounts of what speculation gains and costs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx.policy.ledger import DraftAccount, LookupAccount

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


def test_one_disturbed_round_does_not_give_a_draft_up() -> None:
    account = DraftAccount()
    account.book(1, -1000.0)
    assert account.drafting


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
            account.book_missed(tokens)
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
        account.book_missed(1)
    assert account.balance > 1.5


def test_a_new_text_starts_afresh() -> None:
    account = LookupAccount()
    opening = account.balance
    for net in (3.0, -4.0):
        account.book(1, net)
        assert account.balance != opening
        account.begin(new_text=True)
        assert account.balance == opening


def test_a_lookup_that_was_right_but_not_paid_for_earns_credit() -> None:
    account, other = LookupAccount(), LookupAccount()
    account.book_missed(1)
    other.book(1, 0.0)
    assert account.balance > other.balance
