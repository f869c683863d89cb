"""Configs as their publishers read them, whatever mlx-lm makes of what they leave out."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE
from mlx_lm.utils import _get_classes, quantize_model
from mlx_lm.utils import load_model as mlx_load_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmcad_mlx import load
from llmcad_mlx.errors import ModelError
from llmcad_mlx.models.config import _ACTIVATIONS, _MUST_HEED, completed, context_length
from llmcad_mlx.models.folder import load_model_folder, read_config
from llmcad_mlx.store.convert import convert_folder
from tests.support.architecture_configs import FAMILIES, METAL_ONLY, WINDOW, build, config_of
from tests.support.tiny_folder import family_folder, write_folder

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


def test_a_vocabulary_that_mlx_lm_would_write_beyond_is_refused(tmp_path: Path) -> None:
    """Its phi3small bars tokens by fixed ids, and MLX writes wherever an index points."""
    model, config = build("phi3small"), {**config_of("phi3small"), "vocab_size": 64}
    with pytest.raises(ModelError, match="vocab_size is 64, but mlx-lm's phi3small writes to 100352 logits"):
        load_model_folder(write_folder(tmp_path / "model", model, config))


def by_kind_of_layer(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


DEFAULT = {"rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        (
            "gemma3_text",
            {"rope_theta": 1e5, "rope_local_base_freq": 500.0, "rope_scaling": LINEAR},
            by_kind_of_layer({"rope_theta": 1e5, **LINEAR}, {"rope_theta": 500.0, **DEFAULT}),
        ),
        (
            "olmo3",
            {"rope_theta": 5e5, "rope_scaling": YARN},
            by_kind_of_layer({"rope_theta": 5e5, **YARN}, {"rope_theta": 5e5, **DEFAULT}),
        ),
        ("llama", {"rope_theta": 1e5, "rope_scaling": None}, {"rope_theta": 1e5, "rope_parameters": None}),
        (
            "llama",
            {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_theta": 1e5, "rope_scaling": LINEAR},
        ),
    ],
)
def test_rotary_settings_by_kind_of_layer_and_in_other_words(
    tmp_path: Path, family: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    drop = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rope_parameters")
    before = rewrite(family_folder(tmp_path / "old", family), drop, **old)
    after = rewrite(family_folder(tmp_path / "new", family), drop, **new)
    assert mx.array_equal(logits(after), logits(before))


def test_rotary_settings_in_a_place_that_transformers_does_not_read_are_refused() -> None:
    """Olmo 3 has them by kind of layer: of others transformers computes nothing, though somebody meant them."""
    config = {**config_of("olmo3"), "rope_parameters": {"rope_theta": 5e5, **YARN}}
    assert "which mlx-lm does not heed for 'olmo3'" in refusal(config)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt_oss"])
@pytest.mark.parametrize("more", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.5}])
def test_yarn_is_as_transformers_computes_it(tmp_path: Path, family: str, more: dict[str, float]) -> None:
    """mlx-lm rounds the range in which it blends even where the config says not to, and takes no factor."""
    settings = {**YARN, "original_max_position_embeddings": 200, "truncate": False, **more}
    folder = rewrite(family_folder(tmp_path / "model", family), rope_theta=1000.0, rope_scaling=settings)
    model = load_model_folder(folder).model
    (rope,) = {
        tuple(module._freqs.tolist()): module for module in model.modules() if isinstance(module, YarnRoPE)
    }.values()
    size = rope.dims
    inverse = 1000.0 ** -(np.arange(0, size, 2) / size)
    low, high = (
        size * np.log(200 / (turns * 2 * np.pi)) / (2 * np.log(1000.0))
        for turns in (more.get("beta_fast", 32), more.get("beta_slow", 1))
    )
    low, high = max(low, 0), min(high, size - 1)
    kept = 1 - np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
    assert np.allclose(1 / np.array(rope._freqs), inverse / 4.0 * (1 - kept) + inverse * kept, rtol=1e-5)
    assert rope.mscale == pytest.approx(more.get("attention_factor", 0.1 * np.log(4.0) + 1))


@pytest.mark.parametrize("factors", [{"mscale": 0.5}, {"mscale_all_dim": 0.5}])
def test_a_scale_of_yarn_counts_only_beside_the_other(tmp_path: Path, factors: dict[str, float]) -> None:
    folder = rewrite(family_folder(tmp_path / "model", "qwen2"), rope_scaling={**YARN, **factors})
    scales = [rope.mscale for rope in load_model_folder(folder).model.modules() if isinstance(rope, YarnRoPE)]
    assert scales
    assert scales == pytest.approx([0.1 * np.log(4.0) + 1] * len(scales))


@pytest.mark.parametrize("settings", [{"truncate": False}, {"mscale": 0.5}, {"attention_factor": 1.5}])
def test_a_yarn_of_its_own_that_cannot_be_corrected_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = family_folder(tmp_path / "model", "deepseek_v2")
    load_model_folder(rewrite(folder, rope_scaling={**YARN, "type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.7}))
    with pytest.raises(ModelError, match="which mlx-lm does not heed for 'deepseek_v2'"):
        load_model_folder(rewrite(folder, rope_scaling={**YARN, "type": "yarn", **settings}))


def test_a_rotary_base_that_layers_with_a_window_do_not_share_is_refused() -> None:
    """Of `rope_theta` transformers' Olmo 3 takes notice in other layers only."""
    assert "rope_theta of layers with a window is 500000.0" in refusal({**config_of("olmo3"), "rope_theta": 1e4})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek", "gemma3n"])
