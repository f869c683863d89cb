"""A plan for models whose weights are not on this machine: what config.json says of their sizes.

mlx-lm's own model is built from the configuration and quantised as that says; as MLX is lazy, none of its weights
is ever computed. What cannot be known that way is left out: how fast anything is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.errors import ModelError, first_line
from llmcad_mlx.files import user_path
from llmcad_mlx.files.safetensors import DTYPES, TensorExtent, dtype_name, read_weights
from llmcad_mlx.loader import DEFAULT_CONTEXT, MIN_CONTEXT, release_free_memory
from llmcad_mlx.machine import physical_memory_bytes, resident_bytes
from llmcad_mlx.memory import MemoryNeeds, MemoryPlan, ModelSizes, default_budget, make_plan
from llmcad_mlx.models.config import completed, context_length
from llmcad_mlx.models.folder import LINEARS, LoadedModel, shares_embedding
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.copies import GROUP_SIZE, DerivedDraft
from llmcad_mlx.store.names import NO_DRAFT, PairPaths, local_folder, published_config
from llmcad_mlx.store.presets import NGRAM
from llmcad_mlx.streaming.build import sizes_of
from llmcad_mlx.streaming.stream import Read
from llmcad_mlx.streaming.weights import StreamParts

_TOKENIZER_BYTES = 750  # a token: 570 with a vocabulary of 49,000, 750 with one of 152,000
_LOADING_BYTES = 128 << 20  # what the process has more once a model is loaded; 130 MB measured on Linux
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_HEAD = ("lm_head",)  # there is one, where the config does not say otherwise


@dataclass(frozen=True, slots=True)
class SketchedPair:
    """A pair with its memory plan, estimated; nothing of it need be on this machine."""

    names: PairPaths
    options: MemoryOptions
    needs: MemoryNeeds
    plan: MemoryPlan
    reads: ClassVar[tuple[Read, ...]] = ()
    estimated: ClassVar[bool] = True


def sketch_pair(target: str, draft: str, options: MemoryOptions) -> SketchedPair:
    """Plan from the configurations of a target and of a draft that is not "auto".

    Raises BudgetError, ModelError for a configuration that describes no model, and DownloadError.
    """
    config = published_config(target, "target")
    model = _Sketch.of(config, target)
    draft_bytes, draft_kv_bytes = _draft_needs(draft, config)
    most = model.context_length or DEFAULT_CONTEXT
    context = options.context or min(DEFAULT_CONTEXT, most)
    release_free_memory()
    needs = MemoryNeeds(
        model.sizes,
        context=context,
        min_context=context if options.context else min(context, MIN_CONTEXT),
        runtime_bytes=resident_bytes() + _LOADING_BYTES + model.sizes.logit_columns * _TOKENIZER_BYTES,
        draft_bytes=draft_bytes,
        draft_kv_bytes_per_token=draft_kv_bytes,
    )
    budget = options.memory or default_budget(model.num_bytes + draft_bytes, physical_memory_bytes())
    names = PairPaths(user_path(target), draft, None, target)
    return SketchedPair(names, options, needs, make_plan(needs, budget, options.pinned))


@dataclass(frozen=True, slots=True)
class _Sketch:
    sizes: ModelSizes
    num_bytes: int
    context_length: int | None

    @classmethod
    def of(cls, published: Mapping[str, Any], name: str) -> _Sketch:
        """Raises ModelError, beginning with `name`, where mlx-lm has no such model."""
        config = completed(Path(name), published, _HEAD)
        try:
            model_class, args_class = _get_classes(config=config)
            model = model_class(args_class.from_dict(config))
            is_tied = any(place.get("tie_word_embeddings") for place in _places(config))
            if is_tied and isinstance(model.get("lm_head"), LINEARS):
                del model["lm_head"]  # some models drop it only when they meet the weights
            model.set_dtype(_dtype(config, user_path(name)))
            _quantise(model, config)
            kv_bytes = _kv_bytes_per_token(model)
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
        return cls(sizes_of(parts, kv_bytes, columns), num_bytes, context_length(config))


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


def _kv_bytes_per_token(model: Any) -> int:
    """From the shapes of the caches after one token, which nobody computes."""
    cache = make_prompt_cache(model)
    model(mx.array([[0]]), cache=cache)
    arrays = [array for part in cache for array in (getattr(part, "keys", None), getattr(part, "values", None))]
    shapes = [(array.nbytes // array.shape[2], array.itemsize) for array in arrays if isinstance(array, mx.array)]
    widened = cpu_kernels_wanted()  # which keep keys and values in float32
    return sum(num_bytes * 4 // itemsize if widened else num_bytes for num_bytes, itemsize in shapes)


def _draft_needs(name: str, target: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of a draft's weights, and of one token's keys and values."""
    if name in (NO_DRAFT, NGRAM):
        return 0, 0
    bits = tokens = None
    source: str | None = name
    while source is not None and (derived := DerivedDraft.parse(source)) is not None:
        bits, tokens, source = bits or derived.bits, tokens or derived.tokens, derived.source
    config = dict(target if source is None else published_config(source, "draft"))
    if bits is not None:
        config.pop("quantization_config", None)
        config["quantization"] = {"bits": bits, "group_size": GROUP_SIZE}
    draft = _Sketch.of(config, name)
    sizes, num_bytes = draft.sizes, draft.num_bytes
    folder = None if source is None else local_folder(source, "draft")
    if bits is tokens is None and folder is not None and (files := [*folder.glob("model*.safetensors")]):
        return sum(file.stat().st_size for file in files), sizes.kv_bytes_per_token
    if shares_embedding(config):
        num_bytes -= sizes.embedding_bytes
    if tokens is not None:
        kept = sizes.matrix_bytes * tokens // max(sizes.logit_columns, 1)
        num_bytes += kept if sizes.tied else kept - sizes.head_bytes
    return num_bytes, sizes.kv_bytes_per_token
