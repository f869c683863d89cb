"""Every GGUF family comes back as the mlx-lm model it was written from: the same logits, bit for bit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.constants import RopeScalingType
from mlx.utils import tree_flatten

from llmcad_mlx.errors import ModelError
from llmcad_mlx.gguf.convert import convert_gguf
from llmcad_mlx.gguf.model import llama3_divisors, read_family
from llmcad_mlx.gguf.reader import GgufHeader, read_gguf_header
from tests.support.tiny_gguf import BASE, Edit, Family, write_family_gguf

LONG, SHORT = [1.0 + i / 4 for i in range(6)], [1.0] * 6
WINDOW = 5  # shorter than the text of the tests


def written(**fields: Any) -> Edit:
    """Adds these fields by the writer's methods."""

    def edit(writer: GGUFWriter) -> None:
        for name, value in fields.items():
            getattr(writer, f"add_{name}")(value)

    return edit


LINEAR: dict[str, Any] = {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": 8.0}
linear = written(**LINEAR)
scaled_by_8 = written(rope_scaling_factor=8.0)
window = written(sliding_window=WINDOW)
linear_window = written(sliding_window=WINDOW, **LINEAR)
own_pattern = written(sliding_window=WINDOW, sliding_window_pattern=3, rope_freq_base_swa=500.0)
yarn = written(rope_scaling_type=RopeScalingType.YARN, rope_scaling_factor=4.0, rope_scaling_orig_ctx_len=64)
caps = written(attn_logit_softcapping=20.0, final_logit_softcapping=10.0, sliding_window=4096)


def llama3(writer: GGUFWriter, factor: float = 8.0) -> None:
    divisors = llama3_divisors(16, BASE["rope_theta"], factor).astype(np.float32)
    writer.add_tensor("rope_freqs.weight", divisors)


def longrope(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_orig_ctx_len(128)
    writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(2) / np.log(128))))
    writer.add_tensor("rope_factors_long.weight", np.array(LONG, np.float32))
    writer.add_tensor("rope_factors_short.weight", np.array(SHORT, np.float32))


