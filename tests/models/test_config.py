"""Configs as their publishers read them, whatever mlx-lm makes of what they leave out."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import _get_classes
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmcad_mlx import load
from llmcad_mlx.errors import ModelError
from llmcad_mlx.models.config import completed
from llmcad_mlx.models.folder import load_model_folder, read_config
from llmcad_mlx.store.convert import convert_folder
from tests.support.architecture_configs import FAMILIES
from tests.support.tiny_folder import family_folder

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
UNSCALED = ("gemma2", "phi3", "cohere")  # what mlx-lm cannot scale, or in another way


def rewrite(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in drop} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(folder: Path) -> mx.array:
    out: mx.array = load_model_folder(folder).model(mx.array([[*range(5, 60)]]))
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "olmo2", "smollm3", "qwen3", "cohere"])
@pytest.mark.parametrize("scaling", [{}, LLAMA3, LINEAR, YARN], ids=lambda it: it.get("rope_type", "default"))
def test_rotary_settings_are_found_where_transformers_5_writes_them(
    tmp_path: Path, family: str, scaling: dict[str, Any]
) -> None:
    """The same logits in memory and converted, or a refusal for what the family cannot do."""
    old = {
        "rope_theta": 100000.0,
        **({"rope_scaling": {**scaling, "type": scaling["rope_type"]}} if scaling else {}),
    }
    drop = ("rope_theta", "rope_scaling", "sliding_window", "partial_rotary_factor")
    before = rewrite(family_folder(tmp_path / "old", family), drop, **old)
    after = family_folder(tmp_path / "new", family)
    rewrite(after, drop, rope_parameters={"rope_theta": 100000.0, "rope_type": "default", **scaling})
    if scaling and family in UNSCALED:
        for folder in (before, after):
            with pytest.raises(ModelError, match="rope"):
                load_model_folder(folder)
        return
    expected = logits(before)
    assert mx.array_equal(logits(after), expected)
    other = rewrite(family_folder(tmp_path / "other", family), drop, rope_theta=10000.0)
    assert not mx.array_equal(logits(other), expected)
    convert_folder(after, tmp_path / "converted", bits=8, group_size=32)
    settings = read_config(tmp_path / "converted")
    assert settings.get("rope_theta") == 100000.0 or "rope_parameters" in _fields(family)


def _fields(family: str) -> set[str]:
    return set(inspect.signature(_get_classes({"model_type": family})[1]).parameters)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_the_file_is_used_where_the_config_says_nothing(tmp_path: Path, family: str, tied: bool) -> None:
    folder = family_folder(tmp_path / "model", family, tie_word_embeddings=tied)
    expected = logits(folder)
    assert mx.array_equal(logits(rewrite(folder, ("tie_word_embeddings",))), expected)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', which mlx-lm does not heed"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0, "long_factor": 2.0}}, "rope_type is 'yarn'"),
        ("gemma2", {"rope_parameters": {"rope_theta": 1e4, **LLAMA3}}, "rope_type is 'llama3'"),
    ],
)
def test_what_mlx_lm_would_ignore_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    folder = rewrite(family_folder(tmp_path / "model", family), **changes)
    with pytest.raises(ModelError, match=said):
        load_model_folder(folder)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("family", "kind", "context"),
    [("starcoder2", "starcoder2", 8), ("llama", "mistral", 8), ("llama", "llama", 512), ("qwen2", "qwen2", 512)],
)
def test_a_window_that_mlx_lm_ignores_limits_the_context(
    tmp_path: Path, family: str, kind: str, context: int
) -> None:
    folder = family_folder(tmp_path / "model", family)
    rewrite(
        folder,
        ("layer_types",),
        model_type=kind,
        sliding_window=8,
        **({"use_sliding_window": False} if kind == "qwen2" else {}),
    )
    with load(folder, None) as engine:
        assert engine.pair.context_length == context


# --- every family beside transformers' class for it ----------------------------------------------------------

# Fields in which mlx-lm and transformers differ although both read the same config.json, and why that is right.
DIFFERENT = {
    "nemotron_h.layers_block_type": "each names the kinds of layers in its own way; published configs have both"
}


def beside_transformers(family: str) -> dict[str, tuple[Any, Any]]:
    """Fields of mlx-lm's arguments that are not what transformers' class says for a config of required fields."""
    reference = CONFIG_MAPPING[family]().to_dict()
    parameters = inspect.signature(_get_classes({"model_type": family})[1]).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    config = {name: reference[name] for name in required if name in reference} | {"model_type": family}
    done = completed(Path("model"), config, ["lm_head.weight"])
    used = {name: done.get(name, parameters[name].default) for name in parameters}
    return {
        name: (used[name], reference[name])
        for name in parameters
        if reference.get(name) is not None
        and used[name] != reference[name]
        # What a nested config has beyond transformers' are older names of the same.
        and not (isinstance(used[name], dict) and reference[name].items() <= used[name].items())
    }


def families_of_both() -> list[str]:
    return [family for family in FAMILIES if family in CONFIG_MAPPING and family != "olmo"]  # a package is missing


@pytest.mark.parametrize("family", families_of_both())
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    found = beside_transformers(family)
    unexplained = {name: values for name, values in found.items() if f"{family}.{name}" not in DIFFERENT}
    assert not unexplained
