"""Tiny random configurations of every model file of the installed mlx-lm.

`COMMON` holds the fields most families share under the same name; a model's own ``ModelArgs.from_dict`` picks
those it has. `FAMILIES` gives what differs. Windows are 8 tokens, so that a test of some 30 goes well past
them, and families that mix sliding and full attention have layers of both.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

WINDOW = 8
VOCAB = 100

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "layernorm_epsilon": 1e-5,
    "norm_eps": 1e-5, "norm_epsilon": 1e-5,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "use_bias": False,
    # mixtures of experts
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "num_shared_experts": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_layer_freq": 1,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # sliding windows
    "sliding_window": WINDOW, "sliding_window_pattern": 2,
    # other names of the same
    "num_layers": 2, "d_model": 32, "n_layers": 2, "n_heads": 4,
    "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "n_ctx": 512, "n_inner": 48,
    # sparse attention
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 6,
    # recurrent mixers
    "conv_kernel": 3, "use_conv_bias": True, "n_groups": 1, "time_step_rank": 4, "full_attention_interval": 2,
    "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "mamba_num_heads": 4, "mamba_head_dim": 16,
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 3,
}  # fmt: skip

_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
_ROPE_BY_TYPE = {kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in _SLIDING_THEN_FULL}
_SLIDING = {"sliding_window": WINDOW, "layer_types": _SLIDING_THEN_FULL}
_MUP = {
    "logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
}  # fmt: skip
_LONGCAT = {
    "attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 48, "moe_topk": 2,
    "expert_ffn_hidden_size": 24, "zero_expert_num": 1,
    "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
}  # fmt: skip
_KDA = {
    "linear_attn_config": {
        "kda_layers": [1], "full_attn_layers": [2], "num_heads": 2, "head_dim": 32, "short_conv_kernel_size": 3,
    },
    "model_max_length": 512, "num_experts_per_token": 2,
}  # fmt: skip
_GEMMA4 = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 16,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
    "layer_types": [*_SLIDING_THEN_FULL, *_SLIDING_THEN_FULL],
}  # fmt: skip
_YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_LONGROPE = {
    "type": "longrope", "factor": 4.0, "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip
_LLAMA4_SCALING = {
    "rope_theta": 10000.0, "rope_type": "default", "type": "default", "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 4,
}  # fmt: skip
_LFM2 = {
    "layer_types": ["conv", "full_attention"], "conv_bias": True, "conv_L_cache": 3, "block_dim": 32,
    "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.5, "block_auto_adjust_ff_dim": True,
    "use_expert_bias": True, "num_dense_layers": 1,
}  # fmt: skip

_AS_COMMON = (
    "bailing_moe", "bitnet", "cohere", "cohere2", "deepseek", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5",
    "exaone", "gemma", "gemma2", "glm", "glm4", "glm4_moe_lite", "gpt2", "gpt_bigcode", "helium",
    "hunyuan_v1_dense", "internlm2", "internlm3", "Klear", "mimo", "mixtral", "nanochat", "olmo2", "olmoe",
    "phi", "phi3", "phimoe", "plamo3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss",
    "solar_open", "starcoder2", "talkie", "telechat3", "youtu_llm",
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    **{family: {} for family in _AS_COMMON},
    "afm7": {"hidden_dim": 32, "num_layers": 3, "num_kv_reuse_layers": 1, "num_heads": 4, "num_kv_heads": 2},
    "afmoe": {"layer_types": _SLIDING_THEN_FULL, "num_dense_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_v3": {"layer_group_size": 2, "moe_shared_expert_intermediate_size": 24, "head_dim": 32},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "qwen2_moe": {"norm_topk_prob": False},
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": _YARN, "norm_topk_prob": False},
    "deepseek_v41": {
        "head_dim": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_ratios": [4, 1],
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
        "index_topk": 4,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _SLIDING_THEN_FULL, "is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gear": {"layer_types": ["conv_mixer", "sliding_attention", "full_attention"], "num_hidden_layers": 3},
    "gemma3": {"text_config": {"model_type": "gemma3_text"}},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma3n": {
        "text_config": {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "layer_types": [*_SLIDING_THEN_FULL, *_SLIDING_THEN_FULL],
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 4,
        }
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "glm4_moe": {"rope_scaling": None, "use_qk_norm": True},
    "glm_moe_dsa": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"layer_types": _SLIDING_THEN_FULL},
    "gptj": {"rotary_dim": 4},
    "granite": _MUP,
    "granitemoe": _MUP,
    "granitemoehybrid": {**_MUP, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 2.0, "factor": 1.0, "type": "dynamic"},
    },
    "iquestloopcoder": {"loop_window_size": WINDOW},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "kimi_k25": {"text_config": {}},
    "kimi_k3": {"text_config": _KDA},
    "kimi_linear": _KDA,
    "kimi_vl": {"text_config": {}},
    "laguna": {"layer_types": _SLIDING_THEN_FULL},
    "lfm2": _LFM2,
    "lfm2-vl": {"text_config": _LFM2},
    "lfm2_moe": _LFM2,
    "lille-130m": {"block_size": 512, "n_kv_heads": 2, "n_embd": 256},
    "llama": _SLIDING,
    "llama4": {
        "text_config": {
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48,
            "rope_scaling": None,
            "use_qk_norm": True,
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
        }
    },
    "llama4_text": {"intermediate_size_mlp": 48, "no_rope_layers": [1, 0], "use_qk_norm": True},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {**_LONGCAT, "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 2, "emb_split_num": 2},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "state_size": 16, "time_step_limit": [0.0, 10.0]},
    "mellum": {"layer_types": _SLIDING_THEN_FULL, "rope_parameters": _ROPE_BY_TYPE},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 12},
    "minicpm3": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 12, "rope_scaling": _LONGROPE},
    "minimax": {"shared_intermediate_size": 24, "rotary_dim": 4},
    "minimax_m3_vl": {
        "text_config": {
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 24,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention", "sparse_attention"],
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 2,
        }
    },
    "ministral3": {**_SLIDING, "rope_parameters": _LLAMA4_SCALING},
    "mistral3": {"text_config": {"model_type": "ministral3", **_SLIDING, "rope_parameters": _LLAMA4_SCALING}},
    "mistral4": {"rope_parameters": _LLAMA4_SCALING},
    "muse_glimmer": {"layer_types": _SLIDING_THEN_FULL},
    "muse_spark": {
        "text_config": {
            "post_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0},
            "layer_rope_theta": [10000.0, 0.0],
            "layer_types": _SLIDING_THEN_FULL,
            "final_logit_softcapping": 20.0,
            "output_multiplier": 0.5,
            "moe_hidden_size": 32,
            "num_shared_experts": 0,
        }
    },
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2},
                "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 1.5},
            }
        ]
        * 2
    },
    "nemotron_h": {"ssm_state_size": 16, "hybrid_override_pattern": ["M", "*", "-"]},
    "olmo": {"mlp_hidden_size": 48, "embedding_size": VOCAB},
    "olmo3": {"layer_types": _SLIDING_THEN_FULL},
    "olmo_hybrid": {"linear_allow_neg_eigval": True},
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 32,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.5, 2.0],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 48,
        "gegelu_limit": 20.0,
        "vocab_size": 100352,
        "blocksparse_block_size": 32,
    },
    "phixtral": {"num_vocab": VOCAB, "model_dim": 32, "num_heads": 4, "rotary_dim": 4},
    "pixtral": {"text_config": {"model_type": "llama", **_SLIDING}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 16, "attention_window_size": WINDOW, "full_attention_idx": []},
    "prism_hadamard_qwen35": {
        "text_config": {"num_experts": 0, "intermediate_size": 128},
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": f"model.layers.{i}.mlp.down_proj", "embedding": False, "dtype": "float16", "block": 0}
            for i in range(2)
        ],
    },
    "qwen": {"kv_channels": 8},
    "qwen2_vl": {"text_config": {"model_type": "qwen2"}},
    "qwen3_5": {"text_config": {"num_experts": 0}},
    "qwen3_5_moe": {"text_config": {}},
    "qwen3_vl": {"text_config": {"model_type": "qwen3"}},
    "qwen3_vl_moe": {"text_config": {"model_type": "qwen3_moe"}},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "rwkv7": {
        "head_dim": 32,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "spark2_5": {"layer_types": _SLIDING_THEN_FULL, "rope_parameters": _ROPE_BY_TYPE},
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {
        "layer_types": _SLIDING_THEN_FULL,
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 24,
        "moe_layers_enum": "1",
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    },
}

MLX_LM_VERSION = "0.32.2"
"""The release whose model files are listed here."""

NOT_MODELS = (
    "activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline", "rope_utils", "ssm",
    "switch_layers",
)  # fmt: skip
"""Files of ``mlx_lm/models`` that hold parts of models."""

METAL_ONLY = {
    "bitnet": "its ternary layers are a Metal kernel",
    "muse_spark": "its fused norm and rope are a Metal kernel",
}
"""Families that mlx-lm itself cannot run without Metal; there the probe decides at load."""

CHAIN = ("afm7", "gpt2", "gpt_bigcode", "llama4", "minimax_m3_vl", "nanochat", "talkie")
PLAIN = (
    "baichuan_m1", "bailing_hybrid", "bailing_moe_linear", "bailing_moe_v3", "deepseek_v41", "falcon_h1", "gear",
    "granitemoehybrid", "jamba", "kimi_k3", "kimi_linear", "lfm2", "lfm2-vl", "lfm2_moe", "longcat_flash_ngram",
    "mamba", "mamba2", "nemotron_h", "olmo", "olmo_hybrid", "phi3small", "plamo2", "prism_hadamard_qwen35",
    "qwen3_5", "qwen3_5_moe", "qwen3_next", "recurrent_gemma", "rwkv7",
)  # fmt: skip
EXPECTED = dict.fromkeys(CHAIN, "chain") | dict.fromkeys(PLAIN, "plain")
"""What the families that take no trees run with; all others take trees."""


def config_of(family: str) -> dict[str, Any]:
    """The tiny config.json of a family."""
    config = {**COMMON, "model_type": family, **FAMILIES[family]}
    if "text_config" in config:
        config["text_config"] = {**COMMON, "model_type": family, **config["text_config"]}
    return config


def build(family: str, **changes: Any) -> Any:
    """A model of the family with random fp32 weights, the same on every call; `changes` to its config."""
    if family == "olmo":  # its file asks for a package that it does not use
        sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({**config_of(family), **changes}))
    model.eval()
    # Some files start matrices at zero (heads, gates); zeros would hide what flows through them.
    model.update(tree_map(_not_zero, model.parameters()))
    mx.eval(model.parameters())
    return model


def _not_zero(parameter: mx.array) -> mx.array:
    if parameter.dtype != mx.float32 or parameter.ndim < 2 or mx.any(parameter != 0).item():
        return parameter
    return 0.1 * mx.random.normal(parameter.shape)
