"""Every GGUF family comes back as the mlx-lm model it was written from: the same logits, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import RopeScalingType
from mlx.utils import tree_flatten

from llmcad_mlx.errors import ModelError
from llmcad_mlx.gguf.convert import convert_gguf
from llmcad_mlx.gguf.model import llama3_divisors, read_family
from llmcad_mlx.gguf.reader import read_gguf_header
from tests.support.family_gguf import BASE, Family, write_family_gguf

LONG, SHORT = [1.0 + i / 4 for i in range(6)], [1.0] * 6
WINDOW = 5  # shorter than the text of the tests


def window(writer: GGUFWriter) -> None:
    writer.add_sliding_window(WINDOW)


def own_pattern(writer: GGUFWriter) -> None:
    window(writer)
    writer.add_sliding_window_pattern(3)
    writer.add_rope_freq_base_swa(500.0)


def linear(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def yarn(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)


def llama3(writer: GGUFWriter) -> None:
    divisors = llama3_divisors(16, BASE["rope_theta"], 8.0).astype(np.float32)
    writer.add_tensor("rope_freqs.weight", divisors)


def caps(writer: GGUFWriter) -> None:
    writer.add_attn_logit_softcapping(20.0)
    writer.add_final_logit_softcapping(10.0)
    writer.add_sliding_window(4096)


def longrope(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_orig_ctx_len(128)
    writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(2) / np.log(128))))
    writer.add_tensor("rope_factors_long.weight", np.array(LONG, np.float32))
    writer.add_tensor("rope_factors_short.weight", np.array(SHORT, np.float32))


def both(*edits: Callable[[GGUFWriter], None]) -> Callable[[GGUFWriter], None]:
    def edit(writer: GGUFWriter) -> None:
        for each in edits:
            each(writer)

    return edit


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
    "llama-untied": Family("llama", "llama", UNTIED),
    "llama-biases": Family("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Family("llama", "llama", {"rope_scaling": {"type": "linear", "factor": 8.0}}, linear),
    "llama-3.1": Family("llama", "llama", {"rope_scaling": LLAMA3_ROPE}, llama3),
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
    "gemma3-linear": Family(
        "gemma3",
        "gemma3_text",
        GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        both(window, linear),
    ),
    "gemma3-own-pattern": Family(
        "gemma3",
        "gemma3_text",
        GEMMA3 | {"sliding_window_pattern": 3, "rope_local_base_freq": 500.0},
        own_pattern,
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


@pytest.mark.parametrize("name", ["llama-3.1", "llama-yarn", "gemma3-linear", "gemma3", "phi3-tied-longrope"])
def test_positions_matter_to_these_logits(tmp_path: Path, name: str) -> None:
    """Without its special rotation or window the same model says something else: the test above can fail."""
    family = FAMILIES[name]
    special = {"rope_scaling", "sliding_window_pattern", "partial_rotary_factor"}
    if name == "gemma3-linear":
        special = {"rope_scaling"}
    plain = replace(
        family, config={key: value for key, value in family.config.items() if key not in special}, edit=None
    )
    if name == "gemma3":
        plain = replace(plain, config=plain.config | {"sliding_window_pattern": 1})
    text = mx.array([[(7 * i) % 250 for i in range(4 * WINDOW)]])
    with_it = write_family_gguf(tmp_path / "with.gguf", family)
    without = write_family_gguf(tmp_path / "without.gguf", plain)
    assert not mx.array_equal(with_it(text), without(text))


# --- configuration that mlx-lm's own models do not compute with --------------------------------------------


def config_of(tmp_path: Path, family: Family) -> dict[str, object]:
    write_family_gguf(tmp_path / "tiny.gguf", family)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def test_gemma2_window_and_activation_are_kept_for_other_readers(tmp_path: Path) -> None:
    config = config_of(tmp_path, FAMILIES["gemma2"])
    assert config["sliding_window"] == 4096
    assert config["hidden_act"] == "gelu_pytorch_tanh"


def test_scaling_without_a_type_is_linear_as_in_llama_cpp(tmp_path: Path) -> None:
    family = Family("llama", "llama", edit=lambda writer: writer.add_rope_scaling_factor(8.0))
    assert config_of(tmp_path, family)["rope_scaling"] == {"type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("name", "keys", "defaults"),
    [
        ("gemma3", [".rope.freq_base"], {"rope_theta": 1e6, "rope_local_base_freq": 10000.0}),
        (
            "gemma2",
            [".attn_logit_softcapping", ".final_logit_softcapping"],
            {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10000.0},
        ),
    ],
)
def test_what_a_file_leaves_out_is_as_in_llama_cpp(
    tmp_path: Path, name: str, keys: list[str], defaults: dict[str, float]
) -> None:
    write_family_gguf(tmp_path / "tiny.gguf", FAMILIES[name])
    header = read_gguf_header(tmp_path / "tiny.gguf")
    for key in keys:
        del header.metadata[name + key]
    config = read_family(header).config
    assert {key: config[key] for key in defaults} == defaults


# --- refused ----------------------------------------------------------------------------------------------


def field(key: str, value: float) -> Callable[[GGUFWriter], None]:
    def edit(writer: GGUFWriter) -> None:
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("gemma3", both(window, field("gemma3.final_logit_softcapping", 30.0)), "gemma3 with capped logits"),
        ("gemma3", both(window, yarn), "gemma3 with rotary scaling 'yarn' by 4 is not supported (linear is)"),
        ("gemma2", linear, "gemma2 with rotary scaling 'linear' by 8 is not supported (none is)"),
        ("phi3", llama3, "phi3 with rope_freqs.weight is not supported"),
        ("llama", longrope, "llama with rope_factors_long.weight and rope_factors_short.weight is not"),
        (
            "llama",
            both(yarn, field("llama.rope.scaling.yarn_log_multiplier", 0.1)),
            "yarn_log_multiplier is missing or unusable (0.1)",
        ),
        ("phi3", longrope, "'rope_factors_long.weight' is (6,), expected (8,) as for its heads"),
        (
            "phi3-tied-longrope",
            both(longrope, field("phi3.rope.scaling.attn_factor", 2.0)),
            "attn_factor is missing or unusable (2.0)",
        ),
        ("qwen3", field("split.count", 3), "one of 3 parts of a GGUF file; join them first"),
    ],
)
def test_what_mlx_lm_cannot_compute_is_refused(
    tmp_path: Path,
    name: str,
    edit: Callable[[GGUFWriter], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def add_again(writer: GGUFWriter, key: str, value: object, *rest: object, **more: object) -> None:
        writer.kv_data[0].pop(key, None)  # a case may replace a field that its edit has just written
        plain(writer, key, value, *rest, **more)

    plain = GGUFWriter.add_key_value
    monkeypatch.setattr(GGUFWriter, "add_key_value", add_again)
    write_family_gguf(tmp_path / "tiny.gguf", replace(FAMILIES[name], edit=edit))
    with pytest.raises(ModelError) as caught:
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
