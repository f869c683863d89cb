"""What the student is trained for, and how often it agrees with the target.

    loss = (1 - hard_share) KL(target || student) + hard_share CE(chosen token, student)
           + hidden_weight |student's features - target's|^2 / |target's|^2

Both distributions are over the head's vocabulary. The gradient of the first two by the logits is p - q, where p is
the student's distribution and q = (1 - hard_share) target + hard_share chosen. It is written down here, and handed
to MLX as the gradient by the features: exponentials over the vocabulary are most of the cost on a CPU, so each is
taken once, and a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .student import Student
from .student_cpu import numpy_exponentials, softmax
from .student_data import Batch

_CHUNK_ROWS = 1024
_SCALES = tuple(2.0 ** (-n / 2) for n in range(9))


class Distillation:
    """The loss against the target's own head."""

    def __init__(self, teacher_head: mx.array, hard_share: float, hidden_weight: float) -> None:
        """teacher_head: (V', H) float32, the target's rows for the student's vocabulary."""
        self._teacher_head = teacher_head
        self._hard_share = hard_share
        self._hidden_weight = hidden_weight

    def loss_and_gradients(self, student: Student, batch: Batch) -> tuple[mx.array, Any]:
        """The loss, mean over the batch's rows, in nats; gradients of all trained parameters."""
        with numpy_exponentials(student.layers[0]):
            (_, loss), gradients = nn.value_and_grad(student, self._surrogate)(student, batch)
        return loss, gradients

    def best_scale(self, student: Student, batch: Batch) -> float:
        """The factor on the student's features, of 1 to 1/16, with the smallest loss on the batch's first rows.

        A fresh student is as sure as the target and mostly wrong. The last norm fixes the size of its logits, and
        Adam moves that norm's weights a thousandth a step.
        """
        few = slice(0, _CHUNK_ROWS)
        with numpy_exponentials(student.layers[0]):
            features = _rows_of(student.features(batch.hidden), batch.rows)[few]
        losses = [float(self._by_logits(scale * features, student.head, batch, few)[0]) for scale in _SCALES]
        return _SCALES[int(np.argmin(losses))]

    def _surrogate(self, student: Student, batch: Batch) -> tuple[mx.array, mx.array]:
        """A scalar with the loss's gradients, and the loss."""
        features = _rows_of(student.features(batch.hidden), batch.rows)
        fixed = mx.stop_gradient(features)
        losses, by_features = [], []
        head, by_head = student.head, mx.array(0.0)
        for start in range(0, len(batch.labels), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            loss, by_logits = self._by_logits(fixed[rows], mx.stop_gradient(head), batch, rows)
            losses.append(loss)
            by_features.append(mx.stop_gradient(by_logits @ head))
            if "head" in student.trainable_parameters():
                by_head = by_head + (mx.stop_gradient(by_logits.T @ fixed[rows]) * head).sum()
        total = mx.stop_gradient(sum(losses, mx.array(0.0)))
        surrogate = (mx.concatenate(by_features) * features).sum() + by_head
        if self._hidden_weight:
            far = self._hidden_weight * _distance(features, batch.final)
            surrogate, total = surrogate + far, total + mx.stop_gradient(far)
        return surrogate, total

    def _by_logits(
        self, features: mx.array, head: mx.array, batch: Batch, rows: slice
    ) -> tuple[mx.array, mx.array]:
        """These rows' share of the loss, and its gradient by their logits."""
        logits, wanted = features @ head.T, batch.final[rows] @ self._teacher_head.T
        (p, normaliser), (q, teacher_normaliser) = softmax(logits), softmax(wanted)
        labels = mx.array(batch.labels[rows])[:, None]
        soft = normaliser - teacher_normaliser + (q * (wanted - logits)).sum(axis=-1, keepdims=True)
        hard = normaliser - mx.take_along_axis(logits, labels, axis=-1)
        loss = (1 - self._hard_share) * soft + self._hard_share * hard
        by_logits = p - (1 - self._hard_share) * q
        if self._hard_share:
            at = mx.take_along_axis(by_logits, labels, axis=-1) - self._hard_share
            by_logits = mx.put_along_axis(by_logits, labels, at, axis=-1)
        count = len(batch.labels)
        return loss.sum() / count, by_logits / count


def _rows_of(features: mx.array, rows: mx.array) -> mx.array:
    return features.reshape(-1, features.shape[-1])[rows]


def _distance(features: mx.array, final: mx.array) -> mx.array:
    """Mean squared distance, relative to the size of `final` (M, H)."""
    return ((features - final) ** 2).sum() / (final**2).sum()


class Examination:
    """Texts that are never trained on, with the target's own first choices over its whole vocabulary."""

    def __init__(self, batches: Sequence[Batch], whole_head: mx.array, tokens: Any) -> None:
        """whole_head: (V, H) float32, the target's. tokens: (V',) ids of the student's vocabulary."""
        places = np.full(whole_head.shape[0], -1, np.int32)
        places[tokens] = np.arange(len(tokens), dtype=np.int32)
        self._batches = batches
        self._choices = [places[_first_choices(batch.final, whole_head)] for batch in batches]
        self.num_tokens = sum(map(len, self._choices))

    def agreement(self, student: Student) -> tuple[float, float]:
        """Shares of the target's choices that are the student's first, or one of its first four.

        Choices that the head has no row for are missed."""
        first = four = 0
        for batch, choices in zip(self._batches, self._choices, strict=True):
            with numpy_exponentials(student.layers[0]):
                features = _rows_of(student.features(batch.hidden), batch.rows)
            for start in range(0, len(choices), _CHUNK_ROWS):
                chosen = choices[start : start + _CHUNK_ROWS]
                logits = features[start : start + _CHUNK_ROWS] @ student.head.T
                own = mx.take_along_axis(logits, mx.array(np.maximum(chosen, 0))[:, None], axis=-1)
                better = np.asarray((logits > own).sum(axis=-1))
                first += int(((better < 1) & (chosen >= 0)).sum())
                four += int(((better < 4) & (chosen >= 0)).sum())
        return first / max(self.num_tokens, 1), four / max(self.num_tokens, 1)


def _first_choices(final: mx.array, head: mx.array) -> Any:
    found = [
        np.asarray(mx.argmax(final[start : start + _CHUNK_ROWS] @ head.T, axis=-1))
        for start in range(0, final.shape[0], _CHUNK_ROWS)
    ]
    return np.concatenate(found)
