"""Training the student. A run that was broken off goes on from its checkpoint as if it had not been."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from distill.batches import UNSEEN, Batch, Batches, token_counts
from distill.checkpoint import Checkpoint, Place, TrainingLog, TrainingSettings, save_checkpoint
from distill.corpus import shards_to_learn_from
from distill.exponentials import numpy_exponentials
from distill.loss import Distillation, Examination
from distill.student import FrozenTarget, Student, frequent_tokens, head_rows
from llmcad_mlx.errors import UsageError
from llmcad_mlx.models.folder import LoadedModel

# Layers of these see the text alone: no second input, no state, one mask for all.
FAMILIES = ("llama", "qwen2", "qwen3")

_LOWEST_RATE = 0.1  # of the learning rate, at the end
_MOST_NORM = 1.0  # of the gradient
_LENS_TOKENS = 100_000  # that a lens is fitted to
_RIDGE = 1e-4  # of the mean square of an activation


@dataclass(frozen=True, slots=True)
class Progress:
    """How a run stands. `loss`: of the step, or mean since the last examination; NaN where nothing was learned
    since the start. `saved`: the checkpoint's step. `top1`, `top4`: see `Examination.agreement`; None between two
    examinations. `tokens_per_s`: of the texts, padding left out."""

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
        run.examine(report)
    else:
        report(Progress(run.place.step, run.place.step, float("nan"), 0.0))
    for place, batch in run.batches():
        run.learn(batch, place, report)
        if place.step % settings.check_every == 0 or place.step == settings.steps:
            run.examine(report)


class _Run:
    def __init__(self, loaded: LoadedModel, corpus: Path, folder: Path, settings: TrainingSettings) -> None:
        model: Any = loaded.model
        check_student(loaded, settings)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._settings, self._target = folder, settings, digest_of(model)
        self._optimizer = optim.AdamW(_schedule(settings), betas=[0.9, 0.98], bias_correction=True)
        found = Checkpoint.find(folder)
        if found is None:
            shards = shards_to_learn_from(corpus)
            self.place = Place(len(shards))
            counts = token_counts(shards[UNSEEN + 1 :], len(head_rows(model, slice(None))))
            self.tokens = frequent_tokens(counts, settings.head_tokens)
            self._student = Student(model, settings.sources, self.tokens, settings.train_head)
        else:
            found.check(settings, self._target)
            self.place, self.tokens, self._student = found.place, found.tokens, found.student(model)
            found.restore(self._optimizer)
        self._optimizer.init(self._student.trainable_parameters())
        frozen = FrozenTarget(model, settings.depth)
        self._batches = Batches(
            corpus, settings.depth, settings.batch_tokens, self.tokens, frozen, settings.prompts
        )
        self._distillation = Distillation(head_rows(model, self.tokens), settings.hard_share)
        if found is None:
            numbers = range(UNSEEN + 1, self.place.num_shards)
            every = (batch for n in numbers for batch in self._batches.of_shard(n, (settings.seed, 0)))
            fit_lens(self._student, every, _LENS_TOKENS)
        unseen = self._batches.unseen(settings.check_tokens)
        self._examination = Examination(unseen, head_rows(model, slice(None)), self.tokens)
        self._log = TrainingLog(folder, self.place.step)
        self._saved = self.place.step
        self._losses: list[float] = []
        self._trained, self._seconds = 0, 0.0  # since the last examination

    def batches(self) -> Iterator[tuple[Place, Batch]]:
        """What is still to be learned, each with the place after it."""
        while self.place.step < self._settings.steps:
            start = self.place
            epoch, number = divmod(start.shard, start.num_shards - 1)
            for batch in self._batches.of_shard(UNSEEN + 1 + number, (self._settings.seed, epoch), start.position):
                yield replace(self.place, step=self.place.step + 1, position=self.place.position + 1), batch
                if self.place.step == self._settings.steps:
                    return
            if self.place == start and start.position == 0:
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

    def examine(self, report: Callable[[Progress], None]) -> None:
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
    model: Any = loaded.model
    slides = any(getattr(layer, "use_sliding", False) for layer in model.layers)
    if slides or loaded.config["model_type"] not in FAMILIES:
        families = ", ".join(FAMILIES)
        raise UsageError(f"{loaded.path}: a student is made of {families} models without sliding windows only")
    layers = len(model.layers)
    if not settings.depth <= layers:
        raise UsageError(f"--depth: {settings.depth} of {layers} layers cannot be kept")
    for number in settings.sources:
        if not 0 <= number < layers:
            raise UsageError(f"--from-layers: there is no layer {number}; they are 0 to {layers - 1}")


def fit_lens(student: Student, batches: Iterable[Batch], num_tokens: int) -> None:
    """Set `student.lens` from the first batches that have `num_tokens` rows, or from all of them.

    In closed form, by ridge regression: with X the student's normed activations, before the lens, and Y the
    target's last ones, (X'X + r)^-1 X'Y. Raises ValueError where the batches have no rows.
    """
    size = student.head.shape[1]
    squares, products, seen = np.zeros((size, size)), np.zeros((size, size)), 0
    student.lens = mx.eye(size)
    for batch in batches:
        with numpy_exponentials(student.layers[0]):
            x = np.asarray(student.features(batch.hidden, batch.rows))
        squares += x.T @ x
        products += x.T @ np.asarray(batch.final)
        seen += len(x)
        if seen >= num_tokens:
            break
    if not seen:
        raise ValueError("the batches have no rows to fit a lens to")
    ridge = _RIDGE * np.trace(squares) / size
    student.lens = mx.array(np.linalg.solve(squares + ridge * np.eye(size), products).astype(np.float32))
    mx.eval(student.lens)


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
