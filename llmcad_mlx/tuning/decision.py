"""Which candidate is best, so that two runs on the same machine agree. Pure arithmetic.

Speeds are compared repetition by repetition with the fastest's, because a busy machine slows all of a repetition.
A candidate's noise is half the spread of these ratios, at least 3 %. Those that come within their noise of the
fastest tie with it; of them the one with the smallest draft wins, then the faster one. The draft chosen before
stays unless it falls short by more than twice its noise: what wins narrowly once keeps winning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from llmcad_mlx.bench.records import Run
from llmcad_mlx.tuning.figures import CandidateFigures, rate

LEAST_NOISE = 0.03


@dataclass(frozen=True, slots=True)
class Standing:
    """A candidate beside the fastest. `ratio`: median over repetitions of its speed over the fastest's."""

    name: str
    ratio: float
    noise: float

    def within(self, times: float) -> bool:
        """Whether it comes within so many times its noise."""
        return self.ratio >= 1.0 - times * self.noise


@dataclass(frozen=True, slots=True)
class Decision:
    """`standings` of all candidates, the best first; `tied`: those as good as the `fastest`, it among them."""

    winner: str
    fastest: str
    tied: tuple[str, ...]
    standings: tuple[Standing, ...]
    incumbent: str | None

    @property
    def stays(self) -> bool:
        """Whether an earlier choice was confirmed."""
        return self.winner == self.incumbent


def decide(lines: Sequence[CandidateFigures], runs: Sequence[Run], incumbent: str | None) -> Decision | None:
    """lines: of the candidates that may win. runs: of the measured prompts. incumbent: chosen before, if anything
    was. None where nothing was measured."""
    speeds = {line.name: line.tokens_per_s for line in lines if line.tokens_per_s is not None}
    if not speeds:
        return None
    fastest = max(speeds, key=lambda name: speeds[name])
    bytes_of = {line.name: line.draft_bytes for line in lines}
    found = [standing(name, fastest, runs) for name in speeds]
    standings = sorted(found, key=lambda entry: -entry.ratio)
    tied = [entry.name for entry in standings if entry.name == fastest or entry.within(1.0)]
    stays = [entry.name for entry in standings if entry.name == incumbent and entry.within(2.0)]
    winner = stays[0] if stays else min(tied, key=lambda name: bytes_of[name])
    return Decision(winner, fastest, tuple(tied), tuple(standings), incumbent)


def standing(name: str, fastest: str, runs: Sequence[Run]) -> Standing:
    """The candidate `name` beside `fastest`, at the prompts and repetitions where both ran."""
    by_repetition: dict[int, tuple[list[Run], list[Run]]] = {}
    own = {run.place: run for run in runs if run.variant == name}
    for run in runs:
        if run.variant == fastest and run.place in own:
            ours, theirs = by_repetition.setdefault(run.place.repetition, ([], []))
            ours.append(own[run.place])
            theirs.append(run)
    ratios = [(rate(ours) or 0.0) / best for ours, theirs in by_repetition.values() if (best := rate(theirs))]
    if not ratios:
        return Standing(name, 0.0, LEAST_NOISE)
    return Standing(name, median(ratios), max((max(ratios) - min(ratios)) / 2, LEAST_NOISE))
