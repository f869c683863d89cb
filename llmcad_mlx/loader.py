"""From names to a loaded pair: find the folders, plan memory, load both models, compare their tokens."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from llmcad_mlx.drafting.drafter import Drafter
from llmcad_mlx.drafting.model_drafter import ModelDrafter
from llmcad_mlx.drafting.ngram_drafter import NgramDrafter
from llmcad_mlx.drafting.vocabulary import check_same_tokens
from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.machine import resident_bytes, this_machine
from llmcad_mlx.models.host import prepare_for_host
from llmcad_mlx.models.loading import LoadedModel, load_model_folder
from llmcad_mlx.models.probe import probe
from llmcad_mlx.models.probe_cache import cached_probe
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.profile import PairProfile, profile_path
from llmcad_mlx.sources.cache_folder import home_folder
from llmcad_mlx.sources.resolve import DEFAULT_PRESET, resolve_draft, resolve_target
from llmcad_mlx.target.assembly import Prepared, kv_bytes_per_token
from llmcad_mlx.target.plan import MemoryPlan, default_budget, make_plan
from llmcad_mlx.target.resident import ResidentTarget
from llmcad_mlx.target.storage import FileStorage, Storage, ThrottledStorage

NGRAM_DRAFT = "ngram"
NO_DRAFT = "none"
AUTO_DRAFT = "auto"

DEFAULT_CONTEXT = 4096  # tokens a plan makes room for
MIN_CONTEXT = 1024  # what it makes room for where memory is short and nobody asked for more
RESIDENT_MAX_NODES = 64
STREAMED_MAX_NODES = 256
_MLX_CACHE_BYTES = 16 << 20  # freed memory that MLX may keep under a budget


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """How much memory a pair may use, and how its target is read.

    memory: bytes for the whole process; None: no limit as long as the models fit into 70 % of physical memory.
    pinned: bytes of the target's weights that stay in memory; None: as much as fits. context: tokens to make room
    for. read_bandwidth: bytes per second, to emulate slower storage. verify: check a bundle's weights against
    their checksums on every read.
    """

    memory: int | None = None
    pinned: int | None = None
    context: int | None = None
    read_bandwidth: float | None = None
    verify: bool = False

    @property
    def asks_for_streaming(self) -> bool:
        """Whether anything was given that only a memory plan can heed."""
        return self != MemoryOptions()


@dataclass(slots=True)
class LoadedPair:
    """A target, its drafters and what belongs to them."""

    target: ResidentTarget
    drafters: list[Drafter]
    tokenizer: Any
    """mlx-lm's TokenizerWrapper."""
    vocab_size: int
    """Number of real tokens; logits may have more columns."""
    context_length: int | None
    profile: PairProfile
    target_path: Path
    draft_name: str
    options: MemoryOptions = MemoryOptions()
    plan: MemoryPlan | None = None
    """None: all weights are in memory and no budget was set."""
    clock: Callable[[], float] = field(default=time.perf_counter)

    @property
    def max_nodes(self) -> int:
        """Most nodes of a tree."""
        return self.plan.max_nodes if self.plan is not None else RESIDENT_MAX_NODES

    def release(self) -> None:
        """Drop models and caches."""
        self.drafters = []
        self.target.close()
        del self.target


def load_pair(
    target: str | None, draft: str | None, show_progress: bool, options: MemoryOptions | None = None
) -> LoadedPair:
    """Resolve, load and check. See `api.load` for the arguments and errors."""
    target_name = DEFAULT_PRESET if target is None else target
    target_path = resolve_target(target_name, show_progress)
    draft_name = _draft_name(draft, target_name)
    draft_path = None if draft_name in (NO_DRAFT, NGRAM_DRAFT) else resolve_draft(draft_name, show_progress)
    options = options or MemoryOptions()
    budget = options.memory or _default_budget(target_path, draft_path)
    if budget is None and not options.asks_for_streaming:
        loaded, model = load_tree_model(target_path)
        vocab_size = _real_tokens(loaded, model)
        drafters = _drafters(draft_name, draft_path, loaded, model, vocab_size)
        built, plan = ResidentTarget(model, vocab_size), None
    else:
        mx.set_cache_limit(_MLX_CACHE_BYTES)
        storage = FileStorage()
        loaded = load_model_folder(target_path, lazy=True)
        prepared = Prepared(loaded, storage, _probe_folder())
        model = prepared.model
        vocab_size = _real_tokens(loaded, model)
        drafters = _drafters(draft_name, draft_path, loaded, model, vocab_size)
        plan = _plan(prepared, drafters, budget, options)
        built = prepared.build(plan, vocab_size, _throttled(options))
    context = model.context_length
    if plan is not None:
        context = min(plan.context, context or plan.context)
    return LoadedPair(
        target=built,
        drafters=drafters,
        tokenizer=loaded.tokenizer,
        vocab_size=vocab_size,
        context_length=context,
        profile=PairProfile(_profile_path(target_path, draft_path or draft_name, plan, options)),
        target_path=target_path,
        draft_name=draft_name,
        options=options,
        plan=plan,
    )


