"""What the student is trained for, and how often it agrees with the target.

    loss = (1 - hard_share) KL(target || student) + hard_share CE(chosen token, student)

Both distributions are over the head's vocabulary. The gradient by the logits is p - q, where p is the student's
distribution and q = (1 - hard_share) target + hard_share chosen. It is written down here, and handed to MLX as the
gradient by the features: exponentials over the vocabulary are most of the cost on a CPU, so each is taken once,
and a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.utils import value_and_grad

from distill.batches import Batch
from distill.corpus import Ids
from distill.exponentials import numpy_exponentials, softmax
from distill.student import Student

_CHUNK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Distillation:
    """The loss against the target's own head: `teacher_head` (V', H) float32 has rows for the student's tokens."""

    teacher_head: mx.array
    hard_share: float

    def loss_and_gradients(self, student: Student, batch: Batch) -> tuple[mx.array, Any]:
        """The loss, mean over the batch's rows, in nats; gradients of all trained parameters."""
        with numpy_exponentials(student.layers[0]):
            (_, loss), gradients = value_and_grad(student, self._surrogate)(student, batch)
        return loss, gradients

    def _surrogate(self, student: Student, batch: Batch) -> tuple[mx.array, mx.array]:
        """A scalar with the loss's gradients, and the loss."""
        features = student.features(batch.hidden, batch.rows)
        fixed = mx.stop_gradient(features)
        head, by_head, total = student.head, mx.array(0.0), mx.array(0.0)
        by_features = []
        for start in range(0, len(batch.labels), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            loss, by_logits = self._by_logits(fixed[rows], mx.stop_gradient(head), batch, rows)
            total = total + loss
            by_features.append(mx.stop_gradient(by_logits @ head))
            if "head" in student.trainable_parameters():
                by_head = by_head + (mx.stop_gradient(by_logits.T @ fixed[rows]) * head).sum()
        return (mx.concatenate(by_features) * features).sum() + by_head, mx.stop_gradient(total)

    def _by_logits(
        self, features: mx.array, head: mx.array, batch: Batch, rows: slice
    ) -> tuple[mx.array, mx.array]:
        """These rows' share of the loss, and its gradient by their logits."""
        logits, wanted = features @ head.T, batch.final[rows] @ self.teacher_head.T
        (p, normaliser), (q, teacher_normaliser) = softmax(logits), softmax(wanted)
        labels = mx.array(batch.labels[rows])[:, None]
        soft = normaliser - teacher_normaliser + (q * (wanted - logits)).sum(axis=-1, keepdims=True)
        hard = normaliser - mx.take_along_axis(logits, labels, axis=-1)
        loss = (1 - self.hard_share) * soft + self.hard_share * hard
        by_logits = p - (1 - self.hard_share) * q
        if self.hard_share:
            at = mx.take_along_axis(by_logits, labels, axis=-1) - self.hard_share
            by_logits = mx.put_along_axis(by_logits, labels, at, axis=-1)
        count = len(batch.labels)
        return loss.sum() / count, by_logits / count


class Examination:
    """Texts that are never trained on, with the target's own first choices over its whole vocabulary."""

    def __init__(self, batches: Sequence[Batch], whole_head: mx.array, tokens: Ids) -> None:
        """whole_head: (V, H) float32, the target's. tokens: (V',) ids of the student's vocabulary."""
        places = np.full(whole_head.shape[0], -1, np.int32)
        places[tokens] = np.arange(len(tokens), dtype=np.int32)
        self._batches = batches
        self._choices = [places[_first_choices(batch.final, whole_head)] for batch in batches]
        self.num_tokens = sum(map(len, self._choices))

    def agreement(self, student: Student) -> tuple[float, float]:
        """Shares of the target's choices that are the student's first, or one of its first four.

        Choices that the head has no row for are missed."""
        ranks: list[npt.NDArray[Any]] = []
        for batch, choices in zip(self._batches, self._choices, strict=True):
            with numpy_exponentials(student.layers[0]):
                features = student.features(batch.hidden, batch.rows)
            for start in range(0, len(choices), _CHUNK_ROWS):
                chosen = choices[start : start + _CHUNK_ROWS]
                logits = features[start : start + _CHUNK_ROWS] @ student.head.T
                own = mx.take_along_axis(logits, mx.array(np.maximum(chosen, 0))[:, None], axis=-1)
                better = np.asarray((logits > own).sum(axis=-1))
                ranks.append(np.where(chosen >= 0, better, logits.shape[1]))
        found = np.concatenate(ranks)
        return float((found < 1).mean()), float((found < 4).mean())


def _first_choices(final: mx.array, head: mx.array) -> npt.NDArray[Any]:
    starts = range(0, final.shape[0], _CHUNK_ROWS)
    return np.concatenate([np.asarray(mx.argmax(final[n : n + _CHUNK_ROWS] @ head.T, axis=-1)) for n in starts])
