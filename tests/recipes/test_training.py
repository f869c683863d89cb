"""The lens of a student: what it is fitted to, what it costs, and what is learned inside prompts."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from distill.lens import fit_lens

from distill.batches import Batch, Batches
from distill.checkpoint import Checkpoint, TrainingSettings
from distill.export import export_student
from distill.student import FrozenTarget, Student
from distill.training import Progress, train
from llmcad_mlx import load
from llmcad_mlx.drafting.table import vocabulary_hash
from llmcad_mlx.errors import VocabularyError
from llmcad_mlx.models.folder import LoadedModel, load_model_folder
from tests.recipes.test_student import TOKENS, corpus, folder, target  # fixtures
from tests.support.tiny_folder import make_folder, tiny_environment

__all__ = ["corpus", "folder", "target"]

SETTINGS = TrainingSettings(
    1,
    (2,),
    head_tokens=60,
    steps=4,
    batch_tokens=512,
    learning_rate=1e-3,
    warmup=2,
    check_every=2,
    check_tokens=200,
)


def batches_through(matrix: mx.array, student: Student) -> list[Batch]:
    """What the student says times `matrix` is what the target says."""
    found = []
    for seed in range(6):
        hidden = mx.random.normal((2, 40, 64), key=mx.random.key(seed))
        features = student.features(hidden).reshape(-1, 64)
        found.append(Batch(hidden, mx.arange(80), features @ matrix, np.zeros(80, np.int32), 80))
    return found


def test_it_is_the_map_to_the_targets_activations(target: LoadedModel) -> None:
    student = Student(target.model, [2], TOKENS, lens=True)
    matrix = mx.random.normal((64, 64), key=mx.random.key(9))
    fit_lens(student, batches_through(matrix, student), 400)
    assert float(mx.abs(student.lens - matrix).max()) < 0.01
    assert "lens" in student.trainable_parameters()
    with pytest.raises(ValueError, match="no rows"):
        fit_lens(student, [], 400)


def test_a_head_with_the_lens_in_it_gives_the_same_logits(target: LoadedModel) -> None:
    student = Student(target.model, [2], TOKENS, lens=True)
    student.lens = mx.random.normal((64, 64), key=mx.random.key(9))
    hidden = mx.random.normal((1, 5, 64), key=mx.random.key(1))
    logits = student(hidden)
    head, student.lens = student.whole_head, mx.eye(64)
    assert np.allclose(student.features(hidden) @ head.T, logits, rtol=1e-4, atol=1e-4)


def test_what_it_is_fitted_to_comes_nearer(target: LoadedModel, corpus: Path) -> None:
    batches = list(Batches(corpus, 1, 512, TOKENS, FrozenTarget(target.model, 1)).of_shard(1, (0, 0)))
    distances = []
    for lens in (False, True):
        student = Student(target.model, [2], TOKENS, lens=lens)
        if lens:
            fit_lens(student, batches, 10**6)
        far = [student.features(b.hidden).reshape(-1, 64)[b.rows] - b.final for b in batches]
        distances.append(sum(float(mx.square(f).sum()) for f in far))
    assert distances[1] < distances[0]


def test_prompts_are_learned_from_where_texts_begin_to_differ(target: LoadedModel, corpus: Path) -> None:
    frozen = FrozenTarget(target.model, 1)
    tokens = np.arange(90, dtype=np.int32)
    rows = {
        prompts: sum(len(b.rows) for b in Batches(corpus, 1, 512, tokens, frozen, prompts).of_shard(1, (0, 0)))
        for prompts in (False, True)
    }
    assert rows[True] > rows[False] > 0
    same = [
        sum(len(b.rows) for b in Batches(corpus, 1, 512, tokens, frozen, prompts).unseen(10**6))
        for prompts in (False, True)
    ]
    assert same[0] == same[1], "what is looked at are answers"


@pytest.mark.parametrize("share", [False, True])
def test_trained_stopped_and_exported(target: LoadedModel, corpus: Path, tmp_path: Path, share: bool) -> None:
    seen: list[Progress] = []
    train(target, corpus, tmp_path / "run", SETTINGS, seen.append)
    found = Checkpoint.find(tmp_path / "run")
    assert found is not None
    student = Student(target.model, SETTINGS.sources, found.tokens, lens=True)
    found.restore(student)
    assert not np.allclose(student.lens, mx.eye(64))
    draft = tmp_path / "draft"
    export_student(target, student, SETTINGS, found.tokens, draft, bits=None, share_embedding=share)
    loaded = load_model_folder(draft, like=target)
    ids = [4, 9, 17, 20, 33]
    hidden, _ = FrozenTarget(target.model, 1)(mx.array([ids]))
    assert np.allclose(loaded.model(mx.array([ids])), student(hidden), rtol=1e-3, atol=1e-3)
    assert (draft / "tokenizer.json").exists() != share
    with tiny_environment(tmp_path / "home"):
        with load(target.path, None) as engine:
            plain = engine.generate([4, 5, 6], max_tokens=20).tokens
        with load(target.path, draft) as engine:
            assert engine.generate([4, 5, 6], max_tokens=20, tree_nodes=8).tokens == plain


def test_a_draft_without_tokenizer_is_for_its_targets_tokens_only(
    target: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Student(target.model, [2], TOKENS)
    settings = TrainingSettings(1, (2,), lens=False)
    with monkeypatch.context() as patch:
        patch.setattr("distill.export.vocabulary_hash", lambda tokens: "another")
        export_student(target, student, settings, TOKENS, tmp_path / "foreign", share_embedding=True)
    export_student(target, student, settings, TOKENS, tmp_path / "own", share_embedding=True)
    assert vocabulary_hash(target.tokenizer.get_vocab()) in (tmp_path / "own" / "config.json").read_text()
    with tiny_environment(tmp_path / "home"):
        with pytest.raises(VocabularyError, match="foreign: the draft was made for other tokens"):
            load(target.path, tmp_path / "foreign")
        with load(target.path, tmp_path / "own") as engine:
            assert [drafter.source for drafter in engine.pair.drafters] == ["ngram", "model"]


def test_tables_in_a_drafts_folder_draft_beside_its_model(target: LoadedModel, tmp_path: Path) -> None:
    from distill.tables import make_counts

    draft = make_folder(tmp_path / "draft", layers=1)
    with tiny_environment(tmp_path / "home"):
        with load(target.path, None) as engine:
            plain = engine.generate([4, 5, 6], max_tokens=40).tokens
        vocabulary = vocabulary_hash(target.tokenizer.get_vocab())
        counts = make_counts([np.array([4, 5, 6, *plain], np.int32)], 5, vocabulary)
        counts.save(draft / "corpus.ngrams.safetensors")
        with load(target.path, draft) as engine:
            assert [drafter.source for drafter in engine.pair.drafters] == ["ngram", "table", "model"]
            result = engine.generate([4, 5, 6], max_tokens=40, tree_nodes=8)
        assert result.tokens == plain
        assert result.stats.tokens_per_pass > 2


def test_a_draft_without_tokenizer_can_be_examined_alone(target: LoadedModel, tmp_path: Path) -> None:
    settings = TrainingSettings(1, (2,), lens=False)
    export_student(
        target, Student(target.model, [2], TOKENS), settings, TOKENS, tmp_path / "own", share_embedding=True
    )
    loaded = load_model_folder(tmp_path / "own", alone=True)
    assert loaded.tokenizer is None
    assert loaded.drafts_only
