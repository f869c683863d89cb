"""Drafts with a trimmed head: the rows they keep, how their tokens are chosen, and what cannot be trimmed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model

from convert.trim_vocabulary import count_tokens
from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files.bundle import verify_bundle
from llmcad_mlx.models.folder import DRAFT_TOKENS, load_model_folder
from llmcad_mlx.progress import Progress
from llmcad_mlx.store.convert import convert_folder
from llmcad_mlx.store.copies import usual_tokens, write_trimmed_draft
from tests.support.tiny_folder import VOCAB, family_folder, make_folder, write_folder

LIST = np.array([0, 1, 5, 9, 12, 17, 23, 30, 31, 33, 40, 41, 58, 77, 90], np.int32)
TIED = {"tie_word_embeddings": True, "max_position_embeddings": 512}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": TIED, "qwen3": TIED, "smollm3": TIED, "gemma3_text": {"max_position_embeddings": 512}, "phi3": {},
    "starcoder2": TIED, "olmo2": TIED, "granite": TIED,
}  # fmt: skip


def trimmed(source: Path) -> Path:
    dest = source.with_name("draft")
    write_trimmed_draft(source, dest, LIST)
    return dest


def logits(folder: Path) -> np.ndarray:
    return np.array(load_model_folder(folder).model(mx.array([[3, 17, 5, 40, 2]]))[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_full_ones_at_the_kept_tokens(tmp_path: Path, name: str) -> None:
    source = family_folder(tmp_path / "source", name, **FAMILIES[name])
    draft = trimmed(source)
    assert verify_bundle(draft) is not None
    np.testing.assert_allclose(logits(draft), logits(source)[:, LIST], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_quantised_rows_are_copied_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    changes = {**TIED, "tie_word_embeddings": tied, "hidden_size": 64, "intermediate_size": 64}
    source = family_folder(tmp_path / "four", "qwen2", bits=4, **changes)
    draft = trimmed(source)
    before, after = (dict(mx.load(str(f / "model.safetensors"))) for f in (source, draft))  # type: ignore[call-overload]
    head = "model.embed_tokens" if tied else "lm_head"
    for part in ("weight", "scales", "biases"):
        assert mx.array_equal(after.pop(f"lm_head.{part}"), before[f"{head}.{part}"][mx.array(LIST)])
    assert all(mx.array_equal(before[name], array) for name, array in after.items())
    convert_folder(draft, tmp_path / "again")  # quantising keeps the list
    assert (tmp_path / "again" / DRAFT_TOKENS).read_bytes() == (draft / DRAFT_TOKENS).read_bytes()


def test_an_embedding_of_other_bits_gives_a_head_of_these(tmp_path: Path) -> None:
    """Settings of single modules: the head is read with those of the embedding."""
    source = family_folder(tmp_path / "source", "qwen2", hidden_size=64, intermediate_size=64, **TIED)
    model, config = load_model(source)
    eight = {"group_size": 32, "bits": 8}
    nn.quantize(
        model, 32, 4, class_predicate=lambda p, m: hasattr(m, "to_quantized") and (eight if "embed" in p else True)
    )
    settings = {"group_size": 32, "bits": 4, "model.embed_tokens": eight}
    mixed = write_folder(tmp_path / "mixed", model, {**config, "quantization": settings})
    draft = trimmed(mixed)
    assert json.loads((draft / "config.json").read_text())["quantization"]["lm_head"] == eight
    np.testing.assert_allclose(logits(draft), logits(mixed)[:, LIST], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_trimmed(folder: Path, tmp_path: Path) -> None:
    write_trimmed_draft(folder, tmp_path / "draft", LIST)
    always_tied = family_folder(tmp_path / "gemma2", "gemma2", max_position_embeddings=512)
    for source, tokens, message in (
        (folder, np.array([4, VOCAB], np.int32), f"token {VOCAB} is not in the vocabulary of {VOCAB}"),
        (tmp_path / "draft", LIST[:3], "is trimmed already"),
        (always_tied, LIST, "'gemma2' has no head of its own"),
        (tmp_path / "nothing", LIST, "no such model folder"),
    ):
        with pytest.raises(ModelError, match=message):
            write_trimmed_draft(source, tmp_path / "dest", tokens)
        assert not (tmp_path / "dest").exists()


def test_the_most_frequent_tokens_with_special_ones(folder: Path) -> None:
    tokenizer = load_model_folder(folder, lazy=True).tokenizer
    counts = np.zeros(VOCAB, np.int64)
    counts[[5, 6, 7, 9]] = 5, 9, 5, 7
    # Of equals the lowest; 0 and 1 are special.
    assert usual_tokens(tokenizer, 5, counts).tolist() == [0, 1, 5, 6, 9]
    assert usual_tokens(tokenizer, 9).tolist() == list(range(9))  # by the tokenizer's own order
    for count in (0, 1, VOCAB + 1):
        with pytest.raises(UsageError, match=f"--tokens: {count} is out of range"):
            usual_tokens(tokenizer, count)


def test_tokens_are_counted_in_texts_and_shards(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_model_folder(folder, lazy=True).tokenizer
    corpus = tmp_path / "corpus"
    (corpus / "inner").mkdir(parents=True)
    (corpus / "a.txt").write_text("z\n" * 3)
    (corpus / "image.png").write_bytes(b"\xff")
    z, q, newline = (tokenizer.encode(c, add_special_tokens=False)[0] for c in "zq\n")
    mx.save_safetensors(str(corpus / "inner" / "b.safetensors"), {"tokens": mx.array([q] * 5)})
    counts = count_tokens([corpus], tokenizer, Progress())
    assert len(counts) == VOCAB
    assert {int(token): int(counts[token]) for token in np.flatnonzero(counts)} == {z: 3, q: 5, newline: 3}
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    mx.save_safetensors(str(tmp_path / "beyond.safetensors"), {"tokens": mx.array([VOCAB])})
    mx.save_safetensors(str(tmp_path / "floats.safetensors"), {"tokens": mx.array([1.0])})
    (tmp_path / "void").mkdir()
    for name, message in (
        ("bad.txt", "not UTF-8 text"),
        ("beyond.safetensors", f"token {VOCAB} is not one of {VOCAB}"),
        ("floats.safetensors", "no list of integers 'tokens'"),
        ("void", "has no .txt"),
        ("missing", "no such file"),
    ):
        with pytest.raises(UsageError, match=f"--corpus: .*{name}: {message}"):
            count_tokens([tmp_path / name], tokenizer, Progress())


def test_from_the_command_line(tmp_path: Path) -> None:
    source, dest = make_folder(tmp_path / "source"), tmp_path / "draft"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the one ran in and then the other one\n" * 20)
    for words, code, said in (
        ([source, dest, "--tokens", 21, "--corpus", corpus], 0, f"{dest}: 21 of {VOCAB} output tokens\n"),
        ([source, dest, "--tokens", 21], 2, "already exists and is not empty"),
        ([dest, tmp_path / "new", "--tokens", 9], 1, "is trimmed already"),
    ):
        command = [sys.executable, "-m", "convert.trim_vocabulary", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == code, done.stderr
        if code:
            assert (done.stdout, done.stderr.splitlines()[-1][:7]) == ("", "error: ")
            assert said in done.stderr
        else:
            assert done.stdout == said
            assert "counting tokens in 1 files" in done.stderr
    assert not (tmp_path / "new").exists()
