"""What rounds of a pair have yielded and cost, kept in its profile: what forecasts are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llmcad_mlx.profile import PairProfile
from llmcad_mlx.tree.cost_model import CostModel, StepTimes

_DECAY = 0.99  # weight of the past at each round: the last hundred count


@dataclass(slots=True)
class Rounds:
    """Fading sums over rounds of the default policy. `rows`: nodes sent to the target; `rest_s`: seconds of the
    rounds outside the target's pass, most of them drafting that loading did not hide."""

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


class _PassTimes(StepTimes):
    """Seconds of passes, and of those the seconds of computing: `computing`, by number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.computing = StepTimes()
        self.last: tuple[int, float] | None = None
        """Rows and seconds of the last pass, until its round was counted."""

    def observe(self, rows: int, seconds: float, busy: float | None = None) -> None:
        super().observe(rows, seconds, busy)
        self.computing.observe(rows, seconds if busy is None else min(max(busy, 0.0), seconds))
        self.last = rows, seconds


class _RecordedCosts(CostModel):
    """A cost model that remembers what its rounds were like."""

    def __init__(self, draft: StepTimes, passes: _PassTimes, rounds: Rounds) -> None:
        super().__init__()
        self.draft = draft
        self.verify = self._passes = passes
        self.rounds = rounds

    def observe_round(self, num_tokens: int, seconds: float) -> None:
        super().observe_round(num_tokens, seconds)
        if self._passes.last is not None:
            rows, pass_s = self._passes.last
            self._passes.last = None
            self.rounds.add(num_tokens, rows, max(seconds - pass_s, 0.0))

    def to_dict(self) -> dict[str, Any]:
        own = {"computing": self._passes.computing.to_dict(), "rounds": asdict(self.rounds)}
        return {**super().to_dict(), **own}


class PairHistory(PairProfile):
    """A profile that also keeps what rounds of the default policy have yielded.

    `rounds` and `computing` are empty for a profile that is missing, damaged, or from before they were kept.
    """

    def __init__(self, path: Path | None) -> None:
        """`path`: where to keep it; None: nowhere."""
        super().__init__(path)
        passes = _PassTimes.from_dict(self.costs.verify.to_dict())
        assert isinstance(passes, _PassTimes)
        saved = _saved(path) if passes else None
        self.rounds, passes.computing = saved or (Rounds(), StepTimes())
        self.computing = passes.computing
        """Seconds that passes compute, by number of rows."""
        self.costs = _RecordedCosts(self.costs.draft, passes, self.rounds)


def _saved(path: Path | None) -> tuple[Rounds, StepTimes] | None:
    if path is None:
        return None
    try:
        costs = json.loads(path.read_text())["costs"]
        return Rounds.from_dict(costs["rounds"]), StepTimes.from_dict(costs["computing"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
