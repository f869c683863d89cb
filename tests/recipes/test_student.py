"""The student: its loss and gradients, its lens, and the batches it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from distill.batches import Batch, Batches, token_counts
from distill.corpus import Ids, Shard, shards_in
from distill.exponentials import numpy_exponentials, softmax
from distill.loss import Distillation, Examination
from distill.student import FrozenTarget, Student, dense, frequent_tokens, head_rows
from distill.training import fit_lens
from llmcad_mlx.models.folder import LoadedModel
from tests.support.tiny_folder import VOCAB


def batch_of() -> Batch:
    """Two texts of six tokens; the target has chosen at seven places."""
    mx.random.seed(0)
    rows = np.array([1, 2, 3, 4, 8, 9, 10], np.int32)
    labels = np.array([0, 3, 3, 7, 13, 2, 1], np.int32)
    return Batch(mx.random.normal((2, 6, 64)), mx.array(rows), mx.random.normal((7, 64)), labels, 12)


def plain_loss(student: Student, batch: Batch, teacher: mx.array, hard: float) -> mx.array:
    """The loss as it is defined, for MLX to differentiate."""
    features = student.features(batch.hidden).reshape(-1, 64)[batch.rows]
    logits, wanted = features @ student.head.T, batch.final @ teacher.T
    log_p, log_q = nn.log_softmax(logits), nn.log_softmax(wanted)
    soft = (mx.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean()
    chosen = -mx.take_along_axis(log_p, mx.array(batch.labels)[:, None], axis=-1).mean()
    return (1 - hard) * soft + hard * chosen


@pytest.mark.parametrize(("hard", "train_head"), [(0.0, False), (0.3, True), (1.0, False)])
def test_gradients_are_those_of_the_loss_as_it_is_defined(
    target: LoadedModel, tokens: Ids, hard: float, train_head: bool
) -> None:
    student = Student(target.model, [2], tokens, train_head)
    batch, teacher = batch_of(), head_rows(target.model, tokens)
    loss, gradients = Distillation(teacher, hard).loss_and_gradients(student, batch)
    expected, plain = nn.value_and_grad(student, plain_loss)(student, batch, teacher, hard)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    found: Any = dict(tree_flatten(gradients))
    assert ("head" in found) == train_head
    for name, gradient in tree_flatten(plain):
        scale = float(mx.abs(gradient).max())
        assert float(mx.abs(found[name] - gradient).max()) < 1e-4 * max(scale, 1e-3), name


def test_softmax_takes_any_row() -> None:
    rows = mx.array([[0.0, 1.0, 2.0], [-200.0, 300.0, 300.0], [5.0, 5.0, 5.0]])
    probabilities, normaliser = softmax(rows)
    assert np.allclose(probabilities, mx.softmax(rows, axis=-1), atol=1e-6)
    assert np.allclose(normaliser, mx.logsumexp(rows, axis=-1, keepdims=True))


def test_a_student_of_the_last_layers_is_the_target(target: LoadedModel, corpus: Path, tokens: Ids) -> None:
    """So untrained it agrees with it everywhere, but where its head has no row."""
    student = Student(target.model, [1, 2], tokens)
    frozen = FrozenTarget(target.model, 1)
    text = mx.array([[4, 9, 17, 20, 33, 7, 50, 80]])
    whole = dense(target.model)(text)
    assert np.allclose(student.features(frozen(text)[0]) @ student.head.T, whole[..., mx.array(tokens)], atol=1e-4)
    head = head_rows(target.model, slice(None))
    unseen = Batches(corpus, 1, 512, tokens, frozen).unseen(10**6)
    share = np.concatenate([np.isin(np.argmax(b.final @ head.T, axis=-1), tokens) for b in unseen]).mean()
    assert 0.0 < share < 1.0
    assert Examination(unseen, head, tokens).agreement(student) == (share, share)


def test_activations_computed_are_those_of_the_corpus(target: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    for path in corpus.iterdir():
        arrays = {name: array for name, array in mx.load(str(path)).items() if name in ("tokens", "ends", "given")}
        mx.save_safetensors(str(tmp_path / path.name), arrays)
    frozen = FrozenTarget(target.model, 1)
    tokens = frequent_tokens(token_counts(shards_in(corpus)[1:], VOCAB), 40)
    stored = list(Batches(corpus, 1, 512, tokens, frozen).of_shard(2, (0, 0)))
    computed = list(Batches(tmp_path, 1, 512, tokens, frozen).of_shard(2, (0, 0)))
    assert len(stored) == len(computed) > 1
    for one, other in zip(stored, computed, strict=True):
        assert one.labels.tolist() == other.labels.tolist()
        assert np.allclose(one.final, other.final, atol=0.02)  # float16 in the corpus
        rows = [array.reshape(-1, 64)[one.rows] for array in (one.hidden, other.hidden)]
        assert np.allclose(*rows, rtol=2e-3, atol=0.02)


def test_batches_hold_every_choice_once_and_end_where_they_should(target: LoadedModel, corpus: Path) -> None:
    frozen = FrozenTarget(target.model, 1)
    path = shards_in(corpus)[1]
    counts = token_counts([path], VOCAB)
    written = np.concatenate([ids[given:] for ids, given in Shard.load(path).texts()])
    assert counts.tolist() == np.bincount(written, minlength=VOCAB).tolist()
    tokens = frequent_tokens(counts, 20)
    counts[np.setdiff1d(np.arange(VOCAB), tokens)] = 0
    batches = Batches(corpus, 1, 512, tokens, frozen)
    for seed in ((0, 0), (0, 1)):
        chosen = np.concatenate([tokens[batch.labels] for batch in batches.of_shard(1, seed)])
        assert np.bincount(chosen, minlength=VOCAB).tolist() == counts.tolist()
    rest = list(batches.of_shard(1, (0, 0), start=1))
    whole = list(batches.of_shard(1, (0, 0)))
    assert [batch.labels.tolist() for batch in rest] == [batch.labels.tolist() for batch in whole[1:]]
    shapes = [batch.hidden.shape[:2] for batch in whole]
    assert all(rows == 1 or rows * length <= 512 for rows, length in shapes)
    assert any(rows > 1 for rows, _ in shapes)


def test_the_head_has_the_tokens_that_come_most_often() -> None:
    counts = np.array([5, 0, 7, 7, 0, 1])
    assert frequent_tokens(counts, 3).tolist() == [0, 2, 3]
    assert frequent_tokens(counts, 5).tolist() == [0, 1, 2, 3, 5]


def test_layers_say_the_same_with_numpys_exponential(target: LoadedModel) -> None:
    layer: Any = dense(target.model.layers[1])
    mx.random.seed(0)
    states, weights = 3 * mx.random.normal((2, 9, 64)), mx.random.normal((2, 9, 64))
    value_and_grad = nn.value_and_grad(layer, lambda x: (layer(x, "causal", None) * weights).sum())
    plain, plain_gradients = value_and_grad(states)
    before = llama.swiglu
    with numpy_exponentials(layer):
        value, gradients = value_and_grad(states)
        assert (llama.swiglu == before) == (mx.default_device() != mx.cpu)
    assert llama.swiglu == before
    assert float(value) == pytest.approx(float(plain), rel=1e-5)
    found: Any = dict(tree_flatten(gradients))
    for name, gradient in tree_flatten(plain_gradients):
        assert float(mx.abs(found[name] - gradient).max()) < 1e-5 * float(mx.abs(gradient).max()), name


def test_the_lens_is_the_map_to_the_targets_activations(target: LoadedModel, tokens: Ids) -> None:
    student = Student(target.model, [2], tokens)
    matrix = mx.random.normal((64, 64), key=mx.random.key(9))
    student.lens = mx.eye(64)
    batches = []
    for seed in range(6):  # what the student says times `matrix` is what the target says
        hidden = mx.random.normal((2, 40, 64), key=mx.random.key(seed))
        features = student.features(hidden).reshape(-1, 64)
        batches.append(Batch(hidden, mx.arange(80), features @ matrix, np.zeros(80, np.int32), 80))
    fit_lens(student, batches, 400)
    assert float(mx.abs(student.lens - matrix).max()) < 0.01
    assert "lens" in student.trainable_parameters()
    hidden = batches[0].hidden
    logits = student.features(hidden) @ student.head.T
    head, student.lens = student.whole_head, mx.eye(64)
    assert np.allclose(student.features(hidden) @ head.T, logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no rows"):
        fit_lens(student, [], 400)


def test_prompts_are_learned_from_where_texts_begin_to_differ(target: LoadedModel, corpus: Path) -> None:
    frozen, every = FrozenTarget(target.model, 1), np.arange(90, dtype=np.int32)
    answers, both = (Batches(corpus, 1, 512, every, frozen, prompts) for prompts in (False, True))
    learned = [sum(len(b.rows) for b in batches.of_shard(1, (0, 0))) for batches in (answers, both)]
    assert learned[1] > learned[0] > 0
    examined = [sum(len(b.rows) for b in batches.unseen(10**6)) for batches in (answers, both)]
    assert examined[0] == examined[1], "what is examined are answers"
