"""Which GGUF families become which mlx-lm models: config.json and tensor names.

Names on the GGUF side: `gguf.constants.TENSOR_NAMES`; on the other side mlx-lm's `models/llama.py` and
`models/qwen2.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.gguf_header import GgufHeader
from llmcad_mlx.sources.gguf_metadata import Metadata
from llmcad_mlx.sources.gguf_rope import ROPE_FACTORS, read_rope_scaling

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"

_OUTER_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class FamilyModel:
    """What a file becomes. `config` is config.json without quantisation and token ids."""

    config: dict[str, object]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    paired_rows: bool
    """q and k rows are stored for rotating neighbours and must be put back for rotating halves."""

    def mlx_name(self, name: str) -> str | None:
        """mlx-lm's name of a GGUF tensor; None for one that the configuration replaces."""
        if name in _OUTER_NAMES:
            return _OUTER_NAMES[name]
        match = _LAYER_TENSOR.fullmatch(name)
        if match and int(match[1]) < self.num_layers and match[2] in _LAYER_NAMES:
            return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
        if name == ROPE_FACTORS:
            return None
        raise KeyError(name)

    def heads_to_unpair(self, name: str) -> int:
        """How many heads' rows of this GGUF tensor must be put back in order; 0 for none."""
        match = _LAYER_TENSOR.fullmatch(name)
        if not self.paired_rows or not match:
            return 0
        return {"attn_q": self.num_heads, "attn_k": self.num_kv_heads}.get(match[2], 0)


def read_family(header: GgufHeader, metadata: Metadata) -> FamilyModel:
    """The mlx-lm model for a file.

    Raises ModelError for a family other than llama and qwen2, and for their variants (experts, partial or
    scaled rotation) that the model code of these families does not cover.
    """
    build = _FAMILIES.get(metadata.prefix)
    if build is None:
        raise ModelError(
            f"{header.path}: GGUF family {metadata.prefix!r} is not supported ({' and '.join(_FAMILIES)} are)"
        )
    if metadata.has(".expert_count") and metadata.integer(".expert_count"):
        raise ModelError(f"{header.path}: {metadata.prefix} with experts is not supported")
    return build(header, metadata)


def _common(header: GgufHeader, metadata: Metadata) -> dict[str, object]:
    num_heads = metadata.positive(".attention.head_count")
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None:
        raise ModelError(f"{header.path}: tensor {EMBEDDING} is missing; the file is not a whole model")
    config: dict[str, object] = {
        "hidden_size": metadata.positive(".embedding_length"),
        "num_hidden_layers": metadata.positive(".block_count"),
        "intermediate_size": metadata.positive(".feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.positive(".attention.head_count_kv", num_heads),
        "rms_norm_eps": metadata.number(".attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": metadata.positive(".context_length"),
        "rope_theta": metadata.number(".rope.freq_base", 10000.0),
        "rope_traditional": False,
        "hidden_act": "silu",
        "tie_word_embeddings": HEAD not in header.tensors,
    }
    scaling = read_rope_scaling(header, metadata, _head_dim(header, metadata))
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _head_dim(header: GgufHeader, metadata: Metadata) -> int:
    default = metadata.positive(".embedding_length") // max(1, metadata.positive(".attention.head_count"))
    head_dim = metadata.positive(".attention.key_length", default)
    rotated = metadata.positive(".rope.dimension_count", head_dim)
    if rotated != head_dim or metadata.positive(".attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{header.path}: heads of {head_dim} with {rotated} rotated dimensions are not supported")
    return head_dim


def _llama(header: GgufHeader, metadata: Metadata) -> FamilyModel:
    config = _common(header, metadata) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }
    config["head_dim"] = _head_dim(header, metadata)
    return _model(metadata, config, paired_rows=True)


def _qwen2(header: GgufHeader, metadata: Metadata) -> FamilyModel:
    config = _common(header, metadata) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
    }
    if _head_dim(header, metadata) * metadata.positive(".attention.head_count") != config["hidden_size"]:
        raise ModelError(f"{header.path}: qwen2 heads do not add up to the hidden size")
    return _model(metadata, config, paired_rows=False)


def _model(metadata: Metadata, config: dict[str, object], paired_rows: bool) -> FamilyModel:
    num_heads = metadata.positive(".attention.head_count")
    return FamilyModel(
        config=config,
        num_layers=metadata.positive(".block_count"),
        num_heads=num_heads,
        num_kv_heads=metadata.positive(".attention.head_count_kv", num_heads),
        paired_rows=paired_rows,
    )


_FAMILIES: dict[str, Callable[[GgufHeader, Metadata], FamilyModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
}
