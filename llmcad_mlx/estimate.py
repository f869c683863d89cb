"""What models need of memory, from their configurations and files, before anything of them is loaded.

mlx-lm's own model is built from the configuration and quantised as that says; as MLX is lazy, none of its weights
is ever computed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.utils import _get_classes

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.errors import ModelError, first_line
from llmcad_mlx.files import user_path
from llmcad_mlx.files.safetensors import DTYPES, TensorExtent, dtype_name, read_weights
from llmcad_mlx.machine import memory_of_process
from llmcad_mlx.memory import MemoryNeeds, ModelSizes, TokenBytes
from llmcad_mlx.models.config import completed, context_length
from llmcad_mlx.models.folder import LINEARS, LoadedModel, read_config, shares_embedding
from llmcad_mlx.models.tokenizer import tokenizer_loading_bytes
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.copies import GROUP_SIZE, DerivedDraft
from llmcad_mlx.store.names import NO_DRAFT, TABLE_SUFFIX, local_folder, published_config
from llmcad_mlx.store.presets import NGRAM
from llmcad_mlx.streaming.build import TokenState, attention_of, sizes_of
from llmcad_mlx.streaming.weights import StreamParts

DEFAULT_CONTEXT = 4096  # tokens a plan makes room for
MIN_CONTEXT = 1024  # what it makes room for where memory is short and nobody asked for more
_TOKENIZER_BYTES = 400  # a token, in memory: 380 with a vocabulary of 262,000
_TOKENIZER_LOADING_BYTES = 1400  # a token
_KERNEL_BYTES = 128 << 20  # what the process has more once the first model is loaded; 130 MB measured on Linux
_MODULES_BYTES = 8 << 20  # a model without weights, and modules that are imported for it
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_HEAD = ("lm_head",)  # there is one, where the config does not say otherwise


def context_room(options: MemoryOptions, longest: int | None) -> tuple[int, int]:
    """Tokens to make room for, and how many at least. longest: the model's own context."""
    context = options.context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    return context, context if options.context else min(context, MIN_CONTEXT)


def estimate_needs(
    target: ModelEstimate, draft: DraftEstimate, options: MemoryOptions, folder: Path | None = None
) -> MemoryNeeds:
    """What a pair needs. folder: the target's, where it is here."""
    now, num_tokens = memory_of_process().now, target.sizes.logit_columns
    kernels = 0 if "numba" in sys.modules else _KERNEL_BYTES
    context, min_context = context_room(options, target.context_length)
    loading = num_tokens * _TOKENIZER_LOADING_BYTES if folder is None else tokenizer_loading_bytes(folder)
    return MemoryNeeds(
        target.sizes,
        context=context,
        min_context=min_context,
        runtime_bytes=now + kernels + num_tokens * _TOKENIZER_BYTES + options.reserved,
        draft_bytes=draft.num_bytes,
        draft_kv_bytes_per_token=draft.kv_bytes_per_token,
        loading_bytes=now + _MODULES_BYTES + loading,
    )