def test_a_scaling_of_which_no_module_of_mlx_lm_takes_notice_is_refused(tmp_path: Path, family: str) -> None:
    """These have the field, and hand it to nobody, or to nobody who knows this kind."""
    config, settings = config_of(family), {**YARN, "type": "yarn"}
    if "text_config" in config:
        config = {**config, "text_config": {**config["text_config"], "rope_scaling": settings}}
    folder = write_folder(tmp_path / "model", build(family), {**config, "rope_scaling": settings})
    with pytest.raises(ModelError, match="rope_type is 'yarn', which mlx-lm does not heed"):
        load_model_folder(folder)


LONGROPE = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 9.0, 27.0]}


@pytest.mark.parametrize(
    ("family", "more", "scale"),
    [
        ("phi3", {}, np.sqrt(1 + np.log(512 / 64) / np.log(64))),
        ("phi3", {"type": "su"}, np.sqrt(1 + np.log(512 / 64) / np.log(64))),
        ("phi3", {"factor": 2.0}, np.sqrt(1 + np.log(2) / np.log(64))),
        ("phi3", {"attention_factor": 1.5}, 1.5),
        ("phimoe", {"short_mscale": 1.25, "long_mscale": 1.5}, 1.25),
        ("minicpm3", {}, np.sqrt(1 + np.log(512 / 64) / np.log(64))),
    ],
)
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_longrope_is_as_transformers_computes_it(
    tmp_path: Path, family: str, more: dict[str, Any], scale: float, form: str
) -> None:
    """mlx-lm takes the factors of long texts for all; up to the length of training they are the short ones."""
    settings = {"type": "longrope", **LONGROPE, "original_max_position_embeddings": 64, **more}
    if form == "rope_parameters":
        settings = {**settings, "rope_type": settings.pop("type").replace("su", "longrope"), "rope_theta": 500.0}
    changes = {"original_max_position_embeddings": 64, "max_position_embeddings": 512, form: settings}
    if form == "rope_scaling":
        changes["rope_theta"] = 500.0
    folder = family_folder(tmp_path / "model", family)
    drop = ("rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window")
    loaded = load_model_folder(rewrite(folder, drop, **changes))
    ropes = [module for module in loaded.model.modules() if isinstance(module, SuScaledRoPE)]
    assert ropes
    for rope in ropes:
        periods = np.array(LONGROPE["short_factor"]) * 500.0 ** (np.arange(0, 8, 2) / 8)
        assert np.allclose(np.array(rope._freqs), periods, rtol=1e-6)
        assert rope._scale == pytest.approx(scale)
    assert context_length(loaded.config) == 64
    one_set = {**settings, "long_factor": settings["short_factor"]}
    if "short_mscale" in more:
        one_set["long_mscale"] = more["short_mscale"]
    assert context_length(load_model_folder(rewrite(folder, **{form: one_set})).config) == 512


