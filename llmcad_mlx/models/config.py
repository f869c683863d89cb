"""A folder's config.json as its publisher's own code reads it.

mlx-lm takes what a config.json leaves out from defaults of its own, and looks for some fields where older versions
of transformers wrote them: a rotary base that is now inside `rope_parameters` silently becomes another one.
transformers' class for the model type is the reference: what it finds in the file, and its defaults, are filled in
where mlx-lm has a field of the same meaning. What mlx-lm would ignore although it changes the computation is
refused; a window that it ignores, or a second set of rotary factors for long texts, limits the context, for up to
there both compute the same.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import math
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.positional_encoding import RoPE
from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE
from mlx_lm.utils import _get_classes

from llmcad_mlx.errors import ModelError

_MOST_CONTEXT = "max_context"
"""Under "llmcad" in a config: tokens up to which the model computes what its publisher's does."""

_MODELS = "mlx_lm.models"

# Not filled in: mlx-lm and transformers name kinds of layers differently; the weights have a say in the other.
_NOT_FILLED_IN = {"layers_block_type", "tie_word_embeddings"}
_MOVED = {
    "rope_theta", "rope_scaling", "rope_local_base_freq", "swa_rope_theta", "partial_rotary_factor",
    "rope_parameters", "rotary_emb_base", "rotary_pct",
}  # fmt: skip
_ROPE_NAMES = (
    ("rope_theta", "rope_theta"), ("partial_rotary_factor", "partial_rotary_factor"),
    ("rotary_emb_base", "rope_theta"), ("rotary_pct", "partial_rotary_factor"),
)  # fmt: skip
"""What mlx-lm calls what `rope_parameters` hold."""
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "mamba_hidden_act")
_SAME_ACTIVATION = {"swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu"}
_MUST_HEED = (
    "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights", "moe_apply_router_weight_on_input", "swiglu_alpha", "swiglu_limit",
    "norm_topk_prob",
)  # fmt: skip
_LEAST_VOCABULARY = {"phi3small": 100352}  # MLX checks no index: writing beyond a row ends in a segfault
_PLAIN = ("default", "mrope")  # kinds of rotation that mlx-lm computes alike, as only text comes in
_LONGROPE = ("longrope", "su")  # two words for one
_ALL_SLIDING = ("mistral", "ministral3")  # mlx-lm can have windows in some of their layers, not in all


def completed(folder: Path, config: Mapping[str, Any], weights: Iterable[str]) -> dict[str, Any]:
    """`config`, of the model in `folder`, with what its publisher's code would find in it.

    weights: the names of the tensors in the files. Raises ModelError for a field that mlx-lm would ignore.
    """
    found = dict(config)
    settings = found.get("quantization_config")
    if found.get("quantization") is None and isinstance(settings, Mapping) and "quant_method" not in settings:
        found["quantization"] = settings  # mlx-lm's own, of which another program has kept one of the two names
    try:
        args = _get_classes(config=found)[1]
    except (Exception, SystemExit):  # told when the model is built
        return found
    needed = _LEAST_VOCABULARY.get(config["model_type"], 0)
    if isinstance(config.get("vocab_size"), int) and config["vocab_size"] < needed:
        raise ModelError(
            f"{folder / 'config.json'}: vocab_size is {config['vocab_size']}, but mlx-lm's {config['model_type']} "
            f"writes to {needed} logits whatever it is; choose another model"
        )
    reference, has_head = _reference(config), any("lm_head" in name for name in weights)
    ignored = [
        *_complete_whole(found, config, reference, args, has_head),
        *_complete_text(found, config, reference, args, has_head),
    ]
    for field, value in ignored:
        raise _not_heeded(folder, config, field, value)
    return found


def _not_heeded(folder: Path, config: Mapping[str, Any], field: str, value: Any) -> ModelError:
    return ModelError(
        f"{folder / 'config.json'}: {field} is {value!r}, which mlx-lm does not heed for "
        f"{config['model_type']!r}: its text would be another one; choose another model"
    )


