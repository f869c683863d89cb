"""What steps cost in seconds by number of rows, and what rounds have given: learned from both, without a clock.

Policies decide by these figures, forecasts are made from them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any

_DECAY = 0.99  # weight of the past at each round: the last hundred count
_REMEMBERED = 15  # observations per row count; their lower median shrugs off a disturbed one, even of two
_FIRST_LIMIT = 2.5  # times the prediction, for the first observation of a row count
_WAITING = 0.5  # a forward computes for less than this share of its time where it waits for weights
_MOST_HIDDEN = 1024
_ROW_SHARE = 0.1  # cost of one more row, relative to a single row, before any was measured
_STEPS = ("draft", "verify", "computing")


@dataclass(slots=True)
class RoundTotals:
    """Fading sums over rounds. `rows`: nodes sent to the target; `rest_s`: seconds of the rounds outside the
    target's pass, most of them drafting that loading did not hide."""

    rounds: float = 0.0
    tokens: float = 0.0
    rows: float = 0.0
    rest_s: float = 0.0


class StepTimes:
    """Seconds of a forward by its number of rows.

    Between measured counts it interpolates; beyond the largest it goes on with the last slope. `hidden_rows`: a
    forward that has waited for weights would not have taken longer with so many rows, 0 if it has not waited.
    """

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}  # of `_seen`; sorting anew what has not changed would be felt
        self._read: set[int] = set()  # counts known from `from_dict` alone
        self._rows: list[int] = []
        self._fitted: dict[int, float] | None = None  # None: to be made when somebody asks
        self._row_seconds = 0.0  # at most, for a row beyond the hidden ones
        self.hidden_rows = 0

    def observe(self, rows: int, seconds: float, busy: float | None = None) -> None:
        """One forward of `rows` rows took `seconds`, `busy` of them computing (all, if not given).

        Computing grows at most in proportion to the rows, so waiting tells how many more would have found room.

        A first observation far above what its neighbours suggest is cut to a multiple of that: it may have
        compiled a kernel, and believing it would keep the policy from ever trying that count again.
        """
        busy = seconds if busy is None else min(max(busy, seconds / _MOST_HIDDEN), seconds)
        self._row_seconds = busy / rows
        self.hidden_rows = int(rows * seconds / busy) if busy < _WAITING * seconds else 0
        if self._rows and rows not in self._seen:
            seconds = min(seconds, _FIRST_LIMIT * self.predict(rows))
        if rows in self._read:  # saved on another day, when the machine may have been busy
            self._read.discard(rows)
            self._seen[rows].clear()
        if rows not in self._seen:
            insort(self._rows, rows)
            self._seen[rows] = deque(maxlen=_REMEMBERED)
        seen = self._seen[rows]
        seen.append(seconds)
        before, median = self._medians.get(rows), median_low(seen)
        self._medians[rows] = median
        if before != median or len(seen) < _REMEMBERED:
            self._refit(rows, median)

    def times_seen(self, rows: int) -> int:
        """How many observations of exactly `rows` rows are remembered."""
        return len(self._seen.get(rows, ()))

    def times_observed(self, rows: int) -> int:
        """The same without what `from_dict` has read."""
        return 0 if rows in self._read else self.times_seen(rows)

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def most_rows(self) -> int:
        """The largest measured row count, 0 before the first."""
        return self._rows[-1] if self._rows else 0

    def predict(self, rows: int) -> float:
        """Expected seconds; 0.0 before the first observation."""
        fitted = self._times()
        exact = fitted.get(rows)  # most are asked for what was measured, and that dozens of times a round
        if exact is not None or not fitted:
            return exact or 0.0
        at = bisect_left(self._rows, rows)
        if at == 0:
            # Fewer rows than ever measured: take the assumed share off, never below one row's.
            first = self._rows[0]
            return fitted[first] * (1 + _ROW_SHARE * (rows - 1)) / (1 + _ROW_SHARE * (first - 1))
        low = self._rows[at - 1]
        low_s = fitted[low]
        if at == len(self._rows):
            if self.hidden_rows > low:
                return low_s + self._row_seconds * max(rows - self.hidden_rows, 0)
            first = self._rows[0]
            slope = fitted[first] * _ROW_SHARE / (1 + _ROW_SHARE * (first - 1))  # as assumed
            if first != low:
                slope = max((low_s - fitted[first]) / (low - first), slope * 0.1)
            return low_s + slope * (rows - low)
        high = self._rows[at]
        return low_s + (fitted[high] - low_s) * (rows - low) / (high - low)

    def _refit(self, rows: int, median: float) -> None:
        """Now that `rows` rows take `median`: most often that changes no other's time."""
        fitted, self._fitted = self._fitted, None
        if fitted is not None and rows in fitted:
            at = bisect_left(self._rows, rows)
            low = fitted[self._rows[at - 1]] if at else -1.0
            high = fitted[self._rows[at + 1]] if at + 1 < len(self._rows) else float("inf")
            if low < fitted[rows] < high and low < median < high:
                fitted[rows] = median  # it is in no pool, and gets into none
                self._fitted = fitted

    def _times(self) -> dict[int, float]:
        """Seconds by row count, for each of `_rows`."""
        if self._fitted is not None:
            return self._fitted
        # Fewer rows never take more time. Where they seem to, noise says so: neighbours are pooled until the
        # order is right (isotonic regression), each weighing as much as it was observed.
        pooled: list[tuple[float, int, int]] = []  # seconds, observations, row counts in the pool
        for rows in self._rows:
            seconds, seen, size = self._medians[rows], len(self._seen[rows]), 1
            while pooled and pooled[-1][0] > seconds:
                other, weight, others = pooled.pop()
                seconds = (seconds * seen + other * weight) / (seen + weight)
                seen, size = seen + weight, size + others
            pooled.append((seconds, seen, size))
        each = (seconds for seconds, _, size in pooled for _ in range(size))
        self._fitted = dict(zip(self._rows, each, strict=True))
        return self._fitted

    def to_dict(self) -> dict[str, float]:
        """JSON-able seconds by row count, as `predict` gives them."""
        return {str(rows): seconds for rows, seconds in self._times().items()}

    @classmethod
    def from_dict(cls, data: Any) -> StepTimes:
        """Read what `to_dict` wrote. Raises ValueError, TypeError or AttributeError for anything else."""
        times = cls()
        for rows, seconds in data.items():
            if int(rows) < 1 or not isinstance(seconds, float) or not 0.0 <= seconds < float("inf"):
                raise ValueError(f"a step of {rows} rows cannot take {seconds!r} s")
            times._seen[int(rows)] = deque([seconds], maxlen=_REMEMBERED)
            times._medians[int(rows)] = seconds
            times._read.add(int(rows))
        times._rows = sorted(times._seen)
        return times


