"""How a training run is shown: a bar on a terminal, a line for each examination, curves at the end."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from distill.checkpoint import read_log
from distill.training import Progress

MISSING = "matplotlib is not installed, so there is no plot; get it with: pip install 'llmcad-mlx[bench]'"

_WINDOW = 25  # steps that a point of the smooth line is the mean of
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#BBBBBB"


class Bars(RichProgress):
    """The bar of a run, on stderr where that is a terminal; the lines go to stdout.

    top-1, top-4: shares of the target's choices that are the student's first, or one of its first four.
    """

    def __init__(self, steps: int) -> None:
        """steps: of the whole run."""
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        super().__init__(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.step = self.saved = 0
        self._task = self.add_task("", total=steps)

    def show(self, progress: Progress) -> None:
        """Take in how the run stands."""
        self.step, self.saved = progress.step, progress.saved
        what = "nothing learned yet"
        if math.isfinite(progress.loss):
            what = f"loss {progress.loss:.3f}, {progress.tokens_per_s:,.0f} tokens/s"
        self.update(self._task, completed=progress.step, description=what)
        if progress.top1 is not None and progress.top4 is not None:
            first, four = 100 * progress.top1, 100 * progress.top4
            line = f"step {progress.step}: {what}; unseen texts: top-1 {first:.1f} %, top-4 {four:.1f} %"
            print(line, flush=True)


def plot_training(folder: Path, title: str) -> Path:
    """Draw `folder`/loss.png from the run's log, in which a step is.

    Raises ImportError where matplotlib is missing (`MISSING` says what to do).
    """
    from matplotlib.figure import Figure

    log: list[Any] = list(read_log(folder))
    steps = [line for line in log if "loss" in line]
    examined = [line for line in log if "top1" in line]
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
    places = [line["step"] for line in examined]
    for name, label, colour in (("top4", "one of its first four", _ORANGE), ("top1", "its first", _BLUE)):
        right.plot(places, [100 * line[name] for line in examined], "o-", color=colour, markersize=3, label=label)
    right.set(xlabel="step", ylabel="target's choices that are the student's (%)", ylim=(0, None))
    right.legend(frameon=False, title="on unseen texts")
    file = folder / "loss.png"
    figure.savefig(file, dpi=150)
    return file
