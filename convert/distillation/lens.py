"""The lens of a student in closed form: ridge regression from its activations to the target's."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from .student import Student
from .student_cpu import numpy_exponentials
from .student_data import Batch

_RIDGE = 1e-4  # of the mean square of an activation


def fit_lens(student: Student, batches: Iterable[Batch], num_tokens: int) -> None:
    """Set `student.lens` from the first batches that have `num_tokens` rows, or from all of them.

    With X the student's normed activations, before the lens, and Y the target's last ones, (X'X + r)^-1 X'Y.
    Raises ValueError where the batches have no rows.
    """
    size = student.head.shape[1]
    squares, products, seen = np.zeros((size, size)), np.zeros((size, size)), 0
    student.lens = mx.eye(size)
    for batch in batches:
        with numpy_exponentials(student.layers[0]):
            features = student.features(batch.hidden)
        x = np.asarray(features.reshape(-1, size)[batch.rows])
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
