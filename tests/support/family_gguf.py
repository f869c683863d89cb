"""Tiny mlx-lm models with random weights, written as the GGUF files llama.cpp's converter makes of them.

Tensor names are looked up in the `gguf` package's own map from Hugging Face names, rows and norms are changed
as `convert_hf_to_gguf.py` does; nothing here comes from the code under test.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH_NAMES
from gguf.quants import dequantize, quantize
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map
from mlx.utils import tree_flatten, tree_unflatten

from tests.support.tiny_gguf import add_tokenizer, pair_rows, write_out

Config = dict[str, Any]
Kind = GGMLQuantizationType
# Where a block's float16 scales are, for types the `gguf` package reads but does not write; the rest of such
# a block may be any bytes.
_SCALE_BYTES = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
}
BASE: Config = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Family:
    """`arch` names the GGUF family; `config` is what mlx-lm's model has beyond BASE; `edit` adds fields and
    tensors of this case to the file. `kind` is the type of all matrices; Q4_1 is kept as it is, so what comes
    back must be the same numbers."""

    arch: str
    model_type: str
    config: Config = field(default_factory=dict)
    edit: Callable[[GGUFWriter], None] | None = None
    kind: Kind = Kind.Q4_1

    @property
    def head_dim(self) -> int:
        whole = BASE | self.config
        return int(whole.get("head_dim", whole["hidden_size"] // whole["num_attention_heads"]))


def write_family_gguf(path: Path, family: Family, seed: int = 0) -> nn.Module:
    """Write the file; returns the float32 model it was made of."""
    writer = GGUFWriter(path, family.arch)
    config = BASE | family.config | {"model_type": family.model_type}
    config["vocab_size"] = add_tokenizer(writer, "qwen2")
    _add_fields(writer, family, config)
    model = new_model(config)
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in _shapes(model).items():
        weights[name] = _add_tensor(writer, family, config, name, shape, random)
    if family.edit is not None:
        family.edit(writer)
    write_out(writer)
    model.update(tree_unflatten([(name, mx.array(values)) for name, values in weights.items()]))
    return model


def random_blocks(kind: Kind, shape: tuple[int, ...], random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Raw rows of a matrix of this shape with values around 0.2."""
    weights = (random.standard_normal(shape) * 0.2).astype(np.float32)
    if kind not in _SCALE_BYTES:
        return quantize(weights, kind).view(np.uint8)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (shape[0], shape[1] // block, block_bytes), dtype=np.uint8)
    for at in _SCALE_BYTES[kind]:
        scales = random.uniform(5e-5, 2e-4, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def new_model(config: Config) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if config["tie_word_embeddings"] and hasattr(model, "sanitize"):
        model.sanitize({})
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}


def _add_fields(writer: GGUFWriter, family: Family, config: Config) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if family.arch != "gemma2":  # whose files leave it out
        writer.add_rope_freq_base(config["rope_theta"])
    if family.arch == "phi3":
        writer.add_rope_dimension_count(int(family.head_dim * config.get("partial_rotary_factor", 1.0)))
    elif "head_dim" in config:
        writer.add_key_length(family.head_dim)
        writer.add_value_length(family.head_dim)


@functools.cache
def _names(family: str, num_layers: int) -> TensorNameMap:
    return get_tensor_name_map(next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family), num_layers)


def _add_tensor(
    writer: GGUFWriter,
    family: Family,
    config: Config,
    name: str,
    shape: tuple[int, ...],
    random: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """Returns the values mlx-lm's model has, in its own row order."""
    gguf_name = _names(family.arch, config["num_hidden_layers"]).get_name(name, try_suffixes=(".weight", ".bias"))
    assert gguf_name is not None, name
    if len(shape) == 1:
        shifted = family.arch.startswith("gemma")
        values = (random.integers(-64, 64, shape) / 256 + (not shifted and "norm" in name)).astype(np.float32)
        writer.add_tensor(gguf_name, _stored(values + np.float32(shifted), family, config, name))
        return values
    raw = random_blocks(family.kind, shape, random)
    writer.add_tensor(gguf_name, _stored(raw, family, config, name), raw_dtype=family.kind)
    exact: npt.NDArray[np.float32] = dequantize(raw, family.kind)
    return exact


def _stored(rows: npt.NDArray[Any], family: Family, config: Config, name: str) -> npt.NDArray[Any]:
    """`LlamaModel.permute`, which Llama's relatives go through."""
    if family.arch not in ("llama", "smollm3"):
        return rows
    if ".q_proj." in name:
        return np.ascontiguousarray(pair_rows(rows, config["num_attention_heads"]))
    if ".k_proj." in name:
        return np.ascontiguousarray(pair_rows(rows, config["num_key_value_heads"]))
    return rows