@dataclass(frozen=True, slots=True)
class ModelEstimate:
    """A model's sizes by its configuration."""

    sizes: ModelSizes
    num_bytes: int
    context_length: int | None

    @classmethod
    def of(cls, published: Mapping[str, Any], name: str) -> ModelEstimate:
        """Raises ModelError, beginning with `name`, where mlx-lm has no such model."""
        config = completed(Path(name), published, _HEAD)
        try:
            model_class, args_class = _get_classes(config=config)
            model = model_class(args_class.from_dict(config))
            is_tied = any(place.get("tie_word_embeddings") for place in _places(config))
            if is_tied and isinstance(model.get("lm_head"), LINEARS):
                del model["lm_head"]  # some models drop it only when they meet the weights, and note it (gemma3)
                if hasattr(model, "tie_word_embeddings"):
                    model.tie_word_embeddings = True
            model.set_dtype(_dtype(config, user_path(name)))
            _quantise(model, config)
            state = _token_state(model, config)
        except (Exception, SystemExit) as error:  # model files raise anything when a config is not theirs
            raise ModelError(
                f"{name}: config.json does not describe a {config['model_type']!r} model that mlx-lm knows "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        leaves: Any = tree_flatten(model.parameters())
        weights = {
            path: TensorExtent(path, Path(), 0, array.nbytes, dtype_name(array.dtype), tuple(array.shape))
            for path, array in leaves
        }
        parts = StreamParts.of(LoadedModel(model, None, config, Path(name), weights, frozenset(weights)))
        columns = parts.head_matrix.num_rows if parts.head_matrix else 0
        num_bytes = sum(array.nbytes for _, array in leaves)
        return cls(sizes_of(parts, state, columns), num_bytes, context_length(config))


def _places(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Where a configuration says something of its language model."""
    return config, config.get("text_config") or {}


def _dtype(config: Mapping[str, Any], folder: Path) -> mx.Dtype:
    """What the configuration says, else that of weights in `folder`, else what most models have."""
    names = [str(place.get("torch_dtype") or place.get("dtype")) for place in _places(config)]
    found = [_DTYPES[name] for name in names if name in _DTYPES]
    if not found and any(folder.glob("model*.safetensors")):
        stored = [DTYPES[extent.dtype].mlx for extent in read_weights(folder).values()]
        found = [dtype for dtype in stored if dtype is not None and dtype in _DTYPES.values()]
    return found[0] if found else mx.bfloat16


def _quantise(model: Module, config: Mapping[str, Any]) -> None:
    """Give the model the quantisation that its configuration states, by path where it does so."""
    stated = config.get("quantization") or config.get("quantization_config") or {}
    bits, group_size = stated.get("bits"), stated.get("group_size")
    if not (isinstance(bits, int) and isinstance(group_size, int)):
        return

    def how(path: str, module: Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        own = stated.get(path, True)
        size = own.get("group_size", group_size) if isinstance(own, dict) else group_size
        weight: Any = module["weight"]
        return bool(own) and weight.shape[-1] % size == 0 and own

    mode = stated.get("mode", "affine")
    quantize(model, group_size, bits, mode=mode, class_predicate=how)


def _token_state(model: Any, config: Mapping[str, Any]) -> TokenState:
    """From the shapes of the caches after one token, which nobody computes."""
    cache = make_prompt_cache(model)
    model(mx.array([[0]]), cache=cache)
    layers: list[tuple[int | None, int]] = []
    on_kernels = cpu_kernels_wanted()  # they keep keys and values in float32
    for part in cache:
        window = part.max_size if isinstance(part, RotatingKVCache) else None
        for array in (getattr(part, "keys", None), getattr(part, "values", None)):
            if isinstance(array, mx.array):
                size = array.nbytes // array.shape[2]
                layers.append((window, size * 4 // array.itemsize if on_kernels else size))
    attention = attention_of(cache, config)
    if on_kernels and attention is not None:
        attention = replace(attention, itemsize=4)
    return TokenState(TokenBytes.of(layers), attention)


@dataclass(frozen=True, slots=True)
class DraftEstimate:
    """Bytes of a draft's weights, and of one token's keys and values."""

    num_bytes: int = 0
    kv_bytes_per_token: TokenBytes = field(default_factory=TokenBytes)

    @classmethod
    def at(cls, path: Path | None) -> DraftEstimate:
        """Of the table or the model folder at `path`; nothing for None. Raises ModelError."""
        if path is None:
            return cls()
        if not path.is_dir():
            return cls(path.stat().st_size)
        files = (*path.glob("model*.safetensors"), *path.glob(f"*{TABLE_SUFFIX}"))
        sizes = ModelEstimate.of(read_config(path), str(path)).sizes
        return cls(sum(file.stat().st_size for file in files), sizes.kv_bytes_per_token)


def draft_by_name(name: str, target: Mapping[str, Any]) -> DraftEstimate:
    """Of a draft that need not be here, as `--draft` names it. target: the target's configuration."""
    if name in (NO_DRAFT, NGRAM):
        return DraftEstimate()
    bits = tokens = None
    source: str | None = name
    while source is not None and (derived := DerivedDraft.parse(source)) is not None:
        bits, tokens, source = bits or derived.bits, tokens or derived.tokens, derived.source
    config = dict(target if source is None else published_config(source, "draft"))
    if bits is not None:
        config.pop("quantization_config", None)
        config["quantization"] = {"bits": bits, "group_size": GROUP_SIZE}
    draft = ModelEstimate.of(config, name)
    sizes, num_bytes = draft.sizes, draft.num_bytes
    folder = None if source is None else local_folder(source, "draft")
    if bits is tokens is None and folder is not None and (files := [*folder.glob("model*.safetensors")]):
        return DraftEstimate(sum(file.stat().st_size for file in files), sizes.kv_bytes_per_token)
    if shares_embedding(config):
        num_bytes -= sizes.embedding_bytes
    if tokens is not None:
        kept = sizes.matrix_bytes * tokens // max(sizes.logit_columns, 1)
        num_bytes += kept if sizes.tied else kept - sizes.head_bytes
    return DraftEstimate(num_bytes, sizes.kv_bytes_per_token)
