"""Which GGUF families become which mlx-lm models: config.json and how tensors are told apart.

How the files come about: `conversion/` and `convert_hf_to_gguf.py` of llama.cpp. What its loader takes for
granted and no file says (Gemma's layer pattern and attention scale, SmolLM3's unrotated layers) is in
llama.cpp's `src/models/`.

A GGUF file's rotary scaling as mlx-lm's `rope_scaling`.

Llama 3 files carry no scaling fields: a tensor divides each frequency instead. mlx-lm computes the same
numbers from four parameters, so those are found again by trying the published ones. Phi 3 files carry two
such tensors, which config.json takes as they are.
Formulas: `Llama3RoPE`, `YarnRoPE` and `SuScaledRoPE` in mlx-lm's `rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmcad_mlx.errors import ModelError
from llmcad_mlx.gguf.dimensions import (
    CONFIGURED,
    GEMMA2_LAYER,
    GEMMA3_LAYER,
    HEAD,
    LAYER_TENSOR,
    LLAMA_LAYER,
    LONG_FACTORS,
    OUTER_NAMES,
    PHI3_LAYER,
    QWEN3_LAYER,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Dimensions,
    read_dimensions,
    require_hidden_heads,
    require_whole_rotation,
)
from llmcad_mlx.gguf.groups import values
from llmcad_mlx.gguf.reader import GgufHeader, Metadata, read_rows, shortest_float32

LLAMA3_CONTEXT = 8192
LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.3; Llama 3.2
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0

ORIGINAL_CONTEXT = ".rope.scaling.original_context_length"
# What llama.cpp multiplies YaRN's attention with; mlx-lm computes only the published factor.
_YARN_PLAIN = {
    ".rope.scaling.attn_factor": 1.0,
    ".rope.scaling.yarn_attn_factor": 1.0,
    ".rope.scaling.yarn_ext_factor": 1.0,
    ".rope.scaling.yarn_log_multiplier": 0.0,
}


def read_rope_scaling(
    header: GgufHeader, metadata: Metadata, sizes: Dimensions, kinds: tuple[str, ...]
) -> dict[str, object] | None:
    """mlx-lm's `rope_scaling` record for the file, None when positions are not scaled.

    `kinds` are those the family's model can compute, of "llama3", "linear", "yarn" and "longrope".
    Raises ModelError for another kind, and for numbers that mlx-lm's formulas do not give.
    """
    found = [name for name in sorted(CONFIGURED) if name in header.tensors]
    if found == [ROPE_FACTORS] and "llama3" in kinds:
        return _llama3(header, metadata, sizes)
    if found == sorted((LONG_FACTORS, SHORT_FACTORS)) and "longrope" in kinds:
        return _longrope(header, metadata, sizes)
    if found:
        raise ModelError(f"{header.path}: {metadata.prefix} with {' and '.join(found)} is not supported")
    return _scaled(header, metadata, kinds)


def _scaled(header: GgufHeader, metadata: Metadata, kinds: tuple[str, ...]) -> dict[str, object] | None:
    kind = metadata.text(".rope.scaling.type", "linear")  # llama.cpp's default too
    factor = metadata.number(".rope.scaling.factor", 0.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if factor <= 0 or kind not in kinds or kind not in ("linear", "yarn"):
        known = " and ".join(name for name in ("linear", "yarn") if name in kinds) or "none"
        raise ModelError(
            f"{header.path}: {metadata.prefix} with rotary scaling {kind[:40]!r} by {factor:g} "
            f"is not supported ({known} is)"
        )
    return {"type": "linear", "factor": factor} if kind == "linear" else _yarn(metadata, factor)


def _yarn(metadata: Metadata, factor: float) -> dict[str, object]:
    for key, plain in _YARN_PLAIN.items():
        if metadata.number(key, plain) != plain:
            raise metadata.wrong(key, metadata.number(key))
    context = metadata.positive(ORIGINAL_CONTEXT)
    scaling: dict[str, object] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": context,
    }
    for name in ("beta_fast", "beta_slow"):
        if metadata.has(f".rope.scaling.yarn_{name}"):
            scaling[name] = metadata.above_zero(f".rope.scaling.yarn_{name}")
    return scaling


def _llama3(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> dict[str, object]:
    divisors = _factors(header, ROPE_FACTORS, sizes)
    base = metadata.above_zero(".rope.freq_base", 10000.0)
    for factor in LLAMA3_FACTORS:
        if np.allclose(llama3_divisors(sizes.head_dim, base, factor), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": LLAMA3_CONTEXT,
            }
    raise ModelError(f"{header.path}: the frequencies in {ROPE_FACTORS} are not those of a known Llama 3 model")


def llama3_divisors(head_dim: int, base: float, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3 divides each of its head_dim / 2 frequencies by: (head_dim / 2,) float64."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    return 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1))


def _longrope(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> dict[str, object]:
    """mlx-lm computes the factor on queries and keys from the two context lengths, so the file's must agree."""
    context, original = metadata.positive(".context_length"), metadata.positive(ORIGINAL_CONTEXT)
    scale = context / original
    expected = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0
    if not math.isclose(metadata.number(".rope.scaling.attn_factor", expected), expected, rel_tol=1e-4):
        raise metadata.wrong(".rope.scaling.attn_factor", metadata.number(".rope.scaling.attn_factor"))
    long, short = (_factors(header, name, sizes) for name in (LONG_FACTORS, SHORT_FACTORS))
    return {
        "type": "longrope",
        "long_factor": [shortest_float32(float(number)) for number in long],
        "short_factor": [shortest_float32(float(number)) for number in short],
    }


