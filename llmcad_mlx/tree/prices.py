"""What a round's decisions cost, in tokens: seconds times the tokens that one of them yields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmcad_mlx.tree.cost_model import CostModel

EXPLORE = 2  # times the largest measured row count that a step may have
_TINY = 0.01  # probability of a node that is not worth a row, whatever that costs


class Ranking(NamedTuple):
    """A tree's cumulative confidences, largest first, as many as a pass may have.

    `rows`: how many of them gain most over the price of their rows; `net`: how much more than the root alone.
    """

    probabilities: Sequence[float]
    rows: int
    net: float


class Prices:
    """Prices of rows in the target's pass and of draft steps, looked up once a round: they are asked for dozens
    of times in each. `rate`: tokens per second when the round began."""

    def __init__(self, costs: CostModel, max_nodes: int) -> None:
        self.rate = 0.0
        self._costs = costs
        self._max_nodes = max_nodes
        self._passes = [0.0]

    def begin(self) -> None:
        """A new round: forget what the last one paid."""
        self.rate = self._costs.rate
        self._passes = [0.0]

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
