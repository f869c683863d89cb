"""A folder's config.json as its publisher's own code reads it.

mlx-lm takes what a config.json leaves out from defaults of its own, and looks for some fields where older versions
of transformers wrote them: a rotary base that is now inside `rope_parameters` silently becomes another one.
transformers' class for the model type is the reference: what it finds in the file, and its defaults, are filled in
where mlx-lm has a field of the same meaning. What mlx-lm would ignore although it changes the computation is
refused; a window that it ignores limits the context, for up to there both compute the same.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_lm.utils import _get_classes

from llmcad_mlx.errors import ModelError

_MOST_CONTEXT = "max_context"
"""Under "llmcad" in a config: tokens up to which the model computes what its publisher's does."""

# Not filled in: mlx-lm and transformers name kinds of layers differently; the weights have a say in the other.
_NOT_FILLED_IN = {"layers_block_type", "tie_word_embeddings"}
_MOVED = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rope_parameters"}
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "mamba_hidden_act")
_SAME_ACTIVATION = {"swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu"}
_MUST_HEED = (
    "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights", "moe_apply_router_weight_on_input", "swiglu_alpha", "swiglu_limit",
    "norm_topk_prob", "router_jitter_noise",
)  # fmt: skip
_ALL_SLIDING = ("mistral", "ministral3")  # mlx-lm can have windows in some of their layers, not in all


def completed(folder: Path, config: Mapping[str, Any], weights: Iterable[str]) -> dict[str, Any]:
    """`config`, of the model in `folder`, with what its publisher's code would find in it.

    weights: the names of the tensors in the files. Raises ModelError for a field that mlx-lm would ignore.
    """
    found = dict(config)
    try:
        args = _get_classes(config=found)[1]
    except (Exception, SystemExit):  # told when the model is built
        return found
    parameters = inspect.signature(args).parameters
    known = set(parameters)
    # What every config of the kind must say is missed where it does not; only rotary settings have moved.
    optional = {name for name in known if parameters[name].default is not inspect.Parameter.empty} | _MOVED
    source = inspect.getsource(importlib.import_module(args.__module__))
    reference, usual = _reference(config), _reference({"model_type": config["model_type"]})
    for name, value in _readable(reference).items():
        if name in known & optional - _NOT_FILLED_IN and found.get(name) is None and value is not None:
            found[name] = value
    _tie(found, config, reference, known, any("lm_head" in name for name in weights))
    if "sliding_window" in usual:  # else another model's field
        _keep_window(found, reference, "sliding_window" in source)
    nested, full = config.get("text_config"), reference.get("text_config")
    if isinstance(nested, Mapping) and isinstance(full, Mapping):
        missing = {name: value for name, value in _readable(full).items() if nested.get(name) is None}
        found["text_config"] = dict(nested) | {name: value for name, value in missing.items() if value is not None}
    for field, value in _ignored(config, found, usual, args, source):
        raise ModelError(
            f"{folder / 'config.json'}: {field} is {value!r}, which mlx-lm does not heed for "
            f"{config['model_type']!r}: its text would be another one; choose another model"
        )
    return found


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model was made for and computes as its publisher's does; None when its config does not say."""
    most = (config.get("llmcad") or {}).get(_MOST_CONTEXT, math.inf)
    for place in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
            if isinstance(place.get(name), int):
                return int(min(place[name], most))
    return None if most == math.inf else int(most)


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


def _readable(reference: Mapping[str, Any]) -> dict[str, Any]:
    """`reference` with what is in `rope_parameters` under the names it had before, which mlx-lm looks for."""
    values = dict(reference)
    parameters = reference.get("rope_parameters") or {}
    full, local = parameters.get("full_attention", parameters), parameters.get("sliding_attention") or {}
    values["rope_local_base_freq"] = values.get("rope_local_base_freq") or local.get("rope_theta")
    for name in ("rope_theta", "partial_rotary_factor"):
        values[name] = full.get(name) if values.get(name) is None else values[name]
    if values.get("rope_scaling") is None and (kind := _rope_kind(full)) != "default":
        values["rope_scaling"] = {**full, "type": kind, "rope_type": kind}
    return values


def _rope_kind(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def _tie(
    found: dict[str, Any],
    config: Mapping[str, Any],
    reference: Mapping[str, Any],
    known: set[str],
    has_head: bool,
) -> None:
    """Where the config does not say whether the head is the embedding, the weights and transformers do."""
    if "tie_word_embeddings" not in known or config.get("tie_word_embeddings") is not None:
        return
    found.pop("tie_word_embeddings", None)
    if has_head:
        found["tie_word_embeddings"] = bool(reference.get("tie_word_embeddings"))
    elif reference.get("tie_word_embeddings"):
        found["tie_word_embeddings"] = True


def _keep_window(found: dict[str, Any], reference: Mapping[str, Any], is_heeded: bool) -> None:
    """Limit the context to a window that mlx-lm does not heed."""
    window, kinds = reference.get("sliding_window"), reference.get("layer_types")
    if not isinstance(window, int) or window < 1 or reference.get("use_sliding_window") is False:
        return
    if kinds is None:  # all layers have it
        is_heeded = is_heeded and found["model_type"] not in _ALL_SLIDING
    if not is_heeded and (kinds is None or "sliding_attention" in kinds):
        found["llmcad"] = {**(found.get("llmcad") or {}), _MOST_CONTEXT: window}


def _ignored(
    config: Mapping[str, Any], found: Mapping[str, Any], usual: Mapping[str, Any], args: Any, source: str
) -> Iterator[tuple[str, Any]]:
    """Fields that change what is computed, and are not heeded, with their values."""
    for name in (*_ACTIVATIONS, *_MUST_HEED):
        value = config.get(name)
        if value is None or name in source or name not in usual:
            continue
        if _SAME_ACTIVATION.get(value, value) != _SAME_ACTIVATION.get(usual[name], usual[name]):
            yield name, value
    parameters = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = _rope_kind(parameters.get("full_attention", parameters))
    if kind in ("default", "mrope") or "rope_parameters" in source:
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # phi3 says there that it does not heed it
            is_heeded = bool(getattr(args.from_dict(dict(found)), "rope_scaling", None))
    except Exception:  # told when the model is built
        return
    if not is_heeded:
        yield "rope_type", kind