def _factors(header: GgufHeader, name: str, sizes: Dimensions) -> npt.NDArray[np.float32]:
    """One positive number for each rotated pair: (rotated / 2,) float32."""
    tensor = header.tensors[name]
    if tensor.shape != (sizes.rotated // 2,):
        raise ModelError(
            f"{header.path}: tensor {name!r} is {tensor.shape}, expected {(sizes.rotated // 2,)} as for its heads"
        )
    try:
        factors = values(read_rows(header.path, tensor, 0, 1), tensor.kind).reshape(-1)
    except NotImplementedError:
        raise ModelError(f"{header.path}: tensor {name!r} has type {tensor.kind.name}, not supported") from None
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(f"{header.path}: tensor {name!r} holds numbers that cannot divide a frequency")
    return factors


_GENERAL_SCALINGS = ("llama3", "linear", "yarn")  # mlx-lm's `initialize_rope`


@dataclass(frozen=True, slots=True)
class FamilyModel:
    """What a file becomes. `config` is config.json without quantisation and token ids."""

    config: dict[str, object]
    sizes: Dimensions
    layer_names: Mapping[str, str]
    paired_rows: bool = False
    """q and k rows are stored for rotating neighbours and must be put back for rotating halves."""
    norm_offset: float = 0.0
    """What norm weights in the file have more than in mlx-lm, which adds it itself."""

    def mlx_name(self, name: str) -> str | None:
        """mlx-lm's name of a GGUF tensor; None for one that the configuration replaces."""
        if name in OUTER_NAMES:
            return OUTER_NAMES[name]
        match = LAYER_TENSOR.fullmatch(name)
        if match and int(match[1]) < self.sizes.num_layers and match[2] in self.layer_names:
            return f"model.layers.{match[1]}.{self.layer_names[match[2]]}.{match[3]}"
        if name in CONFIGURED:
            return None
        raise KeyError(name)

    def heads_to_unpair(self, name: str) -> int:
        """How many heads' rows of this GGUF tensor must be put back in order; 0 for none."""
        match = LAYER_TENSOR.fullmatch(name)
        if not self.paired_rows or not match:
            return 0
        return {"attn_q": self.sizes.num_heads, "attn_k": self.sizes.num_kv_heads}.get(match[2], 0)

    def offset_of(self, name: str) -> float:
        """What must be taken from each value of this GGUF tensor."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


def read_family(header: GgufHeader, metadata: Metadata) -> FamilyModel:
    """The mlx-lm model for a file.

    Raises ModelError for a family that is not in `FAMILIES`, for variants (experts, partial or scaled
    rotation) that mlx-lm's model of the family does not cover, for sizes that contradict the tensors, and
    for one part of a file that was split.
    """
    build = FAMILIES.get(metadata.prefix)
    if build is None:
        raise ModelError(
            f"{header.path}: GGUF family {metadata.prefix!r} is not supported ({', '.join(FAMILIES)} are)"
        )
    if metadata.has("split.count") and metadata.integer("split.count") > 1:
        raise ModelError(
            f"{header.path}: one of {metadata.integer('split.count')} parts of a GGUF file; "
            "join them first (llama-gguf-split --merge)"
        )
    if metadata.has(".expert_count") and metadata.integer(".expert_count"):
        raise ModelError(f"{header.path}: {metadata.prefix} with experts is not supported")
    return build(header, metadata, read_dimensions(header, metadata))


def _config(
    header: GgufHeader,
    metadata: Metadata,
    sizes: Dimensions,
    model_type: str,
    scalings: tuple[str, ...] = _GENERAL_SCALINGS,
    rope_theta: float = 10000.0,
) -> dict[str, object]:
    """What all families have in common."""
    config: dict[str, object] = {
        "model_type": model_type,
        "architectures": [_ARCHITECTURES[model_type]],
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.num_layers,
        "intermediate_size": sizes.intermediate,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": metadata.number(".attention.layer_norm_rms_epsilon"),
        "vocab_size": sizes.vocab,
        "max_position_embeddings": metadata.positive(".context_length"),
        "rope_theta": metadata.above_zero(".rope.freq_base", rope_theta),
        "rope_traditional": False,
        "hidden_act": "gelu_pytorch_tanh" if model_type.startswith("gemma") else "silu",
        "tie_word_embeddings": HEAD not in header.tensors,
    }
    if "longrope" not in scalings:
        require_whole_rotation(header, sizes)
    scaling = read_rope_scaling(header, metadata, sizes, scalings)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _llama(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> FamilyModel:
    """Also Mistral and SmolLM2, which come under this name."""
    config = _config(header, metadata, sizes, "llama") | _llama_parts(header, sizes)
    return FamilyModel(config, sizes, LLAMA_LAYER, paired_rows=True)


def _smollm3(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> FamilyModel:
    """Every fourth layer does not rotate; its rows are paired like the others'."""
    config = _config(header, metadata, sizes, "smollm3") | _llama_parts(header, sizes)
    return FamilyModel(config | {"no_rope_layer_interval": 4}, sizes, LLAMA_LAYER, paired_rows=True)


def _llama_parts(header: GgufHeader, sizes: Dimensions) -> dict[str, object]:
    return {
        "head_dim": sizes.head_dim,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def _qwen2(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> FamilyModel:
    require_hidden_heads(header, metadata, sizes)
    return FamilyModel(_config(header, metadata, sizes, "qwen2"), sizes, LLAMA_LAYER)


def _qwen3(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> FamilyModel:
    config = _config(header, metadata, sizes, "qwen3") | {"head_dim": sizes.head_dim}
    return FamilyModel(config, sizes, QWEN3_LAYER)


def _gemma2(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> FamilyModel:
    config = _config(header, metadata, sizes, "gemma2", scalings=()) | {
        "head_dim": sizes.head_dim,
        "query_pre_attn_scalar": _query_scalar(sizes, layers_of_27b=46),
        "attn_logit_softcapping": metadata.above_zero(".attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.above_zero(".final_logit_softcapping", 30.0),
        "sliding_window": metadata.positive(".attention.sliding_window", 4096),
    }
    return FamilyModel(config, sizes, GEMMA2_LAYER, norm_offset=1.0)


def _gemma3(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> FamilyModel:
    """Scaled rotation is that of the layers that see everything."""
    if metadata.number(".final_logit_softcapping", 0.0):
        raise ModelError(f"{header.path}: gemma3 with capped logits is not supported")
    config = _config(header, metadata, sizes, "gemma3_text", scalings=("linear",), rope_theta=1e6) | {
        "head_dim": sizes.head_dim,
        "query_pre_attn_scalar": _query_scalar(sizes, layers_of_27b=62),
        "rope_local_base_freq": metadata.above_zero(".rope.freq_base_swa", 10000.0),
    }
    if metadata.has(".attention.sliding_window") and metadata.integer(".attention.sliding_window"):
        config["sliding_window"] = metadata.positive(".attention.sliding_window")
        config["sliding_window_pattern"] = metadata.positive(".attention.sliding_window_pattern", 6)
    else:
        config["sliding_window_pattern"] = 1
    return FamilyModel(config, sizes, GEMMA3_LAYER, norm_offset=1.0)


def _query_scalar(sizes: Dimensions, layers_of_27b: int) -> int:
    """Queries are divided by this number's root. No file says so; llama.cpp tells the 27B by its layers."""
    return sizes.hidden // sizes.num_heads if sizes.num_layers == layers_of_27b else sizes.head_dim


def _phi3(header: GgufHeader, metadata: Metadata, sizes: Dimensions) -> FamilyModel:
    require_hidden_heads(header, metadata, sizes)
    share = sizes.rotated / sizes.head_dim
    config = _config(header, metadata, sizes, "phi3", scalings=("longrope",)) | {
        "partial_rotary_factor": share,
        "original_max_position_embeddings": metadata.positive(
            ORIGINAL_CONTEXT, metadata.positive(".context_length")
        ),
    }
    if int(sizes.head_dim * share) != sizes.rotated:  # as mlx-lm computes it
        raise metadata.wrong(".rope.dimension_count", sizes.rotated)
    return FamilyModel(config, sizes, PHI3_LAYER)


FAMILIES: Mapping[str, Callable[[GgufHeader, Metadata, Dimensions], FamilyModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "smollm3": _smollm3,
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