def _complete_whole(
    found: dict[str, Any], config: Mapping[str, Any], reference: Mapping[str, Any], args: Any, has_head: bool
) -> Iterator[tuple[str, Any]]:
    """Complete what is not nested; yields fields that mlx-lm would ignore, with their values."""
    parameters = inspect.signature(args).parameters
    # What every config of the kind must say is missed where it does not; only rotary settings have moved.
    optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    fillable = parameters.keys() & (optional | _MOVED) - _NOT_FILLED_IN
    for name, value in _readable(reference).items():
        if name in fillable and found.get(name) is None and value is not None:
            found[name] = value
    found.update(_under_other_names(found, parameters.keys()))
    if "rope_scaling" in parameters.keys() - optional:
        found.setdefault("rope_scaling", None)
    if "head_dim" in parameters.keys() - optional and found.get("head_dim") is None:
        with contextlib.suppress(KeyError, TypeError):  # told when the model is built
            found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    if "tie_word_embeddings" in parameters:
        _tie(found, [config], reference, has_head)
    usual, source = _reference({"model_type": config["model_type"]}), inspect.getsource(_module_of(args))
    _keep_window(found, found, reference, usual, source)
    _keep_short_factors(found, found)
    yield from _ignored(config, found, reference, usual, source, args)


def _complete_text(
    found: dict[str, Any], config: Mapping[str, Any], reference: Mapping[str, Any], args: Any, has_head: bool
) -> Iterator[tuple[str, Any]]:
    """The same for the part about text, which families that read images too have."""
    nested, full = config.get("text_config"), reference.get("text_config")
    if nested is None and "from_dict" in vars(args) and isinstance(full, Mapping):  # its fields may be outside
        nested = {name: config[name] for name in config.keys() & full.keys() - {"model_type"}}
    if not isinstance(nested, Mapping):
        return
    kind = {name: nested[name] for name in ("model_type",) if nested.get(name) is not None}
    if isinstance(full, Mapping) and full != nested:
        usual = _reference({"model_type": config["model_type"], "text_config": kind}).get("text_config") or {}
    else:  # transformers knows only the part
        full, usual = _reference(nested), _reference(kind)
    text = {name: value for name, value in _readable(full).items() if value is not None}
    text |= {name: value for name, value in nested.items() if value is not None or name not in text}
    text = {"rope_scaling": None, **text, **_under_other_names(text)}
    _tie(text, [nested, config], full, has_head)
    if not has_head and text.get("tie_word_embeddings") is None:
        text["tie_word_embeddings"] = True
    source = _source_of_text(_module_of(args), nested)
    _keep_window(found, text, full, usual, source)
    _keep_short_factors(found, text)
    found["text_config"] = text
    yield from _ignored(nested, text, full, usual, source)


def _module_of(args: Any) -> ModuleType:
    return sys.modules[args.__module__]


def _source_of_text(module: ModuleType, nested: Mapping[str, Any]) -> str:
    """Of what computes the part about text: the module itself, and the model modules that it makes use of; of
    those that it chooses from, the one for the model type."""
    values = vars(module).values()
    used = {
        value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) for value in values
    }
    parts = {name for name in used if name in sys.modules and hasattr(sys.modules[name], "ModelArgs")}
    with contextlib.suppress(Exception):  # of an unknown type, or of none
        chosen = _get_classes(config=dict(nested))[0].__module__
        parts = {chosen, module.__name__} if chosen in parts else parts
    return "".join(inspect.getsource(sys.modules[name]) for name in sorted(parts))


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model was made for and computes as its publisher's does; None when its config does not say."""
    most = own_limit(config) or math.inf
    for place in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
            if isinstance(place.get(name), int):
                return int(min(place[name], most))
    return None if most == math.inf else int(most)


def own_limit(config: Mapping[str, Any]) -> int | None:
    """Tokens up to which a completed config says that mlx-lm computes the publisher's text; None: all."""
    limit: int | None = (config.get("llmcad") or {}).get(_MOST_CONTEXT)
    return limit


