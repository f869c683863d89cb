"""The curves of a training run: loss, and agreement with the target on texts it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .training_state import read_log

MISSING = "matplotlib is not installed, so there is no plot; get it with: pip install 'llmcad-mlx[bench]'"

_WINDOW = 25  # steps that a point of the smooth line is the mean of
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#BBBBBB"


def plot_training(folder: Path, title: str) -> Path | None:
    """Draw `folder`/loss.png from the run's log; None: no step was logged.

    Raises ImportError where matplotlib is missing (`MISSING` says what to do).
    """
    from matplotlib.figure import Figure

    log: list[Any] = list(read_log(folder))
    steps = [line for line in log if "loss" in line]
    looks = [line for line in log if "top1" in line]
    if not steps:
        return None
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    x, y = np.array([line["step"] for line in steps]), np.array([line["loss"] for line in steps])
    left.plot(x, y, color=_GREY, linewidth=0.8, label="each step")
    window = min(_WINDOW, len(y))
    smooth = np.convolve(y, np.full(window, 1 / window), "valid")
    left.plot(x[window - 1 :], smooth, color=_BLUE, label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend(frameon=False)
    places = [line["step"] for line in looks]
    for name, label, colour in (("top4", "one of its first four", _ORANGE), ("top1", "its first", _BLUE)):
        right.plot(places, [100 * line[name] for line in looks], "o-", color=colour, markersize=3, label=label)
    right.set(xlabel="step", ylabel="target's choices that are the student's (%)", ylim=(0, None))
    right.legend(frameon=False, title="on unseen texts")
    file = folder / "loss.png"
    figure.savefig(file, dpi=150)
    return file
