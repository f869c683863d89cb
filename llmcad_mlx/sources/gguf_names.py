"""GGUF tensor names and what mlx-lm's models call the same tensors.

Names on the GGUF side: `gguf.constants.TENSOR_NAMES`; on the other side mlx-lm's `models/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"

OUTER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        EMBEDDING: "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        HEAD: "lm_head.weight",
    }
)
CONFIGURED = frozenset((ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS))
"""Tensors that become numbers in config.json."""

LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

_SHARED = {
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_down": "mlp.down_proj",
}
_SPLIT = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

LLAMA_LAYER: Mapping[str, str] = MappingProxyType(_SHARED | _SPLIT | {"ffn_norm": "post_attention_layernorm"})
QWEN3_LAYER: Mapping[str, str] = MappingProxyType(dict(LLAMA_LAYER) | _HEAD_NORMS)
GEMMA2_LAYER: Mapping[str, str] = MappingProxyType(
    _SHARED
    | _SPLIT
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
GEMMA3_LAYER: Mapping[str, str] = MappingProxyType(dict(GEMMA2_LAYER) | _HEAD_NORMS)
# q, k, v and gate, up are one matrix each, in the same order on both sides.
PHI3_LAYER: Mapping[str, str] = MappingProxyType(
    _SHARED
    | {
        "attn_qkv": "self_attn.qkv_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
    }
)
