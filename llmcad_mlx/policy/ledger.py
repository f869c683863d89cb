"""What the default policy may risk and has to measure: prices, accounts of gains and losses, the mode of a round.

Prices and accounts are in tokens. A second is worth the tokens that decoding yields in it, so a step costs its
seconds times that rate. A policy that maximises what it expects still loses where it expects the wrong things of a
text. An account bounds that loss: gains may be risked again, losses are gone, each token pays in an allowance.

Prices come from steps that were taken. A step that is never taken has no price, and one measured on a disturbed
machine keeps a wrong one as long as it puts the policy off. So a few rounds measure again, against the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from llmcad_mlx.policy.costs import CostModel

EXPLORE = 2  # times the largest measured row count that a step may have
_RATE_DECAY = 0.9  # weight of the past at each round
_TINY = 0.01  # probability of a node that is not worth a row, whatever that costs

_OPENING = 3.0
_MOST = 6.0  # gains are not saved up for ever: a draft that turns bad is noticed within so many tokens
_GIVE_UP = -3.0  # stop drafting with the model
_TRY_AGAIN = 3.0  # start again, for as long as the allowance allows
_ALLOWANCE = 0.015  # paid into each account for each token, which bounds what useless drafting may cost
_WORST_ROUND = -3.0  # one disturbed round says little about the draft

_LOOKUP_MOST = 8.0  # enough for the widest pass that copied text is worth
_LOOKUP_CREDIT = 0.4  # for having been right without a row
_LOOKUP_LOSS = 0.5  # of a text, besides the allowance, after which nothing more is risked

_PATIENCE = 32  # rounds without the draft after which one step is taken to see whether it would pay now
_CONSIDERED = 4  # from then on, the draft is considered in one round of so many
_SELDOM = 512  # rounds at most until the draft is tried again: each trial in vain doubles the wait for the next
_WELL_KNOWN = 3  # observations of a pass's size
_SURE = 2  # observations that make a step time believable
_LIKELY = 0.5  # probability of a node that is worth a trial although its price seems too high
_PLAIN_AGAIN = 24  # rounds without a plain pass after which one is due, times the tokens a round gives
_YIELD_DECAY = 0.9


class DraftAccount:
    """What drafting with the model has gained or lost. `drafting`: whether to draft with it.

    A draft that keeps losing against plain decoding overdraws its account and is left alone until the
    allowance has paid for another try. So a useless one costs a few tokens and 1.5 % of the time.
    """

    def __init__(self) -> None:
        self.balance = _OPENING
        self.drafting = True

    def book(self, num_tokens: int, net: float | None) -> None:
        """A round gave `num_tokens`, `net` more than plain decoding in its time; None: without the model."""
        self.balance += _ALLOWANCE * num_tokens
        if net is not None:
            self.balance += max(net, _WORST_ROUND)
        self.balance = min(self.balance, _MOST)
        self.drafting = self.balance >= (_GIVE_UP if self.drafting else _TRY_AGAIN)


class LookupAccount:
    """What rows of the target's pass for looked-up tokens have gained or lost in the present text.

    A text opens with nothing, for one says little about the next: lookups that were right all the time may be
    wrong from a new text's first token on. The first row is earned by lookups that were right without one, which
    costs nothing. But a text whose rows have lost `_LOOKUP_LOSS` tokens risks nothing more, whatever it earned,
    until the allowance has paid for that.

    `declined`: whether this round's lookups were worth a row that the account did not pay for.
    """

    def __init__(self) -> None:
        self.begin(new_text=True)

    def begin(self, new_text: bool) -> None:
        """A round begins. In a new text, what was won or lost before counts no more."""
        self.declined = False
        if new_text:
            self._earned = 0.0
            self._left = _LOOKUP_LOSS  # what the text may still lose; credit does not add to it

    @property
    def balance(self) -> float:
        """What may be risked now."""
        return self._earned if self._left > 0.0 else min(self._earned, 0.0)

    def affordable(self, rows: int, prices: Prices) -> int:
        """As many of `rows` rows of the pass as the balance pays for; the first, the root's, is free."""
        paid, balance = rows, self.balance
        while paid > 1 and prices.more_rows(1, paid - 1) > balance:
            paid -= 1
        self.declined = paid == 1 < rows
        return paid

    def book(self, num_tokens: int, net: float, missed: bool = False) -> None:
        """A round gave `num_tokens`, of which lookups gained `net` after the price of their rows. missed: a lookup
        was right but not paid for, a reason to trust the next."""
        net += _ALLOWANCE * num_tokens
        self._earned = min(self._earned + net + (_LOOKUP_CREDIT if missed else 0.0), _LOOKUP_MOST)
        self._left = min(self._left + net, _LOOKUP_MOST)


