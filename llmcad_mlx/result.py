"""What a finished generation returns, from an engine here or on another machine."""

from __future__ import annotations

from dataclasses import dataclass

from llmcad_mlx.stats import GenerationStats


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation. `tokens` are all generated tokens, a final end-of-sequence token included."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: GenerationStats