def correct_rope(model: Module, config: Mapping[str, Any], folder: Path) -> None:
    """Set right in a model just built from a completed config what mlx-lm does not heed of scaled rotation.

    Raises ModelError where it heeds nothing of it: all rotations are plain ones.

    Formulas: transformers' `_compute_yarn_parameters`, where `truncate` false leaves the corrected range as it is,
    `attention_factor` is what queries and keys are multiplied with, and `mscale` counts only beside
    `mscale_all_dim`; and `_compute_longrope_parameters`, for sequences up to `original_max_position_embeddings`,
    beyond which `completed` lets no context go.
    """
    part: Mapping[str, Any] = config.get("text_config") or {}
    part = part if _rope_settings(part) else config
    settings = _rope_settings(part)
    kind, ropes = _rope_kind(settings), [module for module in model.modules() if isinstance(module, RoPE)]
    if kind not in _PLAIN and settings.get("factor") != 1 and ropes and not _has_scaled_rope(model):
        raise _not_heeded(folder, config, "rope_type", kind)
    if kind == "yarn" and not any(isinstance(module, YarnRoPE) for module in model.modules()):  # deepseek_v2's own
        for name, differs in (("truncate", settings.get("truncate") is False), ("mscale", _yarn_scale(settings))):
            if differs:
                raise _not_heeded(folder, config, name, settings.get(name))
    for module in model.modules() if kind in ("yarn", *_LONGROPE) else ():
        if isinstance(module, SuScaledRoPE):
            long, short = (mx.array(settings.get(name, 1.0)) for name in ("long_factor", "short_factor"))
            module._freqs = module._freqs / long * short
            module._scale = _longrope_scale(settings, part)
        elif isinstance(module, YarnRoPE):
            if settings.get("truncate") is False:
                base = settings.get("rope_theta", part.get("rope_theta"))
                module._freqs = _untruncated_yarn(module.dims, base, settings, part)
            if (scale := _yarn_scale(settings)) is not None:
                module.mscale = scale


def _has_scaled_rope(model: Module) -> bool:
    names = ("rope", "rotary")
    return any(
        module.scale != 1
        if isinstance(module, RoPE)
        else any(name in type(module).__name__.lower() for name in names)
        for module in model.modules()
    )


