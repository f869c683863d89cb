"""A GGUF model's sizes, each held against a tensor of the file.

mlx-lm's model is built from these numbers before a weight is read, so one that the file does not bear out
would cost memory in proportion to a lie.

GGUF tensor names and what mlx-lm's models call the same tensors.

Names on the GGUF side: `gguf.constants.TENSOR_NAMES`; on the other side mlx-lm's `models/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from llmcad_mlx.errors import ModelError
from llmcad_mlx.gguf.reader import GgufHeader, GgufTensor, Metadata

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


MAX_LAYERS = 1 << 10
MAX_WIDTH = 1 << 20  # of a row: what is read at once


@dataclass(frozen=True, slots=True)
class Dimensions:
    """`rotated` of each head's `head_dim` numbers turn with the position."""

    hidden: int
    intermediate: int
    vocab: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotated: int


def read_dimensions(header: GgufHeader, metadata: Metadata) -> Dimensions:
    """Raises ModelError for a size that is missing, absurd, or not that of the file's tensors."""
    embedding = _matrix(header, EMBEDDING)
    hidden = metadata.positive(".embedding_length")
    num_layers = metadata.positive(".block_count")
    num_heads = metadata.positive(".attention.head_count")
    num_kv_heads = metadata.positive(".attention.head_count_kv", num_heads)
    head_dim = metadata.positive(".attention.key_length", max(1, hidden // num_heads))
    intermediate = metadata.positive(".feed_forward_length")
    rotated = metadata.positive(".rope.dimension_count", head_dim)
    if num_layers > MAX_LAYERS:
        raise metadata.wrong(".block_count", num_layers)
    if num_heads % num_kv_heads:
        raise metadata.wrong(".attention.head_count_kv", num_kv_heads)
    _require_width(header, embedding, hidden)
    _require_width(header, _matrix(header, "blk.0.attn_output.weight"), num_heads * head_dim)
    _require_width(header, _matrix(header, "blk.0.ffn_down.weight"), intermediate)
    if metadata.positive(".attention.value_length", head_dim) != head_dim or rotated > head_dim or rotated % 2:
        raise ModelError(f"{header.path}: heads of {head_dim} with {rotated} rotated dimensions are not supported")
    return Dimensions(
        hidden, intermediate, embedding.shape[0], num_layers, num_heads, num_kv_heads, head_dim, rotated
    )


def require_whole_rotation(header: GgufHeader, sizes: Dimensions) -> None:
    """Raises ModelError for a model that rotates only a part of each head."""
    if sizes.rotated != sizes.head_dim:
        raise ModelError(
            f"{header.path}: heads of {sizes.head_dim} with {sizes.rotated} rotated dimensions are not supported"
        )


def require_hidden_heads(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> None:
    """Raises ModelError where mlx-lm's model takes the hidden size for the size of all heads and it is not."""
    if sizes.head_dim * sizes.num_heads != sizes.hidden:
        raise ModelError(f"{header.path}: {metadata.prefix} heads do not add up to the hidden size")


def _matrix(header: GgufHeader, name: str) -> GgufTensor:
    tensor = header.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        raise ModelError(f"{header.path}: tensor {name} is missing or no matrix; the file is not a whole model")
    return tensor


def _require_width(header: GgufHeader, tensor: GgufTensor, width: int) -> None:
    if tensor.columns != width or width > MAX_WIDTH:
        raise ModelError(
            f"{header.path}: tensor {tensor.name!r} is {tensor.shape}, but the header asks for rows of {width}"
        )