class Ranking(NamedTuple):
    """A tree's cumulative confidences, largest first, as many as a pass may have.

    `rows`: how many of them gain most over the price of their rows; `net`: how much more than the root alone.
    """

    probabilities: Sequence[float]
    rows: int
    net: float


class Prices:
    """Prices of rows in the target's pass and of draft steps, in tokens.

    `rate`: tokens that a second was worth when the round began. Each is asked for often and computed once.
    """

    def __init__(self, costs: CostModel, max_nodes: int) -> None:
        self.rate = 0.0
        self._costs = costs
        self._max_nodes = max_nodes
        self._passes = [0.0]
        self._tokens = self._seconds = 0.0  # fading sums over rounds

    def begin(self) -> None:
        """A new round: forget what the last one paid."""
        # A second is worth what one has yielded lately, at least what plain decoding would.
        self.rate = max(self._costs.plain_rate, self._tokens / self._seconds if self._seconds > 0.0 else 0.0)
        self._passes = [0.0]

    def observe_round(self, num_tokens: int, seconds: float) -> None:
        """A round gave `num_tokens` tokens in `seconds`, everything included."""
        self._tokens = self._tokens * _RATE_DECAY + num_tokens
        self._seconds = self._seconds * _RATE_DECAY + seconds

    def expect(self, probabilities: Sequence[float], drafted_s: float) -> bool:
        """Until a round has told, a second is worth what the tree at hand promises, if more than plain decoding.

        Otherwise the first tree of a text would be priced as if nothing better could be done with its seconds.
        `probabilities`: largest first; `drafted_s`: spent on them. Whether that has changed prices.
        """
        if self._seconds > 0.0:
            return False
        promised, before = 0.0, self.rate
        for rows, probability in enumerate(probabilities[: self.most_nodes()], 1):
            promised += probability
            seconds = drafted_s + self._costs.verify.predict(rows)
            self.rate = max(self.rate, promised / seconds if seconds > 0.0 else 0.0)
        if self.rate > before:
            self._passes = [0.0]
        return self.rate > before

    def forget_rounds(self) -> None:
        """What comes is not like what was: a second is worth what plain decoding yields, until rounds tell."""
        self._tokens = self._seconds = 0.0

    def more_rows(self, rows: int, more: int) -> float:
        """Tokens that `more` rows in the target's pass cost beyond `rows`."""
        last = min(rows + more, self._max_nodes + 1)
        return self._pass(last) - self._passes[min(rows, self._max_nodes)]

    def step(self, rows: int, free_seconds: float = 0.0) -> float:
        """Tokens that a draft step of so many rows costs, of which `free_seconds` delay nothing."""
        return self.rate * max(self._costs.draft.predict(rows) - free_seconds, 0.0)

    def _pass(self, rows: int) -> float:
        known = self._passes
        if rows >= len(known):
            predict = self._costs.verify.predict
            known.extend(self.rate * predict(more) for more in range(len(known), rows + 1))
        return known[rows]

    def most_nodes(self) -> int:
        """Of a pass. Costs beyond what was measured are a guess: larger trees are tried step by step."""
        verify = self._costs.verify
        return min(self._max_nodes, max(EXPLORE * verify.most_rows, verify.hidden_rows, 1))

    def rank(self, probabilities: Sequence[float]) -> Ranking:
        """For a tree's cumulative confidences, largest first."""
        hidden = self._costs.verify.hidden_rows
        probabilities = probabilities[: self.most_nodes()]
        self._pass(len(probabilities))
        best, best_net, net, passes = 1, 0.0, 0.0, self._passes
        for rows in range(2, len(probabilities) + 1):
            probability = probabilities[rows - 1]
            if probability < _TINY and rows > hidden:
                break
            net += probability - (passes[rows] - passes[rows - 1])
            if net > best_net + 1e-9:
                best, best_net = rows, net
        return Ranking(probabilities, best, best_net)


class Mode(Enum):
    """What a round is for: in words; whether drafters are asked before the pass; whether it has just one row."""

    ORDINARY = "what pays is drafted and verified", True, False
    RESTING = "no drafter is asked; what survived the last round is verified as far as it pays", False, False
    PLAIN = "one row, to measure plain decoding; lookups are asked, so that the target judges them", True, True
    PLAIN_RESTING = "one row, and no drafter is asked: both are due", False, True
    TRYING_DRAFT = "a draft step is taken that seems not to pay, to measure it", True, False
    TRYING_ROW = "a second row is verified that seems not to pay, to measure it", True, False

    def __init__(self, meaning: str, asks: bool, one_row: bool) -> None:
        self.asks = asks
        self.one_row = one_row