def _rope_settings(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return _full_attention(part.get("rope_scaling") or part.get("rope_parameters") or {})


def _trained_context(settings: Mapping[str, Any], part: Mapping[str, Any]) -> Any:
    """Positions that a model with longrope was trained with before its context was extended."""
    name = "original_max_position_embeddings"
    return settings.get(name) or part.get(name) or part.get("max_position_embeddings")


def _longrope_scale(settings: Mapping[str, Any], part: Mapping[str, Any]) -> float:
    context = _trained_context(settings, part)
    scale = settings.get("attention_factor")
    if part.get("model_type") == "phimoe":
        scale = settings.get("short_mscale", scale)
    if scale is None:
        factor = settings.get("factor") or part.get("max_position_embeddings", context) / context
        scale = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return float(scale)


def _yarn_scale(settings: Mapping[str, Any]) -> float | None:
    """None where mlx-lm computes the same."""
    scale: float | None = settings.get("attention_factor")
    if scale is None and bool(settings.get("mscale")) != bool(settings.get("mscale_all_dim")):
        scale = 0.1 * math.log(max(settings["factor"], 1)) + 1
    return scale


def _untruncated_yarn(dims: int, base: float, settings: Mapping[str, Any], part: Mapping[str, Any]) -> mx.array:
    """(dims / 2,) float32: a radian takes so many positions."""
    context = settings.get("original_max_position_embeddings") or part["max_position_embeddings"]
    rotations = (settings.get("beta_fast") or 32, settings.get("beta_slow") or 1)
    low, high = (dims * math.log(context / (number * 2 * math.pi)) / (2 * math.log(base)) for number in rotations)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = mx.clip((mx.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
    periods = base ** (mx.arange(0, dims, 2) / dims)
    return 1 / (ramp / (settings["factor"] * periods) + (1 - ramp) / periods)


def _reference(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config; the config itself where it does not know the model type or refuses."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return dict(CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config))).to_dict())
    except Exception:  # its checks are of many kinds, and what it does not take mlx-lm may
        return dict(config)
    finally:
        logging.set_verbosity(verbosity)


def _under_other_names(config: Mapping[str, Any], wanted: Container[str] | None = None) -> dict[str, Any]:
    """What a config says under one of two names that transformers takes for the same, by the other one; of the
    names in `wanted`, or of all."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    pairs = CONFIG_MAPPING[kind].attribute_map.items() if kind in CONFIG_MAPPING else ()
    found: dict[str, Any] = {}
    for one, other in [*pairs, *((new, old) for old, new in pairs), ("n_ctx", "n_positions")]:
        value = config.get(other)
        if value is not None and config.get(one) is None and (wanted is None or one in wanted):
            found[one] = value
    return found


def _readable(reference: Mapping[str, Any]) -> dict[str, Any]:
    """`reference` with what is in `rope_parameters` under the names it had before, which mlx-lm looks for."""
    values = dict(reference)
    parameters = reference.get("rope_parameters") or {}
    full, local = _full_attention(parameters), parameters.get("sliding_attention") or {}
    for name in ("rope_local_base_freq", "swa_rope_theta"):
        values[name] = values.get(name) or local.get("rope_theta")
    for old, name in _ROPE_NAMES:
        values[old] = full.get(name) if values.get(old) is None else values[old]
    if values.get("rope_scaling") is None and (kind := _rope_kind(full)) != "default":
        values["rope_scaling"] = {**full, "type": kind, "rope_type": kind}
    return values


def _full_attention(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of settings by kind of layer those of layers that see everything; others as they are."""
    of_full = parameters.get("full_attention", parameters)
    return of_full if isinstance(of_full, Mapping) else {}


def _rope_kind(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def _tie(
    found: dict[str, Any], stated_in: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], has_head: bool
) -> None:
    """Whether the head is the embedding: as configs state, else as the weights and transformers say."""
    found.pop("tie_word_embeddings", None)
    stated = [place["tie_word_embeddings"] for place in stated_in if place.get("tie_word_embeddings") is not None]
    if stated:
        found["tie_word_embeddings"] = stated[0]
    elif has_head or reference.get("tie_word_embeddings"):
        found["tie_word_embeddings"] = bool(reference.get("tie_word_embeddings"))


def _keep_window(
    found: dict[str, Any],
    part: Mapping[str, Any],
    reference: Mapping[str, Any],
    usual: Mapping[str, Any],
    source: str,
) -> None:
    """Limit the context of the config `found` to a window in `part` of it that mlx-lm does not heed."""
    window, kinds = reference.get("sliding_window"), reference.get("layer_types")
    if "sliding_window" not in usual:  # another model's field
        return
    if not isinstance(window, int) or window < 1 or reference.get("use_sliding_window") is False:
        return
    is_heeded = "sliding_window" in source
    if kinds is None:  # all layers have it
        is_heeded = is_heeded and part.get("model_type") not in _ALL_SLIDING
    if not is_heeded and (kinds is None or "sliding_attention" in kinds):
        _limit_context(found, window)


def _keep_short_factors(found: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Limit the context to where one set of factors of longrope ends: mlx-lm has but one for all lengths."""
    settings = _rope_settings(part)
    if _rope_kind(settings) not in _LONGROPE:
        return
    context = _trained_context(settings, part)
    differ = any(settings.get(f"short_{name}") != settings.get(f"long_{name}") for name in ("factor", "mscale"))
    if differ and isinstance(context, int):
        _limit_context(found, context)


def _limit_context(found: dict[str, Any], most: int) -> None:
    found["llmcad"] = {**(found.get("llmcad") or {}), _MOST_CONTEXT: min(most, own_limit(found) or most)}


def _ignored(
    config: Mapping[str, Any],
    found: Mapping[str, Any],
    reference: Mapping[str, Any],
    usual: Mapping[str, Any],
    source: str,
    args: Any = None,
) -> Iterator[tuple[str, Any]]:
    """Fields that change what is computed, and are not heeded, with their values. args: mlx-lm's class for it."""
    for name in (*_ACTIVATIONS, *_MUST_HEED):
        value = config.get(name)
        if value is None or name in source or name not in usual:
            continue
        if _SAME_ACTIVATION.get(value, value) != _SAME_ACTIVATION.get(usual[name], usual[name]):
            yield name, value
    parameters = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if "rope_parameters" in source:
        return
    by_kind = reference.get("rope_parameters") or parameters  # transformers takes one setting for one kind alone
    base = (by_kind.get("sliding_attention") or {}).get("rope_theta")
    heeds = "rope_local_base_freq" in source or "swa_rope_theta" in source
    if base not in (None, _full_attention(by_kind).get("rope_theta")) and not heeds:
        yield "rope_theta of layers with a window", base
    kind = _rope_kind(_full_attention(parameters))
    if kind in _PLAIN:
        return
    is_heeded = "rope_scaling" in source
    if args is not None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # phi3 says there that it does not heed it
                is_heeded = bool(getattr(args.from_dict(copy.deepcopy(dict(found))), "rope_scaling", None))
        except Exception:  # told when the model is built
            return
    if not is_heeded:
        yield "rope_type", kind