def test_numbers_that_json_has_not_are_read(tmp_path: Path) -> None:
    """transformers 5 writes infinity as an object."""
    folder = family_folder(tmp_path / "model", "mamba2")
    rewrite(folder, time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert load_model_folder(folder).config["time_step_limit"] == [0.0, float("inf")]


MIXED = {"model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 8}, "lm_head": {"group_size": 32, "bits": 6}}


@pytest.mark.parametrize(
    "names", [("quantization", "quantization_config"), ("quantization",), ("quantization_config",)]
)
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_quantised_as_mlx_lm_writes_it(tmp_path: Path, tiny_home: Path, names: tuple[str, ...], mode: str) -> None:
    """Mixed bits and modes, under either name: in memory, streamed and converted the same text."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = family_folder(tmp_path / "model", "llama", **shape)
    model, config = mlx_load_model(folder)

    def of_layer(path: str, module: Any) -> Any:
        return {**MIXED[path], "mode": "affine"} if path in MIXED else hasattr(module, "to_quantized")

    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, None, None, mode=mode, quant_predicate=of_layer)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    rewrite(folder, **dict.fromkeys(names, config["quantization"]))
    expected = model(mx.array([[*range(5, 60)]]))
    assert mx.array_equal(logits(folder), expected)
    convert_folder(folder, tmp_path / "out")
    assert mx.array_equal(logits(tmp_path / "out"), expected)
    texts = []
    for place, options in ((folder, {}), (folder, {"memory": "8GB", "pinned": 0}), (tmp_path / "out", {})):
        with load(place, None, **options) as engine:
            texts.append(engine.generate([*range(5, 20)], max_tokens=8).tokens)
    assert texts[0] == texts[1] == texts[2]


# --- the part about text of families that read images too -----------------------------------------------------

TEXT_TYPES = {
    "kimi_k25": "deepseek_v3", "kimi_vl": "deepseek_v3", "gemma3n": "gemma3n_text", "gemma4": "gemma4_text",
    "llama4": "llama4_text", "qwen2_vl": "qwen2_vl_text", "qwen3_vl": "qwen3_vl_text", "lfm2-vl": "lfm2",
    "qwen3_vl_moe": "qwen3_vl_moe_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text",
    "minimax_m3_vl": "minimax_m3_vl_text", "muse_spark": "muse_spark_text",
    "prism_hadamard_qwen35": "qwen3_5_text",
}  # fmt: skip
NESTING = [family for family in FAMILIES if "text_config" in FAMILIES[family]]


def nesting(family: str, *drop: str, **changes: Any) -> dict[str, Any]:
    """The tiny config of a family that nests, with changes to the part about text."""
    config = config_of(family)
    text = {**config["text_config"], "model_type": TEXT_TYPES.get(family, config["text_config"]["model_type"])}
    return {**config, "text_config": {name: text[name] for name in text if name not in drop} | changes}


def text_logits(config: dict[str, Any]) -> mx.array:
    done = completed(Path("model"), config, ["lm_head.weight"])
    out: mx.array = build(config["model_type"], **done)(mx.array([[*range(5, 60)]]))
    return out


def refusal(config: dict[str, Any]) -> str:
    """Why a config is refused; "" where it is not."""
    try:
        completed(Path("model"), config, ["lm_head.weight"])
    except ModelError as error:
        return str(error)
    return ""


def fields_of_text() -> list[tuple[str, str, Any]]:
    """Fields that change what is computed, with another value than the usual one."""
    found = []
    for family in NESTING:
        kind = nesting(family)["text_config"]["model_type"]
        if kind not in CONFIG_MAPPING:
            continue
        usual = CONFIG_MAPPING[kind]().to_dict()
        for name in (*_ACTIVATIONS, *_MUST_HEED):
            if name in usual and name in _ACTIVATIONS:
                found.append((family, name, "relu"))
            elif name in usual:
                found.append((family, name, not usual[name] if isinstance(usual[name], bool) else 0.25))
    return found


@pytest.mark.parametrize(("family", "name", "value"), fields_of_text())
def test_a_field_of_the_part_about_text_is_heeded_or_refused(family: str, name: str, value: Any) -> None:
    if why := refusal(nesting(family, **{name: value})):
        assert f"{name} is {value!r}, which mlx-lm does not heed" in why
    elif family not in METAL_ONLY:
        assert not mx.array_equal(text_logits(nesting(family, **{name: value})), text_logits(nesting(family)))


@pytest.mark.parametrize("family", [family for family in NESTING if family not in (*METAL_ONLY, "kimi_k3")])
def test_rotary_settings_of_the_part_about_text_are_found(family: str) -> None:
    """`kimi_k3` has no positions."""
    drop = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
    changes: dict[str, Any] = {"model_type": "mistral"} if family == "mistral3" else {}
    settings = {"rope_theta": 200.0}
    if (
        "qwen3" in family or "qwen35" in family
    ):  # a quarter of these tiny heads has one frequency, whatever the base
        settings["partial_rotary_factor"] = 1.0
    new = {"rope_parameters": {**settings, **DEFAULT}}
    if "gemma" in family:
        new = by_kind_of_layer(new["rope_parameters"], new["rope_parameters"])
    found = text_logits(nesting(family, *drop, **changes, **new))
    assert not mx.array_equal(found, text_logits(nesting(family, *drop, **changes)))
    if "gemma" not in family:
        assert mx.array_equal(found, text_logits(nesting(family, *drop, **changes, **settings)))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("tied", [True, False])
def test_whether_a_head_is_tied_may_be_said_outside(family: str, tied: bool) -> None:
    config = nesting(family, "tie_word_embeddings") | {"tie_word_embeddings": tied}
    done = completed(Path("model"), config, ["lm_head.weight"])
    assert done["text_config"]["tie_word_embeddings"] is tied
    del config["tie_word_embeddings"]
    for weights, expected in ((["lm_head.weight"], False), (["model.norm.weight"], True)):
        assert completed(Path("model"), config, weights)["text_config"]["tie_word_embeddings"] is expected


def test_a_part_about_text_may_lie_open() -> None:
    """As Qwen2-VL was published: no text_config, all fields outside."""
    nested = nesting("qwen2_vl", "rope_theta", rope_parameters={"rope_theta": 200.0, **DEFAULT})
    text = nested["text_config"]
    flat = {
        **{name: text[name] for name in text if name != "rope_parameters"},
        "model_type": "qwen2_vl",
        "rope_theta": 200.0,
    }
    assert mx.array_equal(text_logits(flat), text_logits(nested))


def test_a_window_of_the_part_about_text_that_mlx_lm_ignores_limits_the_context() -> None:
    config = nesting("mistral3", "layer_types", "rope_parameters", model_type="mistral", sliding_window=WINDOW)
    assert context_length(completed(Path("model"), config, ["lm_head.weight"])) == WINDOW
    config = nesting("gemma3", sliding_window=WINDOW)
    assert context_length(completed(Path("model"), config, ["lm_head.weight"])) == 512


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


# What mlx-lm must have, and a config.json written by transformers 5 with its defaults does not say. transformers
# fixes these in its code, or derives them by rules of its own: guessing them could change the text, so mlx-lm's
# complaint that they are missing stands. Published configs have them.
NOT_WRITTEN = {
    "apertus": {"mlp_bias", "post_norm", "qk_norm"}, "bailing_hybrid": {"group_norm_size"},
    "exaone_moe": {"is_moe_layer"}, "glm_moe_dsa": {"topk_method", "scoring_func", "moe_layer_freq"},
    "kimi_linear": {"rope_theta", "linear_attn_config"}, "lfm2": {"block_dim"},
    "longcat_flash": {"attention_method", "zero_expert_type", "mla_scale_q_lora", "mla_scale_kv_lora"},
    "mamba2": {"intermediate_size"}, "minimax": {"shared_intermediate_size", "rotary_dim"},
    "pixtral": {"text_config"},
    "solar_open": {"intermediate_size", "first_k_dense_replace", "partial_rotary_factor"},
}  # fmt: skip


@pytest.mark.parametrize("family", families_of_both())
def test_what_transformers_writes_is_enough(family: str) -> None:
    """Names that differ between the two, and settings that one leaves out."""
    if family == "mimo_v2_flash":
        pytest.skip("transformers' class has other fields than the published configs, which mlx-lm reads")
    config = json.loads(CONFIG_MAPPING[family]().to_json_string())
    done = completed(Path("model"), config, ["lm_head.weight"])
    parameters = inspect.signature(_get_classes(config)[1]).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    assert required - done.keys() == NOT_WRITTEN.get(family, set())


@pytest.mark.parametrize(
    ("family", "moved", "old"),
    [
        ("gpt_neox", {"partial_rotary_factor": 0.25}, {"rotary_emb_base": 500.0, "rotary_pct": 0.25}),
        (
            "glm4_moe",
            {"partial_rotary_factor": 0.25},
            {"rope_theta": 500.0, "rope_scaling": None, "partial_rotary_factor": 0.25},
        ),
    ],
)
def test_rotary_settings_under_names_of_their_own(
    tmp_path: Path, family: str, moved: dict[str, Any], old: dict[str, Any]
) -> None:
    drop = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
    before = rewrite(family_folder(tmp_path / "old", family), drop, **old)
    after = rewrite(
        family_folder(tmp_path / "new", family), drop, rope_parameters={**DEFAULT, "rope_theta": 500.0, **moved}
    )
    assert mx.array_equal(logits(after), logits(before))