def _drafters(
    name: str, path: Path | None, target: LoadedModel, model: TreeModel, vocab_size: int
) -> list[Drafter]:
    if name == NO_DRAFT or model.capability == "plain":
        return []
    drafters: list[Drafter] = [NgramDrafter()]
    if path is not None:
        drafters.append(_load_drafter(path, target, vocab_size))
    return drafters


def _default_budget(target: Path, draft: Path | None) -> int | None:
    """None where both models fit into memory, else what they may use of it."""
    files = [
        file for folder in (target, draft) if folder is not None for file in folder.glob("model*.safetensors")
    ]
    physical = this_machine().memory_bytes
    return None if physical is None else default_budget(sum(file.stat().st_size for file in files), physical)


def _plan(
    prepared: Prepared, drafters: Sequence[Drafter], budget: int | None, options: MemoryOptions
) -> MemoryPlan:
    """Measure what is taken already, and plan the rest."""
    sizes = prepared.sizes
    context = options.context or min(DEFAULT_CONTEXT, prepared.model.context_length or DEFAULT_CONTEXT)
    models = [drafter.model for drafter in drafters if isinstance(drafter, ModelDrafter)]
    weights = sum(model.weight_bytes for model in models)
    release_free_memory()
    return make_plan(
        sizes,
        budget=budget,
        pinned=options.pinned,
        context=context,
        min_context=None if options.context else min(context, MIN_CONTEXT),
        max_nodes=STREAMED_MAX_NODES,
        runtime_bytes=max(resident_bytes() - weights - sizes.resident_bytes, 0),
        draft_bytes=weights,
        draft_kv_bytes_per_token=sum(kv_bytes_per_token(model) for model in models),
    )


def _throttled(options: MemoryOptions) -> Callable[[Storage], Storage]:
    rate = options.read_bandwidth
    return (lambda storage: storage) if rate is None else (lambda storage: ThrottledStorage(storage, rate))


def _profile_path(target: Path, draft: Path | str, plan: MemoryPlan | None, options: MemoryOptions) -> Path:
    """Step times depend on what is streamed and how fast, so each way of running has a profile of its own."""
    way = () if plan is None else (f"{plan.streamed_bytes} streamed", f"{options.read_bandwidth} bytes/s")
    return profile_path(home_folder(), [target.resolve(), draft, *way], device_name())


def _probe_folder() -> Path:
    return home_folder() / "probes"


def release_free_memory() -> None:
    """Give memory that is free inside the process back to the system."""
    gc.collect()
    mx.clear_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def load_tree_model(path: Path, like: LoadedModel | None = None) -> tuple[LoadedModel, TreeModel]:
    """Load one folder and find out what the model can do. like: see `load_model_folder`."""
    loaded = load_model_folder(path, like=like)
    prepare_for_host(loaded.model)
    report = cached_probe(loaded.model, loaded.config, _probe_folder(), probe)
    return loaded, TreeModel(loaded.model, loaded.config, report)


def device_name() -> str:
    """What computes, for people: "Apple M3 Pro (gpu)", "cpu"."""
    device = mx.default_device()
    if device == mx.cpu:
        return "cpu"
    info = mx.device_info()
    return f"{info.get('device_name', 'gpu')} (gpu)"


def _draft_name(draft: str | None, target_name: str) -> str:
    from llmcad_mlx.sources.resolve import preset_draft

    if draft is None:
        return NO_DRAFT
    if not isinstance(draft, str) or not draft:
        raise UsageError(f"draft: {draft!r} is not a folder, repository, preset, 'ngram' or 'none'")
    return preset_draft(target_name) if draft == AUTO_DRAFT else draft


def _load_drafter(path: Path, target: LoadedModel, vocab_size: int) -> ModelDrafter:
    loaded, model = load_tree_model(path, like=target)
    check_same_tokens(target.tokenizer.get_vocab(), loaded.tokenizer.get_vocab())
    if model.vocab_size < vocab_size:
        raise ModelError(
            f"{path}: the draft has {model.vocab_size} logits for {vocab_size} tokens; choose another draft"
        )
    first = model.forward([0], model.new_cache()).logits
    if not bool(mx.all(mx.isfinite(first)).item()):  # the probe's report may stem from other weights
        raise ModelError(
            f"{path}: cannot be used as a draft: its logits are not finite; choose another draft or 'ngram'"
        )
    try:
        return ModelDrafter(model)
    except ValueError as error:
        raise ModelError(f"{path}: cannot be used as a draft: {error}; choose another draft or 'ngram'") from None


def _real_tokens(loaded: LoadedModel, model: TreeModel) -> int:
    """Ids beyond the largest the tokenizer knows are padding."""
    ids: Sequence[int] = list(loaded.tokenizer.get_vocab().values())
    largest = max(ids, default=-1)
    if largest < 0:
        raise ModelError(f"{loaded.path}: the tokenizer has no tokens; download the folder again")
    return min(largest + 1, model.vocab_size)
