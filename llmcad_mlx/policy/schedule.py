"""When the default policy measures what its figures do not tell, and when it rests: the mode of each round.

Decisions follow prices, and prices come from steps that were taken. A step that is never taken has no price, and
one measured on a disturbed machine keeps a wrong one for as long as it puts the policy off. So a few rounds do,
against the figures, what has to be measured again.
"""

from __future__ import annotations

from enum import Enum

from llmcad_mlx.policy.costs import CostModel

_LOOK_AGAIN = 32  # rounds without the draft after which one step is taken to see whether it would pay now
_CONSIDERED = 4  # from then on, the draft is considered in one round of so many
_SELDOM = 512  # rounds at most until the draft is tried again: each trial in vain doubles the wait for the next
_WELL_KNOWN = 3  # observations of a pass's size
_SURE = 2  # observations that make a step time believable
_LIKELY = 0.5  # probability of a node that is worth a look although its price seems too high
_PLAIN_AGAIN = 24  # rounds without a plain pass after which one is due, times the tokens a round gives
_YIELD_DECAY = 0.9


class Mode(Enum):
    """What a round is for: in words; whether drafters are asked before the pass; whether it has just one row."""

    ORDINARY = "what pays is drafted and verified", True, False
    RESTING = "no drafter is asked; what survived the last round is verified as far as it pays", False, False
    PLAIN = "one row, to measure plain decoding; lookups are asked, so that the target judges them", True, True
    PLAIN_RESTING = "one row, and no drafter is asked: both are due", False, True
    TRYING = "a draft step is taken that seems not to pay, to measure it", True, False
    LOOKING = "a second row is verified that seems not to pay, to measure it", True, False

    def __init__(self, meaning: str, asks: bool, one_row: bool) -> None:
        self.meaning = meaning
        self.asks = asks
        self.one_row = one_row


TRANSITIONS = {Mode.ORDINARY: (Mode.TRYING, Mode.LOOKING), Mode.RESTING: (Mode.LOOKING,)}
"""What a round may turn into after `begin` has chosen its mode: the first while it drafts, the second when it
submits. One that tries the draft measures its second row, too, but stays what it is."""


class Schedule:
    """Chooses the mode of each round, and counts the rounds to know what is due.

    With `forced`, for trees of a given size, prices decide nothing: every round is an ordinary one.
    """

    def __init__(self, costs: CostModel, forced: bool) -> None:
        self.mode = Mode.ORDINARY
        self._costs = costs
        self._forced = forced
        self._rounds = 0  # of the present text
        self._rested = False  # whether the last round, or the present one, is without lookups to save their time
        self._idle = 0  # rounds since the model was last used
        self._patience = _LOOK_AGAIN  # such rounds until it is tried again
        self._since_plain = 0  # rounds since a pass had a single row
        self._since_rows = 0  # rounds since a pass had more
        self._yield = 1.0  # tokens a round has given lately

    # -- what a round is for -----------------------------------------------------------------------------

    def begin(self, new_text: bool, broke: bool) -> None:
        """Choose the mode of a new round. `broke`: lookups have not earned a row of the pass."""
        self._rounds = 1 if new_text else self._rounds + 1
        if self._forced:
            return
        # What a plain pass takes decides about every tree, so it is measured again from time to time. That
        # round gives up `_yield` - 1 tokens: the more, the rarer. Where the target waits for weights, a plain
        # pass takes what any pass takes.
        plain = self._since_plain >= _PLAIN_AGAIN * self._yield and not self._costs.verify.hidden_rows
        # Where lookups cannot pay for a row and the model idles, every other round does without looking.
        self._rested = rests = broke and self._idle > 0 and not self._rested
        if plain:
            self.mode = Mode.PLAIN_RESTING if rests else Mode.PLAIN
        else:
            self.mode = Mode.RESTING if rests else Mode.ORDINARY

    def _turn(self, mode: Mode) -> None:
        if mode in TRANSITIONS.get(self.mode, ()):
            self.mode = mode

    # -- what is worth measuring -------------------------------------------------------------------------

    def knows_plain(self) -> bool:
        """Whether what a plain pass takes is believable; waiting for weights varies less than computing."""
        verify = self._costs.verify
        return verify.times_seen(1) >= (1 if verify.hidden_rows else _SURE)

    def considers_model(self) -> bool:
        """Whether steps of the model are priced in this round; not while plain decoding has to be measured."""
        if self.mode.one_row or not self.knows_plain():
            return False
        idle = self._idle
        return idle <= _LOOK_AGAIN or not idle % _CONSIDERED or self._costs.verify.hidden_rows > 0

    def tries_model(self, balance: float) -> bool:
        """Whether to take one step that seems not to pay: its price was measured too rarely or long ago.

        balance: of the model's account. A look costs as much as a token or two, which a short text never earns
        back.
        """
        draft = self._costs.draft
        unknown = sum(draft.times_observed(rows) for rows in range(1, 4)) < _SURE
        if unknown or (self._rounds > _LOOK_AGAIN and self._idle >= self._patience and balance > 0.0):
            self._turn(Mode.TRYING)
            return True
        return False

    def looks_at_two(self, probability: float, balance: float) -> bool:
        """Whether to verify a second row, of that `probability`, that seems too dear: its price was measured too
        rarely or long ago. balance: of the account that pays for it."""
        looks = (
            probability >= _LIKELY
            and balance > 0.0
            and self.knows_plain()
            and (self._costs.verify.times_observed(2) < _WELL_KNOWN or self._since_rows >= _LOOK_AGAIN)
        )
        if looks:
            self._turn(Mode.LOOKING)
        return looks

    def is_new(self, rows: int) -> bool:
        """Whether passes of so many rows were measured so rarely that a disturbed one could rule them out."""
        return self._costs.verify.times_seen(rows) < _WELL_KNOWN

    # -- what has happened -------------------------------------------------------------------------------

    def verified(self, rows: int, num_tokens: int, model_used: bool, model_right: bool) -> None:
        """A pass of `rows` rows gave `num_tokens`; whether the model drafted, and whether any of it was right."""
        self._since_plain = 0 if rows == 1 else self._since_plain + 1
        self._since_rows = self._since_rows + 1 if rows == 1 else 0
        self._yield = self._yield * _YIELD_DECAY + num_tokens * (1 - _YIELD_DECAY)
        if not model_used:
            self._idle += 1
            return
        if self.mode is not Mode.TRYING:
            self._patience = _LOOK_AGAIN
        elif self._idle >= self._patience and not model_right:
            self._patience = min(2 * self._patience, _SELDOM)
        self._idle = 0
