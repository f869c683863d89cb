"""GGUF files become mlx-lm folders, completely or not at all, or are refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.gguf import convert as gguf_convert
from llmcad_mlx.gguf.convert import convert_gguf
from llmcad_mlx.gguf.reader import read_gguf_header
from llmcad_mlx.models.folder import own_sampling
from llmcad_mlx.store.names import pull_part
from tests.support.tiny_gguf import HIDDEN, write_tiny_gguf

VALUES = "blk.0.attn_v.weight"


def test_written_in_pieces_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", Kind.Q5_0)
    convert_gguf(tiny, tmp_path / "whole")
    monkeypatch.setattr(gguf_convert, "CHUNK_VALUES", HIDDEN * 7)
    convert_gguf(tiny, tmp_path / "pieces")
    whole, pieces = (tmp_path / name / "model.safetensors" for name in ("whole", "pieces"))
    assert whole.read_bytes() == pieces.read_bytes()


@pytest.mark.parametrize(
    ("skip", "added", "values", "message"),
    [
        ("blk.1.ffn_up.weight", "", None, "1 tensors are missing, the first for model.layers.1.mlp.up_proj"),
        (VALUES, VALUES, np.ones((5, HIDDEN), np.float32), f"{VALUES!r} is (5, 64), expected (32, 64)"),
        (VALUES, VALUES, np.ones((32, HIDDEN), np.int16), f"{VALUES!r} has type I16, which is not supported"),
        ("", "blk.0.extra.weight", np.ones(4, np.float32), "'blk.0.extra.weight' has no place in llama"),
        ("", "blk.7.attn_q.bias", np.ones(4, np.float32), "'blk.7.attn_q.bias' has no place in llama"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: str, added: str, values: Any, message: str
) -> None:
    edit = None if values is None else lambda writer: writer.add_tensor(added, values)
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", skip=(skip,), edit=edit)
    monkeypatch.setattr("llmcad_mlx.gguf.convert.new_folder", pytest.fail)
    with pytest.raises(ModelError, match=re.escape(message)):
        convert_gguf(tiny, tmp_path / "out")


@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "output_norm.weight"])
def test_nan_weights_are_refused_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    with tiny.open("r+b") as file:
        file.seek(read_gguf_header(tiny).tensors[name].offset)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(ModelError, match=f"{name}' holds NaN"):
        convert_gguf(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tiny]


@pytest.mark.parametrize(
    ("bits", "group_size", "error", "message"),
    [
        (7, 32, UsageError, "bits: 7 is not one of 2, 3, 4, 5, 6, 8, 16"),
        (4, 48, UsageError, "group-size: 48 is not one of"),
        (4, 64, ModelError, r"ffn_down.weight' has rows of 96.*--group-size"),
    ],
)
def test_options_are_checked(
    tmp_path: Path, bits: int, group_size: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "out", bits, group_size)


@pytest.mark.large
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("Write a Python function that reverses a string.", "def reverse"),
        ("Translate to German: The weather is nice today.", "Wetter ist heute"),
    ],
)
def test_converted_draft_answers(question: str, answer: str) -> None:
    model, tokenizer = mlx_lm.load(str(pull_part("qwen2.5-coder-1.5b", "draft")))
    model.set_dtype(mx.float32)  # half precision is slow on a CPU
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert answer in mlx_lm.generate(model, tokenizer, prompt, max_tokens=16)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, {}),
        ({"temp": 0.6, "top_k": 20, "top_p": 0.95, "penalty_repeat": 1.05},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}),
        ({"min_p": 0.01}, {"temperature": 1.0, "min_p": 0.01}),
        ({"temp": 0.0, "top_k": 20}, {}),
    ],
)  # fmt: skip
def test_the_sampling_that_a_file_recommends_is_kept(
    tmp_path: Path, fields: dict[str, float], sampling: dict[str, float]
) -> None:
    def add(writer: Any) -> None:
        for name, value in fields.items():
            write = writer.add_int32 if isinstance(value, int) else writer.add_float32
            write(f"general.sampling.{name}", value)

    convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", edit=add), tmp_path / "out")
    assert own_sampling(tmp_path / "out") == sampling
