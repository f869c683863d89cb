"""Training that goes on where it was, and the draft that a student becomes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from convert import exit_code_of
from distill import __main__ as commands
from distill.checkpoint import Checkpoint, TrainingSettings, read_log
from distill.export import DRAFT_TOKENS, export_student
from distill.student import FrozenTarget, Student, dense, head_rows
from distill.training import Progress, train
from llmcad_mlx import load
from llmcad_mlx.drafting.table import vocabulary_hash
from llmcad_mlx.errors import UsageError, VocabularyError
from llmcad_mlx.models.folder import LoadedModel, load_model_folder
from tests.support.tiny_folder import VOCAB, make_folder

pytestmark = pytest.mark.usefixtures("tiny_home")
SETTINGS = TrainingSettings(
    1, (2,), head_tokens=60, steps=12, batch_tokens=512, learning_rate=5e-3, warmup=3, check_every=5,
    check_tokens=200,
)  # fmt: skip


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
    assert (found.place.step, found.settings) == (12, SETTINGS)


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_that_was_killed_goes_on_to_the_same_curve(
    target: LoadedModel, folder: Path, corpus: Path, unbroken: Path, tmp_path: Path, step: int
) -> None:
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from distill.training import train
        from llmcad_mlx.models.folder import load_model_folder
        from tests.recipes.test_training import SETTINGS
        model, corpus, folder, step = *map(Path, sys.argv[1:4]), int(sys.argv[4])
        kill = lambda progress: progress.step == step and os.kill(os.getpid(), signal.SIGKILL)
        train(load_model_folder(model), corpus, folder, SETTINGS, kill)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, folder, corpus, tmp_path, str(step)], cwd=root, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert curve(tmp_path)[-1]["step"] == step
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # what a kill may leave
    train(target, corpus, tmp_path, SETTINGS)
    assert curve(tmp_path) == curve(unbroken)


def test_what_a_run_cannot_go_on_from_is_refused(
    target: LoadedModel, corpus: Path, unbroken: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"was made with --learning-rate 0\.005, not 0\.001; .*name another run$"):
        train(target, corpus, unbroken, replace(SETTINGS, learning_rate=1e-3))
    other = load_model_folder(make_folder(tmp_path / "model", layers=3, noise=0.1))
    with pytest.raises(UsageError, match="is of another target"):
        train(other, corpus, unbroken, SETTINGS)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors: not a checkpoint"):
        train(target, corpus, tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"depth": 4}, "--depth"), ({"depth": -1}, "--depth"), ({"sources": ()}, "--layers"),
        ({"sources": (3,)}, "--from-layers"), ({"learning_rate": 0.0}, "--learning-rate"),
        ({"hard_share": 1.5}, "--hard-share"), ({"warmup": 12}, "--warmup"),
        ({"batch_tokens": 0}, "--batch-tokens"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(
    target: LoadedModel, corpus: Path, tmp_path: Path, changes: dict[str, Any], option: str
) -> None:
    with pytest.raises(UsageError, match=f"^{option}: "):
        train(target, corpus, tmp_path, replace(SETTINGS, **changes))


def exported(target: LoadedModel, folder: Path, dest: Path, **options: Any) -> Student:
    """Write the draft of the run in `folder` to `dest`; returns the student."""
    found = Checkpoint.find(folder)
    student = found.student(target.model)
    export_student(target, student, found.settings, found.tokens, dest, **options)
    return student


@pytest.mark.parametrize(("bits", "tolerance"), [(None, 1e-5), (8, 0.02), (4, 0.25)])
@pytest.mark.parametrize("share", [False, True])
def test_an_exported_draft_says_what_the_student_says(
    target: LoadedModel, unbroken: Path, tmp_path: Path, bits: int | None, tolerance: float, share: bool
) -> None:
    folder = tmp_path / "draft"
    student = exported(target, unbroken, folder, bits=bits, share_embedding=share)
    assert any("embed_tokens" in name for name in mx.load(str(folder / "model.safetensors"))) != share
    assert (folder / "tokenizer.json").exists() != share
    tokens = np.asarray(mx.load(str(folder / DRAFT_TOKENS))["tokens"])
    assert (len(tokens), tokens.dtype, (np.diff(tokens) > 0).all()) == (60, np.int32, True)
    draft = load_model_folder(folder, like=target)
    assert getattr(draft.model.layers[1].mlp.up_proj, "bits", None) == bits
    config = draft.config
    assert (config["num_hidden_layers"], config["vocab_size"], config["tie_word_embeddings"]) == (2, VOCAB, False)
    text = mx.array([[4, 9, 17, 20, 33, 7, 50, 80, 3, 3, 2]])
    said = draft.model(text)
    meant = student.features(FrozenTarget(target.model, 1)(text)[0]) @ student.head.T
    assert float(mx.abs(said - meant).max() / mx.abs(meant).max()) < tolerance
    if share:
        alone = load_model_folder(folder, alone=True)
        assert alone.tokenizer is None
        assert alone.drafts_only
    with load(target.path, None) as engine:
        plain = engine.generate([4, 5, 6], max_tokens=20).tokens
    with load(target.path, folder) as engine:
        assert engine.generate([4, 5, 6], max_tokens=20, tree_nodes=8).tokens == plain


def test_export_keeps_what_training_has_moved(target: LoadedModel, unbroken: Path, tmp_path: Path) -> None:
    """Weights that began on a 4-bit grid must not fall back onto it."""
    found = Checkpoint.find(unbroken)
    student = Student(target.model, found.settings.sources, found.tokens)
    linear = student.layers[0].mlp.down_proj
    mx.random.seed(0)
    grid = mx.dequantize(*mx.quantize(mx.random.normal(linear.weight.shape).astype(mx.float16), 32, 4), 32, 4)
    moved = 0.05 * mx.random.normal(grid.shape)
    linear.weight = grid.astype(mx.float32) + moved
    export_student(target, student, found.settings, found.tokens, tmp_path / "draft")
    draft = load_model_folder(tmp_path / "draft")
    kept = dense(draft.model).layers[1].mlp.down_proj.weight - grid
    assert float((kept * moved).sum() / (moved * moved).sum()) == pytest.approx(1.0, abs=0.05)


def test_a_trained_head_is_exported(target: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    train(target, corpus, tmp_path / "run", replace(SETTINGS, train_head=True, steps=4))
    student = exported(target, tmp_path / "run", tmp_path / "draft", bits=None)
    weights = mx.load(str(tmp_path / "draft" / "model.safetensors"))
    assert np.array_equal(weights["lm_head.weight"], student.whole_head)
    tokens = np.asarray(mx.load(str(tmp_path / "draft" / DRAFT_TOKENS))["tokens"])
    assert not np.allclose(student.head, head_rows(target.model, tokens))


def test_the_commands_train_stop_go_on_and_export(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
        return exit_code_of(commands.main)

    training = (
        "train", folder, corpus.parent, "--name", tmp_path / "run", "--layers", 1, "--head-tokens", 60,
        "--steps", 7, "--warmup", 2, "--batch-tokens", 512, "--check-every", 3, "--check-tokens", 100,
    )  # fmt: skip
    show = commands.Bars.show

    def interrupted(bars: commands.Bars, progress: Progress) -> None:
        show(bars, progress)
        if progress.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(commands.Bars, "show", interrupted)
        with pytest.raises(SystemExit, match="130"):
            run(*training)
    assert "stopped at step 5; the same command goes on from step 3" in capsys.readouterr().err
    assert run(*training) == 0
    out = capsys.readouterr().out
    assert "step 0:" not in out
    assert "step 7: loss" in out
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert run(*training, "--seed", 1) == 2
    assert capsys.readouterr().err.count("\n") == 1
    export = ("export", folder, corpus.parent, tmp_path / "draft", "--name")
    assert run(*export, tmp_path / "run", "--dense") == 0
    assert "step 7 of 7" in capsys.readouterr().out
    assert (tmp_path / "draft" / DRAFT_TOKENS).exists()
    assert run(*export, "nothing") == 2
    assert "run the train step first" in capsys.readouterr().err


def test_the_corpus_and_table_commands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ("table", folder, tmp_path, tmp_path / "draft.ngrams.safetensors")
    corpus = ("corpus", folder, tmp_path, "--tokens", 120, "--batch", 6, "--max-tokens", 12)
    for code, arguments in ((2, table), (0, corpus), (0, table)):
        monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
        assert exit_code_of(commands.main) == code
    said = capsys.readouterr()
    assert "fewer than two shards; run the corpus step first" in said.err
    assert re.search(r"texts it has not seen, 64 nodes: \d+\.\d\d tokens per pass", said.out)


def test_a_draft_without_tokenizer_is_for_its_targets_tokens_only(
    target: LoadedModel, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("distill.export.vocabulary_hash", lambda tokens: "another")
        exported(target, unbroken, tmp_path / "foreign", share_embedding=True)
    exported(target, unbroken, tmp_path / "own", share_embedding=True)
    assert vocabulary_hash(target.tokenizer.get_vocab()) in (tmp_path / "own" / "config.json").read_text()
    with pytest.raises(VocabularyError, match="foreign: the draft was made for other tokens"):
        load(target.path, tmp_path / "foreign")
    with load(target.path, tmp_path / "own") as engine:
        assert [drafter.source for drafter in engine.pair.drafters] == ["ngram", "model"]
