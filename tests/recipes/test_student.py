"""The student: its loss and gradients, training that goes on where it was, and the draft it becomes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from distill.acceptance import LOOKUP, measure, table_of
from distill.training_plot import plot_training
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import infer_quant_config, load_config

from distill import __main__ as distill_draft
from distill.batches import Batch, Batches, num_shards, token_counts
from distill.checkpoint import Checkpoint, TrainingSettings, read_log
from distill.corpus import CorpusSettings, write_corpus
from distill.exponentials import numpy_exponentials, softmax
from distill.export import DRAFT_TOKENS, export_student
from distill.loss import Distillation, Examination
from distill.student import FrozenTarget, Student, dense, frequent_tokens, head_rows
from distill.training import Progress, train
from distill.writing import Writer
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import load_tree_model
from llmcad_mlx.measure.prompts import BenchPrompt
from llmcad_mlx.models.folder import LoadedModel, load_model_folder
from llmcad_mlx.tree.token_tree import MODEL, NGRAM
from tests.support.tiny_folder import EOS, VOCAB, make_folder, tiny_environment

TOKENS = np.array([0, 1, 5, 6, 7, 20, 21, 22, 23, 24, 30, 31, 50, 60], np.int32)
SETTINGS = TrainingSettings(
    1, (2,), head_tokens=60, steps=12, batch_tokens=512, learning_rate=5e-3, warmup=3, check_every=5,
    check_tokens=200,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("student") / "model", layers=3)


@pytest.fixture(scope="module")
def target(folder: Path) -> LoadedModel:
    return load_model_folder(folder)


@pytest.fixture(scope="module")
def corpus(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards with what the first layer says."""
    path = tmp_path_factory.mktemp("corpus")
    with tiny_environment(path / "home"):
        loaded, model = load_tree_model(folder)
        size = len(loaded.tokenizer.get_vocab())
        settings = CorpusSettings((1,), batch=8, max_tokens=16)
        writers = Writer(model, [EOS], size, (1,)), Writer(model, [EOS], size)
        write_corpus(path / "corpus", 400, *writers, loaded.tokenizer, settings, report=lambda line: None)
    assert num_shards(path / "corpus") >= 4
    return path / "corpus"


def batch_of(seed: int = 0) -> Batch:
    """Two texts of six tokens; the target has chosen at seven places."""
    mx.random.seed(seed)
    rows = np.array([1, 2, 3, 4, 8, 9, 10], np.int32)
    labels = np.array([0, 3, 3, 7, 13, 2, 1], np.int32)
    return Batch(mx.random.normal((2, 6, 64)), mx.array(rows), mx.random.normal((7, 64)), labels, 12)


