"""Training the student. A run that was broken off goes on from its checkpoint as if it had not been."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from llmcad_mlx.errors import UsageError
from llmcad_mlx.models.folder import LoadedModel

from .lens import fit_lens
from .student import FrozenTarget, Student, check_family, frequent_tokens, head_rows
from .student_data import UNSEEN, Batch, Batches, num_shards, token_counts
from .student_loss import Distillation, Examination
from .training_state import Checkpoint, Place, TrainingLog, TrainingSettings, save_checkpoint

_LOWEST_RATE = 0.1  # of the learning rate, at the end
_MOST_NORM = 1.0  # of the gradient
_LENS_TOKENS = 100_000  # that a lens is fitted to


@dataclass(frozen=True, slots=True)
class Progress:
    """How a run stands. `loss`: of the step, or mean since the last look; NaN where nothing was learned since the
    start. `saved`: the checkpoint's step. `top1`, `top4`: see `Examination.agreement`; None between
    two looks. `tokens_per_s`: of the texts, padding left out."""

    step: int
    saved: int
    loss: float
    tokens_per_s: float
    top1: float | None = None
    top4: float | None = None


def train(
    loaded: LoadedModel,
    corpus: Path,
    folder: Path,
    settings: TrainingSettings,
    report: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Train to `settings.steps`, from the checkpoint in `folder` if there is one.

    loaded: the target. corpus: the folder of shards. On a CPU the curve after a break is exactly that without.
    Raises UsageError for settings that cannot be, or are not those of the checkpoint.
    """
    run = _Run(loaded, corpus, folder, settings)
    if run.place.step == 0:
        run.look(report)
    else:
        report(Progress(run.place.step, run.place.step, float("nan"), 0.0))
    for place, batch in run.batches():
        run.learn(batch, place, report)
        if place.step % settings.check_every == 0 or place.step == settings.steps:
            run.look(report)


class _Run:
    def __init__(self, loaded: LoadedModel, corpus: Path, folder: Path, settings: TrainingSettings) -> None:
        model: Any = loaded.model
        check_student(loaded, settings)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._settings, self._target = folder, settings, digest_of(model)
        found = Checkpoint.find(folder)
        if found is None:
            self.place = Place(num_shards(corpus))
            counts = token_counts(corpus, self.place.num_shards, head_rows(model, slice(None)).shape[0])
            self.tokens = frequent_tokens(counts, settings.head_tokens)
        else:
            found.check(settings, self._target)
            self.place, self.tokens = found.place, found.tokens
        self._student = Student(model, settings.sources, self.tokens, settings.train_head, settings.lens)
        self._optimizer = optim.AdamW(_schedule(settings), betas=[0.9, 0.98], bias_correction=True)
        self._optimizer.init(self._student.trainable_parameters())
        if found is not None:
            found.restore(self._student, self._optimizer)
        self._batches = Batches(
            corpus,
            settings.depth,
            settings.batch_tokens,
            self.tokens,
            FrozenTarget(model, settings.depth),
            settings.prompts,
        )
        head = head_rows(model, self.tokens)
        self._distillation = Distillation(head, settings.hard_share, settings.hidden_weight)
        if found is None and settings.lens:
            shards = range(UNSEEN + 1, self.place.num_shards)
            every = (batch for n in shards for batch in self._batches.of_shard(n, (settings.seed, 0)))
            fit_lens(self._student, every, _LENS_TOKENS)
        elif found is None:
            first = next(self._batches.of_shard(UNSEEN + 1, (settings.seed, 0)))
            self._student.norm.weight *= self._distillation.best_scale(self._student, first)
        unseen = self._batches.unseen(settings.check_tokens)
        self._examination = Examination(unseen, head_rows(model, slice(None)), self.tokens)
        self._log = TrainingLog(folder, self.place.step)
        self._saved = self.place.step
        self._losses: list[float] = []
        self._trained, self._seconds = 0, 0.0  # since the last look

    def batches(self) -> Iterator[tuple[Place, Batch]]:
        """What is still to be learned, each with the place after it."""
        while self.place.step < self._settings.steps:
            start, before = self.place, self.place.step
            epoch, number = divmod(start.shard, start.num_shards - 1)
            seed = (self._settings.seed, epoch)
            for batch in self._batches.of_shard(UNSEEN + 1 + number, seed, start.position):
                now = self.place
                yield Place(now.num_shards, now.step + 1, now.shard, now.position + 1), batch
                if self.place.step == self._settings.steps:
                    return
            if self.place.step == before and start.position == 0:
                raise UsageError(f"shard {UNSEEN + 1 + number} of the corpus teaches nothing; write a new corpus")
            self.place = Place(start.num_shards, self.place.step, start.shard + 1)

    def learn(self, batch: Batch, place: Place, report: Callable[[Progress], None]) -> None:
        """One step, after which the run is at `place`."""
        started = time.perf_counter()
        loss, gradients = self._distillation.loss_and_gradients(self._student, batch)
        gradients, _ = optim.clip_grad_norm(gradients, _MOST_NORM)
        self._optimizer.update(self._student, gradients)
        mx.eval(self._student.parameters(), self._optimizer.state, loss)
        self._seconds += time.perf_counter() - started
        self._trained += batch.num_tokens
        self.place = place
        self._losses.append(float(loss))
        self._log.add(step=place.step, loss=self._losses[-1])
        report(Progress(place.step, self._saved, self._losses[-1], self._rate))

    def look(self, report: Callable[[Progress], None]) -> None:
        """At unseen texts; then save."""
        top1, top4 = self._examination.agreement(self._student)
        step, rate = self.place.step, self._rate
        loss = float(np.mean(self._losses)) if self._losses else float("nan")
        self._log.add(
            step=step, top1=top1, top4=top4, checked=self._examination.num_tokens, tokens_per_s=round(rate)
        )
        save_checkpoint(
            self._folder, self._settings, self._target, self.place, self.tokens, self._student, self._optimizer
        )
        self._saved = step
        report(Progress(step, step, loss, rate, top1, top4))
        self._losses, self._trained, self._seconds = [], 0, 0.0

    @property
    def _rate(self) -> float:
        return self._trained / self._seconds if self._seconds else 0.0


def check_student(loaded: LoadedModel, settings: TrainingSettings) -> None:
    """Raise UsageError for a student that this target cannot have."""
    check_family(loaded)
    layers = len(loaded.model.layers)
    if not settings.depth <= layers:
        raise UsageError(f"--depth: {settings.depth} of {layers} layers cannot be kept")
    for number in settings.sources:
        if not 0 <= number < layers:
            raise UsageError(f"--from-layers: there is no layer {number}; they are 0 to {layers - 1}")


def digest_of(model: Any) -> str:
    """Tells targets apart by their last norm and the first rows of their head."""
    found = hashlib.sha256()
    for array in (model.model.norm["weight"].astype(mx.float32), head_rows(model, slice(64))):
        found.update(np.asarray(array).tobytes())
    return found.hexdigest()[:16]


def _schedule(settings: TrainingSettings) -> Callable[[mx.array], mx.array]:
    rate, rise = settings.learning_rate, settings.warmup
    fall = optim.cosine_decay(rate, settings.steps - rise, rate * _LOWEST_RATE)
    return optim.join_schedules([optim.linear_schedule(rate / rise, rate, rise), fall], [rise])