class Schedule:
    """Chooses the mode of each round, and counts the rounds to know what is due.

    `begin` chooses it. An ordinary round may then turn into one that tries the draft, while it drafts, and one
    that is ordinary or rests into one that tries a row, when it submits. With `forced`, for trees of a given size,
    prices decide nothing: every round is an ordinary one.
    """

    def __init__(self, costs: CostModel, forced: bool) -> None:
        self.mode = Mode.ORDINARY
        self._costs = costs
        self._forced = forced
        self._rounds = 0  # of the present text
        self._rested = False  # whether the last round, or the present one, is without lookups to save their time
        self._plain_passes = _SURE  # so many make what they take believable
        self.knew_plain = False
        """Whether what a plain pass takes was known when the round began, so that it was free to draft."""
        self._idle = 0  # rounds since the model was last used, of those that could price it
        self._patience = _PATIENCE  # such rounds until it is tried again
        self._since_plain = 0  # rounds since a pass had a single row
        self._since_rows = 0  # rounds since a pass had more
        self._yield = 1.0  # tokens a round has given lately

    def begin(self, new_text: bool, broke: bool) -> None:
        """Choose the mode of a new round. `broke`: lookups have not earned a row of the pass."""
        self._rounds = 1 if new_text else self._rounds + 1
        if self._forced:
            return
        # What a plain pass takes decides about every tree, so it is measured again from time to time. That
        # round gives up `_yield` - 1 tokens: the more, the rarer. Where the target waits for weights, a plain
        # pass takes what any pass takes.
        plain = self._since_plain >= _PLAIN_AGAIN * self._yield and not self._costs.verify.hidden_rows
        # Where lookups cannot pay for a row and the model idles, every other round does without asking. Beside
        # waiting for weights, asking takes no time.
        waits = self._costs.verify.hidden_rows > 0
        self._rested = rests = broke and self._idle > 0 and not self._rested and not waits
        if plain:
            self.mode = Mode.PLAIN_RESTING if rests else Mode.PLAIN
        else:
            self.mode = Mode.RESTING if rests else Mode.ORDINARY
        self.knew_plain = self.knows_plain()

    def knows_plain(self) -> bool:
        """Whether what a plain pass takes is believable; waiting for weights varies less than computing."""
        return self._costs.verify.times_seen(1) >= self._plain_passes

    def considers_model(self) -> bool:
        """Whether steps of the model are priced in this round; not while plain decoding has to be measured."""
        if self.mode.one_row or not self.knows_plain():
            return False
        idle = self._idle
        return idle <= _PATIENCE or not idle % _CONSIDERED or self._costs.verify.hidden_rows > 0

    def tries_model(self, balance: float) -> bool:
        """Whether to take one step that seems not to pay: its price was measured too rarely or long ago.

        balance: of the model's account. A trial costs a token or two, which a short text never earns back.
        """
        draft = self._costs.draft
        unknown = sum(draft.times_observed(rows) for rows in range(1, 4)) < _SURE
        if unknown or (self._rounds > _PATIENCE and self._idle >= self._patience and balance > 0.0):
            if self.mode is Mode.ORDINARY:
                self.mode = Mode.TRYING_DRAFT
            return True
        return False

    def tries_row(self, probability: float, balance: float) -> bool:
        """Whether to verify a second row, of that `probability`, that seems too dear: its price was measured too
        rarely or long ago. balance: of the account that pays for it."""
        tries = (
            probability >= _LIKELY
            and balance > 0.0
            and self.knows_plain()
            and (self._costs.verify.times_observed(2) < _WELL_KNOWN or self._since_rows >= _PATIENCE)
        )
        if tries and self.mode in (Mode.ORDINARY, Mode.RESTING):
            self.mode = Mode.TRYING_ROW
        return tries

    def is_new(self, rows: int) -> bool:
        """Whether passes of so many rows were measured so rarely that a disturbed one could rule them out."""
        return self._costs.verify.times_seen(rows) < _WELL_KNOWN

    def verified(self, rows: int, num_tokens: int, model_used: bool, model_right: bool) -> None:
        """A pass of `rows` rows gave `num_tokens`; whether the model drafted, and whether any of it was right."""
        if rows == 1 and self._costs.verify.hidden_rows:
            self._plain_passes = 1
        self._since_plain = 0 if rows == 1 else self._since_plain + 1
        self._since_rows = self._since_rows + 1 if rows == 1 else 0
        self._yield = self._yield * _YIELD_DECAY + num_tokens * (1 - _YIELD_DECAY)
        if not model_used:
            self._idle += self.knew_plain
            return
        if self.mode is not Mode.TRYING_DRAFT:
            self._patience = _PATIENCE
        elif self._idle >= self._patience and not model_right:
            self._patience = min(2 * self._patience, _SELDOM)
        self._idle = 0