def plain_loss(student: Student, batch: Batch, teacher: mx.array, hard: float, hidden: float) -> mx.array:
    """The loss as it is defined, for MLX to differentiate."""
    features = student.features(batch.hidden).reshape(-1, 64)[batch.rows]
    logits, wanted = features @ student.head.T, batch.final @ teacher.T
    log_p, log_q = nn.log_softmax(logits), nn.log_softmax(wanted)
    soft = (mx.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean()
    chosen = -mx.take_along_axis(log_p, mx.array(batch.labels)[:, None], axis=-1).mean()
    far = mx.square(features - batch.final).sum() / mx.square(batch.final).sum()
    return (1 - hard) * soft + hard * chosen + hidden * far


@pytest.mark.parametrize(
    ("hard", "hidden", "train_head"), [(0.0, 0.0, False), (0.3, 0.0, True), (1.0, 0.5, False)]
)
def test_gradients_are_those_of_the_loss_as_it_is_defined(
    target: LoadedModel, hard: float, hidden: float, train_head: bool
) -> None:
    student = Student(target.model, [2], TOKENS, train_head)
    batch, teacher = batch_of(), head_rows(target.model, TOKENS)
    loss, gradients = Distillation(teacher, hard, hidden).loss_and_gradients(student, batch)
    expected, plain = nn.value_and_grad(student, plain_loss)(student, batch, teacher, hard, hidden)
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


def test_a_student_of_the_last_layers_is_the_target(target: LoadedModel, corpus: Path) -> None:
    """So untrained it agrees with it everywhere, but where its head has no row."""
    student = Student(target.model, [1, 2], TOKENS)
    frozen = FrozenTarget(target.model, 1)
    tokens = mx.array([[4, 9, 17, 20, 33, 7, 50, 80]])
    hidden, _ = frozen(tokens)
    whole = dense(target.model)(tokens)
    assert np.allclose(student(hidden), whole[..., mx.array(TOKENS)], atol=1e-4)
    head = head_rows(target.model, slice(None))
    unseen = Batches(corpus, 1, 512, TOKENS, frozen).unseen(10**6)
    share = np.concatenate([np.isin(np.argmax(b.final @ head.T, axis=-1), TOKENS) for b in unseen]).mean()
    assert 0.0 < share < 1.0
    assert Examination(unseen, head, TOKENS).agreement(student) == (share, share)


def test_a_student_too_sure_of_itself_is_scaled_down(target: LoadedModel, corpus: Path) -> None:
    student = Student(target.model, [1, 2], TOKENS)
    frozen = FrozenTarget(target.model, 1)
    batch = next(Batches(corpus, 1, 512, TOKENS, frozen).of_shard(1, (0, 0)))
    distillation = Distillation(head_rows(target.model, TOKENS), 0.0, 0.0)
    assert distillation.best_scale(student, batch) == 1.0
    student.norm.weight *= 8
    assert distillation.best_scale(student, batch) == 0.125


def test_activations_computed_are_those_of_the_corpus(target: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    for path in corpus.iterdir():
        arrays = {name: array for name, array in mx.load(str(path)).items() if name in ("tokens", "ends", "given")}
        mx.save_safetensors(str(tmp_path / path.name), arrays)
    frozen = FrozenTarget(target.model, 1)
    counts = token_counts(corpus, num_shards(corpus), VOCAB)
    tokens = frequent_tokens(counts, 40)
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
    tokens = frequent_tokens(token_counts(corpus, num_shards(corpus), VOCAB), 40)
    batches = Batches(corpus, 1, 512, tokens, frozen)
    for seed in ((0, 0), (0, 1)):
        chosen = np.concatenate([tokens[batch.labels] for batch in batches.of_shard(1, seed)])
        expected = token_counts_of(corpus / "corpus-00001.safetensors")
        assert (
            np.bincount(chosen, minlength=VOCAB).tolist()
            == np.where(np.isin(np.arange(VOCAB), tokens), expected, 0).tolist()
        )
    rest = list(batches.of_shard(1, (0, 0), start=1))
    whole = list(batches.of_shard(1, (0, 0)))
    assert [batch.labels.tolist() for batch in rest] == [batch.labels.tolist() for batch in whole[1:]]
    shapes = [batch.hidden.shape[:2] for batch in whole]
    assert all(rows == 1 or rows * length <= 512 for rows, length in shapes)
    assert any(rows > 1 for rows, _ in shapes)


def token_counts_of(path: Path) -> Any:
    arrays: Any = mx.load(str(path))
    tokens, ends, given = (np.asarray(arrays[name]) for name in ("tokens", "ends", "given"))
    starts = [0, *ends[:-1]]
    chosen = [tokens[start + skip : end] for start, end, skip in zip(starts, ends, given, strict=True)]
    return np.bincount(np.concatenate(chosen), minlength=VOCAB)


def test_the_head_has_the_tokens_that_come_most_often() -> None:
    counts = np.array([5, 0, 7, 7, 0, 1])
    assert frequent_tokens(counts, 3).tolist() == [0, 2, 3]
    assert frequent_tokens(counts, 5).tolist() == [0, 1, 2, 3, 5]


class BrokenError(Exception):
    pass


def curve(folder: Path) -> list[dict[str, Any]]:
    """The run's log without times."""
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_log(folder)]


@pytest.fixture(scope="module")
def unbroken(target: LoadedModel, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(target, corpus, folder, SETTINGS)
    return folder


def test_training_lowers_the_loss_and_is_logged(unbroken: Path) -> None:
    log = curve(unbroken)
    losses = [line["loss"] for line in log if "loss" in line]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in log if "top1" in line] == [0, 5, 10, 12]
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    found = Checkpoint.find(unbroken)
    assert found is not None
    assert (found.place.step, found.settings) == (12, SETTINGS)


@pytest.mark.parametrize("after", [4, 6, 11])
def test_a_run_that_failed_goes_on_to_the_same_curve(
    target: LoadedModel, corpus: Path, unbroken: Path, tmp_path: Path, after: int
) -> None:
    def fail(progress: Progress) -> None:
        if progress.step == after and progress.top1 is None:
            raise BrokenError

    with pytest.raises(BrokenError):
        train(target, corpus, tmp_path, SETTINGS, fail)
    assert len(curve(tmp_path)) < len(curve(unbroken))
    train(target, corpus, tmp_path, SETTINGS)
    assert curve(tmp_path) == curve(unbroken)


def test_a_run_that_was_killed_goes_on_to_the_same_curve(
    target: LoadedModel, folder: Path, corpus: Path, unbroken: Path, tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from distill.training import train\n"
        "from llmcad_mlx.models.folder import load_model_folder\n"
        "from tests.recipes.test_student import SETTINGS\n"
        "def report(progress):\n"
        "    if progress.step == 8:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "model, corpus, folder = map(Path, sys.argv[1:])\n"
        "train(load_model_folder(model), corpus, folder, SETTINGS, report)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, folder, corpus, tmp_path], cwd=root, env=os.environ, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert curve(tmp_path)[-1]["step"] == 8
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # what a kill may leave
    train(target, corpus, tmp_path, SETTINGS)
    assert curve(tmp_path) == curve(unbroken)


def test_a_checkpoint_of_other_settings_is_refused(target: LoadedModel, corpus: Path, unbroken: Path) -> None:
    other = TrainingSettings(**{**settings_dict(), "learning_rate": 1e-3})
    with pytest.raises(UsageError, match=r"was made with --learning-rate 0\.005, not 0\.001; .*name another run$"):
        train(target, corpus, unbroken, other)


def test_a_checkpoint_of_another_target_is_refused(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    other: Any = load_model_folder(make_folder(tmp_path / "model", layers=3, noise=0.1))
    with pytest.raises(UsageError, match="is of another target"):
        train(other, corpus, unbroken, SETTINGS)


def test_a_damaged_checkpoint_is_refused(target: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors: not a checkpoint"):
        train(target, corpus, tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"depth": 4}, "--depth"), ({"depth": -1}, "--depth"), ({"sources": ()}, "--layers"),
        ({"sources": (3,)}, "--from-layers"), ({"learning_rate": 0.0}, "--learning-rate"),
        ({"hard_share": 1.5}, "--hard-share"), ({"hidden_weight": -1.0}, "--hidden-weight"),
        ({"warmup": 12}, "--warmup"), ({"batch_tokens": 0}, "--batch-tokens"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(
    target: LoadedModel, corpus: Path, tmp_path: Path, changes: dict[str, Any], option: str
) -> None:
    with pytest.raises(UsageError, match=f"^{option}: "):
        train(target, corpus, tmp_path, TrainingSettings(**{**settings_dict(), **changes}))


def settings_dict() -> dict[str, Any]:
    return {name: getattr(SETTINGS, name) for name in SETTINGS.__slots__}


def exported(target: LoadedModel, folder: Path, dest: Path, **options: Any) -> Student:
    """Write the draft of the run in `folder` to `dest`; returns the student."""
    found = Checkpoint.find(folder)
    assert found is not None
    student = Student(
        target.model, found.settings.sources, found.tokens, found.settings.train_head, found.settings.lens
    )
    found.restore(student)
    export_student(target, student, found.settings, found.tokens, dest, **options)
    return student


def draft_of(folder: Path) -> tuple[Any, Any]:
    """The draft as mlx-lm would build it, were its head not short; and the head's tokens."""
    tokens = np.asarray(mx.load(str(folder / DRAFT_TOKENS))["tokens"])
    model = llama.Model(llama.ModelArgs.from_dict(load_config(folder)))
    model.lm_head = nn.Linear(64, len(tokens), bias=False)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    nn.quantize(
        model,
        class_predicate=lambda path, module: (
            f"{path}.scales" in weights and infer_quant_config(path, module, weights)
        ),
    )
    model.load_weights(list(weights.items()), strict=True)
    return model, tokens


@pytest.mark.parametrize(("bits", "tolerance"), [(None, 1e-5), (8, 0.02), (4, 0.25)])
def test_an_exported_draft_says_what_the_student_says(
    target: LoadedModel, unbroken: Path, tmp_path: Path, bits: int | None, tolerance: float
) -> None:
    student = exported(target, unbroken, tmp_path / "draft", bits=bits)
    draft, tokens = draft_of(tmp_path / "draft")
    assert len(tokens) == 60
    assert (np.diff(tokens) > 0).all()
    assert tokens.dtype == np.int32
    text = mx.array([[4, 9, 17, 20, 33, 7, 50, 80, 3, 3, 2]])
    said, meant = draft(text), student(FrozenTarget(target.model, 1)(text)[0])
    worst = float(mx.abs(said - meant).max() / mx.abs(meant).max())
    assert worst < tolerance
    assert getattr(draft.layers[1].mlp.up_proj, "bits", None) == bits
    config = load_config(tmp_path / "draft")
    assert (config["num_hidden_layers"], config["vocab_size"], config["tie_word_embeddings"]) == (2, VOCAB, False)
    assert (tmp_path / "draft" / "tokenizer.json").exists()


def test_export_keeps_what_training_has_moved(target: LoadedModel, unbroken: Path, tmp_path: Path) -> None:
    """Weights that began on a 4-bit grid must not fall back onto it."""
    found = Checkpoint.find(unbroken)
    assert found is not None
    student = Student(target.model, found.settings.sources, found.tokens)
    linear = student.layers[0].mlp.down_proj
    mx.random.seed(0)
    grid = mx.dequantize(*mx.quantize(mx.random.normal(linear.weight.shape).astype(mx.float16), 32, 4), 32, 4)
    moved = 0.05 * mx.random.normal(grid.shape)
    linear.weight = grid.astype(mx.float32) + moved
    export_student(target, student, found.settings, found.tokens, tmp_path / "draft")
    draft, _ = draft_of(tmp_path / "draft")
    kept = dense(draft).layers[1].mlp.down_proj.weight - grid
    assert float((kept * moved).sum() / (moved * moved).sum()) == pytest.approx(1.0, abs=0.05)


def test_an_exported_draft_may_leave_the_embedding_to_the_target(
    target: LoadedModel, unbroken: Path, tmp_path: Path
) -> None:
    exported(target, unbroken, tmp_path / "draft", share_embedding=True)
    names = mx.load(str(tmp_path / "draft" / "model.safetensors"))
    assert not any("embed_tokens" in name for name in names)
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["llmcad"]["shares_embedding"]


def test_a_trained_head_is_exported(target: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    settings = TrainingSettings(**{**settings_dict(), "train_head": True, "steps": 4})
    train(target, corpus, tmp_path / "run", settings)
    student = exported(target, tmp_path / "run", tmp_path / "draft", bits=None)
    draft, tokens = draft_of(tmp_path / "draft")
    assert np.array_equal(draft.lm_head.weight, student.whole_head)
    assert not np.allclose(student.head, head_rows(target.model, tokens))


def test_what_drafts_reach_is_counted_by_who_drafted(folder: Path, tmp_path: Path) -> None:
    noisy = make_folder(tmp_path / "noisy", layers=3, noise=0.01)
    prompts = [BenchPrompt("one", "a", "the end"), BenchPrompt("two", "b", "in the inner inn")]
    with tiny_environment(tmp_path / "home"):
        lookup, alone, both = measure(str(folder), [str(noisy)], prompts, [5], 24)
    assert [line.name for line in (lookup, alone, both)] == [LOOKUP, "noisy", f"noisy and {LOOKUP}"]
    assert set(lookup.over().accepted) <= {NGRAM}
    assert set(alone.over().accepted) == {MODEL}
    for line in (lookup, alone, both):
        total = line.over()
        assert total.tokens == sum(reach.tokens for reach in line.reached) == lookup.over().tokens
        # Each pass adds the target's own token, but one that ends with a drafted stop token.
        own = total.tokens - total.accepted.total()
        assert total.passes - len(prompts) <= own <= total.passes
        assert line.over("two").tokens == line.reached[1].tokens
        assert f"| {total.tokens_per_pass:.2f} |" in table_of([line])
    assert alone.over().tokens_per_pass > 1.5


def test_the_plot_is_drawn_from_the_log(unbroken: Path, tmp_path: Path) -> None:
    assert plot_training(unbroken, "tiny") == unbroken / "loss.png"
    assert (unbroken / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert plot_training(tmp_path, "nothing") is None


def test_layers_say_the_same_with_numpys_exponential(target: LoadedModel) -> None:
    """And their gradients are the same."""
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


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["distill_draft.py", *map(str, arguments)])
    distill_draft.main()


def test_the_commands_train_stop_go_on_and_export(
    folder: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = (
        folder, corpus.parent, "--name", tmp_path / "run", "--layers", 1, "--head-tokens", 60, "--steps", 7,
        "--warmup", 2, "--batch-tokens", 512, "--check-every", 3, "--check-tokens", 100,
    )  # fmt: skip
    show = distill_draft.Bars.show

    def interrupted(bars: Any, progress: Any) -> None:
        show(bars, progress)
        if progress.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(distill_draft.Bars, "show", interrupted)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "train", *options)
    assert stopped.value.code == 130
    assert "stopped at step 5; the same command goes on from step 3" in capsys.readouterr().err
    monkeypatch.setattr(distill_draft.Bars, "show", show)
    command(monkeypatch, "train", *options)
    out = capsys.readouterr().out
    assert "step 0:" not in out
    assert "step 7: loss" in out
    assert (tmp_path / "run" / "loss.png").exists()
    with pytest.raises(SystemExit) as refused:
        command(monkeypatch, "train", *options, "--seed", 1)
    assert refused.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    command(
        monkeypatch, "export", folder, corpus.parent, tmp_path / "draft", "--name", tmp_path / "run", "--dense"
    )
    assert "step 7 of 7" in capsys.readouterr().out
    assert (tmp_path / "draft" / DRAFT_TOKENS).exists()
    with pytest.raises(SystemExit) as refused:
        command(monkeypatch, "export", folder, corpus.parent, tmp_path / "new", "--name", "nothing")
    assert refused.value.code == 2
    assert "run the train step first" in capsys.readouterr().err