LINEAR_ROPE = {"rope_type": "linear", "factor": 8.0}
UNTIED = {"tie_word_embeddings": False}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA2 = {
    "head_dim": 32,
    "rope_theta": 10000.0,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 10.0,
}
GEMMA3 = {
    "head_dim": 32,
    "num_hidden_layers": 7,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 6,
}
PHI3_LONG = {
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 128,
    "rope_scaling": {"type": "longrope", "long_factor": LONG, "short_factor": SHORT},
}
FAMILIES = {
    "llama": Family("llama", "llama"),
    "llama-untied": Family("llama", "llama", UNTIED, kind=Kind.Q4_0),
    "llama-biases": Family("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Family("llama", "llama", {"rope_scaling": LINEAR_ROPE}, linear),
    "llama-3.1": Family("llama", "llama", {"rope_scaling": LLAMA3_ROPE}, llama3),
    "llama-3.2": Family(
        "llama", "llama", {"rope_scaling": LLAMA3_ROPE | {"factor": 32.0}}, lambda writer: llama3(writer, 32.0)
    ),
    "llama-yarn": Family("llama", "llama", {"rope_scaling": YARN_ROPE}, yarn),
    "mistral": Family("llama", "llama", UNTIED | {"head_dim": 32, "rope_theta": 1e6}),
    "qwen2": Family("qwen2", "qwen2", UNTIED),
    "qwen2-yarn": Family("qwen2", "qwen2", {"rope_scaling": YARN_ROPE}, yarn),
    "qwen3": Family("qwen3", "qwen3", {"head_dim": 32}),
    "qwen3-untied": Family("qwen3", "qwen3", UNTIED | {"head_dim": 32}),
    "smollm3": Family("smollm3", "smollm3", {"num_hidden_layers": 5}),
    "gemma2": Family("gemma2", "gemma2", GEMMA2, caps),
    "gemma2-27b": Family(
        "gemma2", "gemma2", GEMMA2 | {"num_hidden_layers": 46, "query_pre_attn_scalar": 16}, caps
    ),
    "gemma3": Family("gemma3", "gemma3_text", GEMMA3, window),
    "gemma3-untied": Family("gemma3", "gemma3_text", GEMMA3 | UNTIED, window),
    "gemma3-linear": Family("gemma3", "gemma3_text", GEMMA3 | {"rope_scaling": LINEAR_ROPE}, linear_window),
    "gemma3-own-pattern": Family(
        "gemma3", "gemma3_text", GEMMA3 | {"sliding_window_pattern": 3, "rope_local_base_freq": 500.0}, own_pattern
    ),
    "gemma3-no-window": Family("gemma3", "gemma3_text", GEMMA3 | {"sliding_window_pattern": 1}),
    "phi3": Family("phi3", "phi3", UNTIED),
    "phi3-tied-longrope": Family("phi3", "phi3", PHI3_LONG, longrope),
}


def dense(folder: Path) -> nn.Module:
    """The converted model with float32 weights, so that it computes as the original does."""
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    return mlx_lm.utils.dequantize_model(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_back_with_the_same_logits(tmp_path: Path, name: str) -> None:
    original = write_family_gguf(tmp_path / "tiny.gguf", FAMILIES[name])
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    converted = dense(tmp_path / "out")
    expected = dict(tree_flatten(original.parameters()))
    found = dict(tree_flatten(converted.parameters()))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert mx.array_equal(found[key], values), key
    text = mx.array([[(7 * i) % 250 for i in range(4 * WINDOW)]])
    logits = original(text)
    assert mx.array_equal(converted(text), logits)
    assert mx.isfinite(logits).all()
    assert len({int(token) for token in mx.argmax(logits, axis=-1)[0]}) > 1


def header_of(tmp_path: Path, family: Family) -> GgufHeader:
    write_family_gguf(tmp_path / "tiny.gguf", family)
    return read_gguf_header(tmp_path / "tiny.gguf")


CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


@pytest.mark.parametrize(
    ("family", "removed", "expected"),
    [
        (FAMILIES["gemma3"], [".rope.freq_base"], {"rope_theta": 1e6, "rope_local_base_freq": 10000.0}),
        (FAMILIES["gemma2"], [f".{name}" for name in CAPS], CAPS | {"rope_theta": 10000.0}),
        # For other readers than mlx-lm.
        (FAMILIES["gemma2"], [], {"sliding_window": 4096, "hidden_act": "gelu_pytorch_tanh"}),
        (
            Family("llama", "llama", edit=scaled_by_8),
            [],
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
        ),
    ],
    ids=["rotation", "caps", "for other readers", "scaling without a type"],
)
def test_what_a_file_leaves_out_is_as_in_llama_cpp(
    tmp_path: Path, family: Family, removed: list[str], expected: dict[str, object]
) -> None:
    header = header_of(tmp_path, family)
    for key in removed:
        del header.metadata[family.arch + key]
    config = read_family(header).config
    assert {key: config[key] for key in expected} == expected


# --- refused ----------------------------------------------------------------------------------------------


def frequencies(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.full(8, 3, np.float32))


@pytest.mark.parametrize(
    ("name", "edit", "fields", "message"),
    [
        ("llama", None, {"general.architecture": "gemma"}, "GGUF family 'gemma' is not supported (llama, qwen2,"),
        ("llama", None, {"llama.expert_count": 8}, "llama with experts is not supported"),
        ("llama", None, {"llama.rope.dimension_count": 8}, "8 rotated dimensions are not supported"),
        ("llama", None, {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "original_context"),
        ("llama", frequencies, {}, "not those of a known Llama 3 model"),
        ("gemma3", window, {"gemma3.final_logit_softcapping": 30.0}, "gemma3 with capped logits"),
        ("gemma3", yarn, {}, "gemma3 with rotary scaling 'yarn' by 4 is not supported (linear is)"),
        ("gemma2", linear, {}, "gemma2 with rotary scaling 'linear' by 8 is not supported (none is)"),
        ("phi3", llama3, {}, "phi3 with rope_freqs.weight is not supported"),
        ("llama", longrope, {}, "llama with rope_factors_long.weight and rope_factors_short.weight is not"),
        ("llama", yarn, {"llama.rope.scaling.yarn_log_multiplier": 0.1}, "multiplier is missing or unusable"),
        ("phi3", longrope, {}, "'rope_factors_long.weight' is (6,), expected (8,) as for its heads"),
        ("phi3-tied-longrope", longrope, {"phi3.rope.scaling.attn_factor": 2.0}, "attn_factor is missing or unus"),
        ("qwen3", None, {"split.count": 3}, "one of 3 parts of a GGUF file; join them first"),
        (
            "qwen3",
            None,
            {"split.count": 3, "general.architecture": None},
            "one of 3 parts of a GGUF file; join them",
        ),
    ],
)
def test_what_mlx_lm_cannot_compute_is_refused(
    tmp_path: Path, name: str, edit: Edit | None, fields: dict[str, Any], message: str
) -> None:
    header = header_of(tmp_path, replace(FAMILIES[name], edit=edit))
    header.metadata.update(fields)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        read_family(header)
    assert "\n" not in str(caught.value)
