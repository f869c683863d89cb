"""Runs of made-up times, and plots that are drawn."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from llmcad_mlx.measure.output import Plot
from llmcad_mlx.measure.runner import Generation, Place, Run
from llmcad_mlx.results import GenerationStats


def made_up(
    variant: str,
    repetition: int = 0,
    decode_s: float = 1.0,
    *,
    tokens: tuple[int, ...] = (1, 2, 3, 4),
    ours: bool = True,
    domain: str = "d",
    prompt: str = "p",
    **counts: Any,
) -> Run:
    """A quarter of the time is drafting and half of it verifying; 1 MB is read on each pass."""
    known = {
        "generated_tokens": 4, "target_passes": 2, "accepted": 2, "path_tested": 4, "draft_s": decode_s / 4,
        "verify_s": decode_s / 2, "decode_s": decode_s,
    }  # fmt: skip
    stats = GenerationStats(**(known | counts)) if ours else None
    generation = Generation(tokens, len(tokens), 10, 0.5, decode_s, stats, 10**6)
    return Run(variant, Place(domain, prompt, repetition), 0, generation)


def drawn(plot: Plot) -> Figure:
    assert plot.draw is not None
    figure = Figure()
    plot.draw(figure)
    return figure
