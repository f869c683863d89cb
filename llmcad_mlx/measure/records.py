"""What a benchmark measures: one generation, and that generation's place in the run."""

from __future__ import annotations

from dataclasses import dataclass

from llmcad_mlx.results import GenerationStats


@dataclass(frozen=True, slots=True)
class Generation:
    """One measured generation.

    All variants are timed from outside with one clock: `prompt_s` to the end of prompt processing, `decode_s`
    from there to the last token, whatever happens between tokens included. Our prompt processing ends before
    the first token is computed, mlx-lm's with it, so `num_timed`, the tokens that `decode_s` paid for, is one
    less there. `stats` is None for mlx-lm, which counts neither passes nor drafts. `pass_bytes` of weights are
    read for each pass of the target.
    """

    tokens: tuple[int, ...]
    num_timed: int
    prompt_tokens: int
    prompt_s: float
    decode_s: float
    stats: GenerationStats | None
    pass_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A prompt in a repetition: what runs of different variants are compared at. `repetition` counts from 0."""

    domain: str
    prompt: str
    repetition: int


@dataclass(frozen=True, slots=True)
class Run:
    """A generation with its labels; `order` is its turn among the variants at that place, from 0."""

    variant: str
    place: Place
    order: int
    generation: Generation

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed, None when no token was timed."""
        return _rate(self.generation.num_timed, self.generation.decode_s)

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Prompt processing speed, None when it took no time."""
        return _rate(self.generation.prompt_tokens, self.generation.prompt_s)


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0.0 else None
