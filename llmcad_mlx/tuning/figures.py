"""From runs to one line per candidate: what it yields, what was predicted for it and what was measured.

Half of each domain's prompts calibrate, the other half are measured. From the first half come tokens per pass A,
computing C, what a round takes beside its pass D and, where nobody gave it, the read rate B; with W bytes read on
each pass they predict tokens/s = A / (max(W/B, C) + D) (DESIGN 3.7) for the second half, whose runs tell.

A prompt counts with its median repetition, and speeds are all tokens over all seconds. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmcad_mlx.bench.prompts import BenchPrompt
from llmcad_mlx.bench.records import Run
from llmcad_mlx.bench.summary import count_mismatches
from llmcad_mlx.errors import UsageError
from llmcad_mlx.forecast import Measured, Speeds
from llmcad_mlx.read_rate import ReadRate
from llmcad_mlx.stats import GenerationStats
from llmcad_mlx.tree.cost_model import CostModel

PromptName = tuple[str, str]
"""Domain and name."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which prompts a prediction is made from, and which it is made for."""

    calibration: frozenset[PromptName]
    measured: frozenset[PromptName]

    @classmethod
    def of(cls, prompts: Sequence[BenchPrompt]) -> Split:
        """The first, third, … prompt of each domain calibrate. Raises UsageError for a domain of one prompt."""
        halves: tuple[set[PromptName], set[PromptName]] = set(), set()
        counts: dict[str, int] = {}
        for prompt in prompts:
            counts[prompt.domain] = counts.get(prompt.domain, 0) + 1
            halves[(counts[prompt.domain] - 1) % 2].add((prompt.domain, prompt.name))
        for domain, count in counts.items():
            if count < 2:
                raise UsageError(
                    f"prompts: {domain} has one prompt; tune needs two of each domain or more: one half predicts, "
                    "the other is measured"
                )
        return cls(frozenset(halves[0]), frozenset(halves[1]))


@dataclass(frozen=True, slots=True)
class Prediction:
    """`measured` in the calibrating half; `read_rate`: None where nothing is read."""

    measured: Measured
    read_rate: ReadRate | None
    tokens_per_s: float | None

    @classmethod
    def of(
        cls, runs: Sequence[Run], costs: CostModel, streamed_bytes: int, read_bandwidth: float | None
    ) -> Prediction | None:
        """From calibrating runs, one for each prompt; None without any.

        costs: learned meanwhile, for single steps. streamed_bytes: read on each pass. read_bandwidth: emulated, in
        bytes per second; None: what the passes got.
        """
        stats = stats_of(runs)
        passes = sum(s.target_passes for s in stats)
        if not passes:
            return None
        computing = sum(s.verify_s for s in stats) / passes
        pass_s = computing + sum(s.io_wait_s + s.hidden_draft_s for s in stats) / passes
        measured = Measured(
            tokens_per_pass=sum(s.generated_tokens for s in stats) / passes,
            nodes=1 + sum(s.tested for s in stats) / passes,
            pass_s=computing,
            plain_pass_s=costs.computing.predict(1),
            rest_s=max(sum(s.decode_s for s in stats) / passes - pass_s, 0.0),
            draft_step_s=costs.draft.predict(1) if costs.draft else None,
            streamed_bytes=streamed_bytes,
        )
        rate = None
        if streamed_bytes and read_bandwidth is not None:
            rate = ReadRate(read_bandwidth, emulated=True)
        elif streamed_bytes and pass_s > 0.0:
            rate = ReadRate(streamed_bytes / pass_s, sampled_bytes=streamed_bytes * passes, from_disk=False)
        return cls(measured, rate, Speeds.of(streamed_bytes, rate, measured).speculative)


@dataclass(frozen=True, slots=True)
class DomainFigures:
    """One candidate on the prompts of a domain, both halves."""

    tokens_per_pass: float | None
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class CandidateFigures:
    """One candidate. None: not known (yet).

    `tokens_per_pass` is of all prompts, `tokens_per_s` of the measured half. Speeds leave out reading the prompt,
    of which `prompt_s` is the median. `mismatches` counts the tokens of all runs that are not the target's own, of
    `num_compared`.
    """

    name: str
    draft_bytes: int
    draft_step_s: float | None
    streamed_bytes: int
    pinned_bytes: int | None
    tokens_per_pass: float | None
    prediction: Prediction | None
    tokens_per_s: float | None
    prompt_s: float | None
    domains: dict[str, DomainFigures]
    num_runs: int
    mismatches: int
    num_compared: int

    @property
    def predicted_tokens_per_s(self) -> float | None:
        return None if self.prediction is None else self.prediction.tokens_per_s

    @property
    def difference(self) -> float | None:
        """Predicted over measured, less one; None without either."""
        if self.predicted_tokens_per_s is None or not self.tokens_per_s:
            return None
        return self.predicted_tokens_per_s / self.tokens_per_s - 1.0


def stats_of(runs: Iterable[Run]) -> list[GenerationStats]:
    """Of runs of our own engine."""
    return [run.generation.stats for run in runs if run.generation.stats is not None]


def rate(runs: Iterable[Run]) -> float | None:
    """All tokens over all seconds of decoding; None without any."""
    stats = stats_of(runs)
    seconds = sum(s.decode_s for s in stats)
    return sum(s.generated_tokens for s in stats) / seconds if seconds > 0.0 else None


def tokens_per_pass(runs: Iterable[Run]) -> float | None:
    """All tokens over all passes of the target; None without any."""
    stats = stats_of(runs)
    passes = sum(s.target_passes for s in stats)
    return sum(s.generated_tokens for s in stats) / passes if passes else None


def median_runs(runs: Iterable[Run]) -> list[Run]:
    """For each prompt the run of median speed, the faster of two."""
    by_prompt: dict[PromptName, list[Run]] = {}
    for run in runs:
        if run.generation.stats is not None:
            by_prompt.setdefault(prompt_of(run), []).append(run)
    return [sorted(group, key=_seconds_per_token)[(len(group) - 1) // 2] for group in by_prompt.values()]


def _seconds_per_token(run: Run) -> float:
    stats = run.generation.stats
    assert stats is not None
    return stats.decode_s / max(stats.generated_tokens, 1)


def prompt_of(run: Run) -> PromptName:
    return run.place.domain, run.place.prompt


def among(runs: Iterable[Run], prompts: frozenset[PromptName]) -> list[Run]:
    """The runs of `prompts`."""
    return [run for run in runs if prompt_of(run) in prompts]


def compared(runs: Iterable[Run], reference: Sequence[Run]) -> tuple[int, int]:
    """Tokens of `runs` that differ from `reference`'s at the same prompt, and how many were compared.

    The same seed gives the same text in every repetition, so one run of the reference serves all.
    """
    expected = {prompt_of(run): run.generation.tokens for run in reference}
    pairs = [(run.generation.tokens, expected[prompt_of(run)]) for run in runs if prompt_of(run) in expected]
    return sum(count_mismatches(*pair) for pair in pairs), sum(len(tokens) for tokens, _ in pairs)
