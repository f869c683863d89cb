"""Tiny mlx-lm models with random weights, written as the GGUF files llama.cpp's converter makes of them.

Tensor names are looked up in the `gguf` package's own map from Hugging Face names, rows and norms are changed as
`convert_hf_to_gguf.py` does; nothing here comes from the code under test. All have the same byte-level
tokenizer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH_NAMES
from gguf.quants import dequantize, quantize
from gguf.tensor_mapping import get_tensor_name_map
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import pre_tokenizers

Config = dict[str, Any]
Edit = Callable[[GGUFWriter], None]

# Where a block's float16 scales are, for types the `gguf` package reads but does not write; the rest of such
# a block may be any bytes.
_SCALE_BYTES = {
    Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,), Kind.IQ2_XXS: (0,), Kind.IQ2_XS: (0,),
    Kind.IQ2_S: (0,), Kind.IQ3_XXS: (0,), Kind.IQ3_S: (0,), Kind.IQ1_S: (0,),
}  # fmt: skip
HIDDEN = 64
BASE: Config = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
}
END = "<|im_end|>"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


@dataclass(frozen=True)
class Family:
    """`arch` names the GGUF family; `config` is what mlx-lm's model has beyond BASE; `edit` adds fields and
    tensors of this case to the file. `kind` is the type of all matrices; Q4_1 is kept as it is, so what comes
    back must be the same numbers."""

    arch: str
    model_type: str
    config: Config = field(default_factory=dict)
    edit: Edit | None = None
    kind: Kind = Kind.Q4_1

    @property
    def whole_config(self) -> Config:
        return BASE | self.config | {"model_type": self.model_type, "vocab_size": len(_vocabulary()[0])}


def write_tiny_gguf(
    path: Path, kind: Kind = Kind.F32, *, edit: Edit | None = None, skip: tuple[str, ...] = ()
) -> Path:
    """A llama; tensors named in `skip` are left out. Returns `path`."""
    write_family_gguf(path, Family("llama", "llama", edit=edit, kind=kind), skip)
    return path


def write_family_gguf(path: Path, family: Family, skip: tuple[str, ...] = ()) -> nn.Module:
    """Write the file; returns the float32 model it was made of."""
    writer = GGUFWriter(path, family.arch)
    config = family.whole_config
    _add_fields(writer, family, config)
    _add_tokenizer(writer)
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if config["tie_word_embeddings"] and hasattr(model, "sanitize"):
        model.sanitize({})
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    random = np.random.default_rng(0)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        values, raw = _random_tensor(family, name, array.shape, random)
        weights.append((name, mx.array(values)))
        if gguf_name not in skip:
            kind = {} if array.ndim == 1 else {"raw_dtype": family.kind}
            writer.add_tensor(gguf_name, _stored(raw, family, config, name), **kind)
    if family.edit is not None:
        family.edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.update(tree_unflatten(weights))
    return model


def random_blocks(kind: Kind, shape: tuple[int, ...], random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Raw rows of a matrix of this shape with values around 0.2."""
    weights = (random.standard_normal(shape) * 0.2).astype(np.float32)
    if kind not in _SCALE_BYTES:
        return quantize(weights, kind).view(np.uint8)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (shape[0], shape[1] // block, block_bytes), dtype=np.uint8)
    scales = {at: random.uniform(0.5, 2, raw.shape[:2]) for at in _SCALE_BYTES[kind]}
    _put(scales, raw, 1.0)
    _put(scales, raw, 0.2 / float(np.std(dequantize(raw.reshape(shape[0], -1), kind))))
    return raw.reshape(shape[0], -1)


def _put(scales: dict[int, npt.NDArray[np.float64]], raw: npt.NDArray[np.uint8], factor: float) -> None:
    for at, values in scales.items():
        raw[..., at : at + 2] = (values * factor).astype(np.float16)[..., None].view(np.uint8)


def _random_tensor(
    family: Family, name: str, shape: tuple[int, ...], random: np.random.Generator
) -> tuple[Any, Any]:
    """The values mlx-lm's model has, in its own row order, and what is stored of them."""
    if len(shape) == 1:
        shifted = family.arch.startswith("gemma")
        values = (random.integers(-64, 64, shape) / 256 + (not shifted and "norm" in name)).astype(np.float32)
        return values, values + np.float32(shifted)
    raw = random_blocks(family.kind, shape, random)
    return dequantize(raw, family.kind), raw


def _stored(rows: npt.NDArray[Any], family: Family, config: Config, name: str) -> npt.NDArray[Any]:
    """`LlamaModel.permute` of llama.cpp: rows of halves to rows of neighbours."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None or family.arch not in ("llama", "smollm3"):
        return rows
    halves = rows.reshape(config[heads], 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _add_fields(writer: GGUFWriter, family: Family, config: Config) -> None:
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
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
        writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1.0)))
    elif "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)


def _add_tokenizer(writer: GGUFWriter) -> None:
    tokens, types, merges = _vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index(END))
    writer.add_chat_template(TEMPLATE)


def _vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, padded to whole groups, with their types and merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    tokens = [*letters, *("".join(merge.split()) for merge in merges), END, "[PAD0]"]
    tokens += [f"[PAD{number}]" for number in range(1, -len(tokens) % 32 + 1)]
    types = [3 if token == END else 5 if token.startswith("[PAD") else 1 for token in tokens]
    return tokens, types, merges
