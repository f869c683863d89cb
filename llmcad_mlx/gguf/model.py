"""Which GGUF families become which mlx-lm models: config.json, and what mlx-lm calls each tensor.

mlx-lm's model is built from the numbers of the header before a weight is read, so each size is held against a
tensor of the file: one that the file does not bear out would cost memory in proportion to a lie.

How the files come about: `conversion/` and `convert_hf_to_gguf.py` of llama.cpp. Its map of tensor names, which
is in the `gguf` package, is used backwards: mlx-lm's names are those of Hugging Face. What llama.cpp's loader
takes for granted and no file says (Gemma's layer pattern and attention scale, SmolLM3's unrotated layers) is in
its `src/models/`. Formulas of rotary scaling: `Llama3RoPE`, `YarnRoPE` and `SuScaledRoPE` in mlx-lm's
`rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map

from llmcad_mlx.gguf.groups import values
from llmcad_mlx.gguf.reader import GgufHeader, GgufTensor, read_rows, shortest_float32

MAX_LAYERS = 1 << 10
MAX_WIDTH = 1 << 20  # of a row: what is read at once

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"
CONFIGURED = frozenset((ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS))
"""Tensors that become numbers in config.json."""

LLAMA3_CONTEXT = 8192
LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.3; Llama 3.2
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
_ORIGINAL_CONTEXT = ".rope.scaling.original_context_length"
# What llama.cpp multiplies YaRN's attention with; mlx-lm computes only the published factor.
_YARN_PLAIN = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}


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


@dataclass(frozen=True, slots=True)
class _Family:
    """How the files of one GGUF family become mlx-lm's `model_type`."""

    arch: MODEL_ARCH
    model_type: str
    architecture: str
    own_config: Callable[[GgufHeader, Dimensions], dict[str, object]] = lambda header, sizes: {}
    """What config.json has beyond that of other families. Raises ModelError for what mlx-lm cannot compute."""
    scalings: tuple[str, ...] = ("llama3", "linear", "yarn")  # mlx-lm's `initialize_rope`
    """Rotary scalings that the model can compute, "longrope" perhaps among them."""
    rope_theta: float = 10000.0
    """Where the file does not say."""
    heads_fill_hidden: bool = False
    """mlx-lm's model takes the hidden size for the size of all heads."""
    paired_rows: bool = False
    """q and k rows are stored for rotating neighbours and must be put back for rotating halves."""
    norm_offset: float = 0.0
    """What norm weights in the file have more than in mlx-lm, which adds it itself."""


@dataclass(frozen=True, slots=True)
class FamilyModel:
    """What a file becomes. `config` is config.json without quantisation and token ids; names are mlx-lm's."""

    config: dict[str, object]
    sizes: Dimensions
    family: _Family
    gguf_names: TensorNameMap

    def gguf_name(self, name: str) -> str | None:
        """What a GGUF file calls the tensor; None where GGUF has no name for it."""
        found: str | None = self.gguf_names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def heads_to_unpair(self, name: str) -> int:
        """How many heads' rows of this tensor must be put back in order; 0 for none."""
        heads = {"q_proj": self.sizes.num_heads, "k_proj": self.sizes.num_kv_heads}
        return heads.get(name.split(".")[-2], 0) if self.family.paired_rows else 0


def read_family(header: GgufHeader) -> FamilyModel:
    """The mlx-lm model for a file. Raises ModelError for a family that is not in `FAMILIES`, for variants
    (experts, partial or scaled rotation) that mlx-lm's model of it does not cover, for sizes that contradict the
    tensors, and for one part of a file that was split."""
    if header.has("split.count") and header.integer("split.count") > 1:  # only the first part names its family
        raise header.refused(
            f"one of {header.integer('split.count')} parts of a GGUF file; "
            "join them first (llama-gguf-split --merge)"
        )
    family = FAMILIES.get(header.family)
    if family is None:
        raise header.refused(f"GGUF family {header.family!r} is not supported ({', '.join(FAMILIES)} are)")
    if header.has(".expert_count") and header.integer(".expert_count"):
        raise header.refused(f"{header.family} with experts is not supported")
    sizes = _read_dimensions(header, family)
    config = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.num_layers,
        "intermediate_size": sizes.intermediate,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "rms_norm_eps": header.number(".attention.layer_norm_rms_epsilon"),
        "vocab_size": sizes.vocab,
        "max_position_embeddings": header.positive(".context_length"),
        "rope_theta": header.above_zero(".rope.freq_base", family.rope_theta),
        "rope_traditional": False,
        "hidden_act": "gelu_pytorch_tanh" if family.model_type.startswith("gemma") else "silu",
        "tie_word_embeddings": HEAD not in header.tensors,
        **_rope_scaling(header, sizes, family.scalings),
        **family.own_config(header, sizes),
    }
    return FamilyModel(config, sizes, family, get_tensor_name_map(family.arch, sizes.num_layers))