class CostModel:
    """Draft step and target pass times, and what rounds are like. Rounds book them; policies only read.

    `verify`: seconds of passes, waiting included; `computing`: the same without waiting for weights.
    """

    def __init__(self) -> None:
        self.draft = StepTimes()
        self.verify = StepTimes()
        self.computing = StepTimes()
        self.totals = RoundTotals()
        self._last_pass = 0, 0.0  # rows and seconds

    def observe_pass(self, rows: int, seconds: float, busy: float) -> None:
        """A target pass over `rows` nodes took `seconds`, `busy` of them computing."""
        self.verify.observe(rows, seconds, busy)
        self.computing.observe(rows, min(max(busy, 0.0), seconds))
        self._last_pass = rows, seconds

    def observe_round(self, num_tokens: int, seconds: float) -> None:
        """A round gave `num_tokens` tokens in `seconds`, everything included."""
        (rows, pass_s), totals = self._last_pass, self.totals
        totals.rounds = totals.rounds * _DECAY + 1.0
        totals.tokens = totals.tokens * _DECAY + num_tokens
        totals.rows = totals.rows * _DECAY + rows
        totals.rest_s = totals.rest_s * _DECAY + max(seconds - pass_s, 0.0)

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding; 0.0 while unknown."""
        seconds = self.verify.predict(1)
        return 1.0 / seconds if seconds > 0.0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        times = {name: getattr(self, name).to_dict() for name in _STEPS}
        return times | {"rounds": asdict(self.totals)}

    @classmethod
    def from_dict(cls, data: Any) -> CostModel:
        """Read what `to_dict` wrote. Raises ValueError, TypeError, KeyError or AttributeError for others."""
        model = cls()
        model.draft, model.verify, model.computing = (StepTimes.from_dict(data[name]) for name in _STEPS)
        model.totals = RoundTotals(**data["rounds"])
        rounds = asdict(model.totals)
        if len(data["rounds"]) < len(rounds):
            raise ValueError("rounds: not all that was saved")
        if not all(isinstance(value, float) and 0.0 <= value < float("inf") for value in rounds.values()):
            raise ValueError("rounds: not numbers")
        return model
