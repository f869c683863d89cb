"""What rounds have yielded and cost lately: what forecasts are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

_DECAY = 0.99  # weight of the past at each round: the last hundred count


@dataclass(slots=True)
class Rounds:
    """Fading sums over rounds. `rows`: nodes sent to the target; `rest_s`: seconds of the rounds outside the
    target's pass, most of them drafting that loading did not hide."""

    rounds: float = 0.0
    tokens: float = 0.0
    rows: float = 0.0
    rest_s: float = 0.0

    def add(self, tokens: int, rows: int, rest_s: float) -> None:
        """Count one round."""
        self.rounds = self.rounds * _DECAY + 1.0
        self.tokens = self.tokens * _DECAY + tokens
        self.rows = self.rows * _DECAY + rows
        self.rest_s = self.rest_s * _DECAY + rest_s

    @classmethod
    def from_dict(cls, data: Any) -> Rounds:
        """Read what `asdict` gave. Raises ValueError for anything else."""
        names = [entry.name for entry in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ValueError("rounds: not what was saved")
        if not all(isinstance(data[name], float) and 0.0 <= data[name] < float("inf") for name in names):
            raise ValueError("rounds: not numbers")
        return cls(**data)
