"""Runs all variants interleaved, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmcad_mlx.measure.contenders import Contender, Sampling
from llmcad_mlx.measure.prompts import BenchPrompt
from llmcad_mlx.measure.records import Place, Run


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the tokens that every variant is given."""

    prompt: BenchPrompt
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation to do: the indices of prompt and variant. A warm-up's repetition is -1."""

    repetition: int
    prompt: int
    variant: int
    order: int


@dataclass(frozen=True, slots=True)
class RunnerOutcome:
    """`runs` in the order they were done; `interrupted`: Ctrl-C came before the last."""

    runs: list[Run]
    interrupted: bool


def schedule(num_variants: int, num_prompts: int, repeat: int, warmup: int) -> Iterator[Turn]:
    """All turns, in order: `warmup` prompts first, then `repeat` times all prompts, each for all variants.

    The variants' order is rotated from prompt to prompt and from repetition to repetition, so that none always
    runs first and none always at the same prompt.
    """
    for index in range(warmup):
        yield from _rotation(-1, index % num_prompts, index, num_variants)
    for repetition in range(repeat):
        for prompt in range(num_prompts):
            yield from _rotation(repetition, prompt, repetition + prompt, num_variants)


def _rotation(repetition: int, prompt: int, shift: int, num_variants: int) -> Iterator[Turn]:
    for order in range(num_variants):
        yield Turn(repetition, prompt, (order + shift) % num_variants, order)


def mixed_by_domain(prompts: Sequence[BenchPrompt]) -> list[BenchPrompt]:
    """The first prompt of each domain, then the second of each, …: a short warm-up meets several domains."""
    seen: dict[str, int] = {}
    ranks = []
    for prompt in prompts:
        ranks.append(seen.get(prompt.domain, 0))
        seen[prompt.domain] = ranks[-1] + 1
    order = sorted(range(len(prompts)), key=lambda index: ranks[index])
    return [prompts[index] for index in order]


def run_interleaved(
    contenders: Sequence[Contender],
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    repeat: int,
    warmup: int,
    on_turn: Callable[[str], None] = lambda name: None,
) -> RunnerOutcome:
    """Do all turns; warm-up runs are not kept. on_turn gets the variant's name before each generation.

    Ctrl-C ends it early with what was done, except in the warm-up, where there is nothing to show.
    """
    runs: list[Run] = []
    try:
        for turn in schedule(len(contenders), len(prompts), repeat, warmup):
            contender, encoded = contenders[turn.variant], prompts[turn.prompt]
            on_turn(contender.name)
            generation = contender.generate(encoded.tokens, sampling)
            if turn.repetition >= 0:
                place = Place(encoded.prompt.domain, encoded.prompt.name, turn.repetition)
                runs.append(Run(contender.name, place, turn.order, generation))
    except KeyboardInterrupt:
        if not runs:
            raise
        return RunnerOutcome(runs, interrupted=True)
    return RunnerOutcome(runs, interrupted=False)