def _read_dimensions(header: GgufHeader, family: _Family) -> Dimensions:
    """Raises ModelError for a size that is missing, absurd, not that of the file's tensors, or not for mlx-lm."""
    hidden = header.positive(".embedding_length")
    num_layers = header.positive(".block_count")
    num_heads = header.positive(".attention.head_count")
    num_kv_heads = header.positive(".attention.head_count_kv", num_heads)
    head_dim = header.positive(".attention.key_length", max(1, hidden // num_heads))
    intermediate = header.positive(".feed_forward_length")
    rotated = header.positive(".rope.dimension_count", head_dim)
    if num_layers > MAX_LAYERS:
        raise header.wrong(".block_count", num_layers)
    if num_heads % num_kv_heads:
        raise header.wrong(".attention.head_count_kv", num_kv_heads)
    vocab, _ = _matrix(header, EMBEDDING, hidden).shape
    _matrix(header, "blk.0.attn_output.weight", num_heads * head_dim)
    _matrix(header, "blk.0.ffn_down.weight", intermediate)
    whole = header.positive(".attention.value_length", head_dim) == head_dim and rotated % 2 == 0
    if not whole or rotated > head_dim or (rotated < head_dim and "longrope" not in family.scalings):
        raise header.refused(f"heads of {head_dim} with {rotated} rotated dimensions are not supported")
    if family.heads_fill_hidden and head_dim * num_heads != hidden:
        raise header.refused(f"{header.family} heads do not add up to the hidden size")
    return Dimensions(hidden, intermediate, vocab, num_layers, num_heads, num_kv_heads, head_dim, rotated)


def _matrix(header: GgufHeader, name: str, width: int) -> GgufTensor:
    """Raises ModelError unless the file has this matrix, with rows of `width`."""
    tensor = header.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        raise header.refused(f"tensor {name} is missing or no matrix; the file is not a whole model")
    if tensor.columns != width or width > MAX_WIDTH:
        raise header.refused(f"tensor {name!r} is {tensor.shape}, but the header asks for rows of {width}")
    return tensor


def _rope_scaling(header: GgufHeader, sizes: Dimensions, kinds: tuple[str, ...]) -> dict[str, object]:
    """mlx-lm's `rope_scaling`, one of `kinds`, as an entry of config.json; {} when positions are not scaled.

    Raises ModelError for another kind, and for numbers that mlx-lm's formulas do not give.
    """
    found = [name for name in sorted(CONFIGURED) if name in header.tensors]
    if found == [ROPE_FACTORS] and "llama3" in kinds:
        return {"rope_scaling": _llama3(header, sizes)}
    if found == sorted((LONG_FACTORS, SHORT_FACTORS)) and "longrope" in kinds:
        return {"rope_scaling": _longrope(header, sizes)}
    if found:
        raise header.refused(f"{header.family} with {' and '.join(found)} is not supported")
    kind = header.field(".rope.scaling.type", str, "linear")  # llama.cpp's default too
    factor = header.number(".rope.scaling.factor", 0.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    if factor <= 0 or kind not in kinds or kind not in ("linear", "yarn"):
        known = " and ".join(name for name in ("linear", "yarn") if name in kinds) or "none"
        raise header.refused(
            f"{header.family} with rotary scaling {kind[:40]!r} by {factor:g} is not supported ({known} is)"
        )
    return {"rope_scaling": {"type": "linear", "factor": factor} if kind == "linear" else _yarn(header, factor)}


def _yarn(header: GgufHeader, factor: float) -> dict[str, object]:
    for name, plain in _YARN_PLAIN.items():
        found = header.number(f".rope.scaling.{name}", plain)
        if found != plain:
            raise header.wrong(f".rope.scaling.{name}", found)
    context = header.positive(_ORIGINAL_CONTEXT)
    betas = [name for name in ("beta_fast", "beta_slow") if header.has(f".rope.scaling.yarn_{name}")]
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": context,
        **{name: header.above_zero(f".rope.scaling.yarn_{name}") for name in betas},
    }


def _llama3(header: GgufHeader, sizes: Dimensions) -> dict[str, object]:
    """Llama 3 files carry what each frequency is divided by; mlx-lm computes it from four published parameters."""
    divisors = _factors(header, ROPE_FACTORS, sizes)
    base = header.above_zero(".rope.freq_base", 10000.0)
    for factor in LLAMA3_FACTORS:
        if np.allclose(llama3_divisors(sizes.head_dim, base, factor), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": LLAMA3_CONTEXT,
            }
    raise header.refused(f"the frequencies in {ROPE_FACTORS} are not those of a known Llama 3 model")


def llama3_divisors(head_dim: int, base: float, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3 divides each of its head_dim / 2 frequencies by: (head_dim / 2,) float64."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    return 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1))


def _longrope(header: GgufHeader, sizes: Dimensions) -> dict[str, object]:
    """mlx-lm computes the factor on queries and keys from the two context lengths, so the file's must agree."""
    key = ".rope.scaling.attn_factor"
    context, original = header.positive(".context_length"), header.positive(_ORIGINAL_CONTEXT)
    scale = context / original
    expected = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0
    if not math.isclose(header.number(key, expected), expected, rel_tol=1e-4):
        raise header.wrong(key, header.number(key))
    long, short = (_factors(header, name, sizes) for name in (LONG_FACTORS, SHORT_FACTORS))
    return {"type": "longrope", "long_factor": long, "short_factor": short}


def _factors(header: GgufHeader, name: str, sizes: Dimensions) -> list[float]:
    tensor = header.tensors[name]
    if tensor.shape != (sizes.rotated // 2,):
        raise header.refused(
            f"tensor {name!r} is {tensor.shape}, expected {(sizes.rotated // 2,)} as for its heads"
        )
    try:
        factors = values(read_rows(header.path, tensor, 0, 1), tensor.kind).reshape(-1)
    except NotImplementedError:
        raise header.refused(f"tensor {name!r} has type {tensor.kind.name}, not supported") from None
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise header.refused(f"tensor {name!r} holds numbers that cannot divide a frequency")
    return [shortest_float32(number) for number in factors.tolist()]


def _gemma2(header: GgufHeader, sizes: Dimensions) -> dict[str, object]:
    return {
        "query_pre_attn_scalar": _query_scalar(sizes, layers_of_27b=46),
        "attn_logit_softcapping": header.above_zero(".attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.above_zero(".final_logit_softcapping", 30.0),
        "sliding_window": header.positive(".attention.sliding_window", 4096),
    }


def _gemma3(header: GgufHeader, sizes: Dimensions) -> dict[str, object]:
    """Scaled rotation is that of the layers that see everything."""
    if header.number(".final_logit_softcapping", 0.0):
        raise header.refused("gemma3 with capped logits is not supported")
    config: dict[str, object] = {
        "query_pre_attn_scalar": _query_scalar(sizes, layers_of_27b=62),
        "rope_local_base_freq": header.above_zero(".rope.freq_base_swa", 10000.0),
        "sliding_window_pattern": 1,
    }
    if header.has(".attention.sliding_window") and header.integer(".attention.sliding_window"):
        config["sliding_window"] = header.positive(".attention.sliding_window")
        config["sliding_window_pattern"] = header.positive(".attention.sliding_window_pattern", 6)
    return config


def _query_scalar(sizes: Dimensions, layers_of_27b: int) -> int:
    """Queries are divided by this number's root. No file says so; llama.cpp tells the 27B by its layers."""
    return sizes.hidden // sizes.num_heads if sizes.num_layers == layers_of_27b else sizes.head_dim


def _phi3(header: GgufHeader, sizes: Dimensions) -> dict[str, object]:
    share = sizes.rotated / sizes.head_dim
    if int(sizes.head_dim * share) != sizes.rotated:  # as mlx-lm computes it
        raise header.wrong(".rope.dimension_count", sizes.rotated)
    context = header.positive(_ORIGINAL_CONTEXT, header.positive(".context_length"))
    return {"partial_rotary_factor": share, "original_max_position_embeddings": context}


FAMILIES: Mapping[str, _Family] = {
    MODEL_ARCH_NAMES[family.arch]: family
    for family in (
        # Mistral and SmolLM2 come as llama, too.
        _Family(MODEL_ARCH.LLAMA, "llama", "LlamaForCausalLM", paired_rows=True),
        _Family(MODEL_ARCH.QWEN2, "qwen2", "Qwen2ForCausalLM", heads_fill_hidden=True),
        _Family(MODEL_ARCH.QWEN3, "qwen3", "Qwen3ForCausalLM"),
        _Family(MODEL_ARCH.GEMMA2, "gemma2", "Gemma2ForCausalLM", _gemma2, (), norm_offset=1.0),
        _Family(MODEL_ARCH.GEMMA3, "gemma3_text", "Gemma3ForCausalLM", _gemma3, ("linear",), 1e6, norm_offset=1.0),
        _Family(MODEL_ARCH.PHI3, "phi3", "Phi3ForCausalLM", _phi3, ("longrope",), heads_fill_hidden=True),
        # Every fourth layer does not rotate; its rows are paired like the others'.
        _Family(
            MODEL_ARCH.SMOLLM3,
            "smollm3",
            "SmolLM3ForCausalLM",
            lambda header, sizes: {"no_rope_layer_interval": 4},
            paired_rows=True,
        ),
    )
}
