"""From names to a pair that can generate, in phases:

    names     `store.names.find_pair`: which folders, fetched and converted where need be
    prepared  `PreparedTarget`: the target's model, checked; its weights in memory, or yet to be read
    planned   `PlannedPair`: the draft is loaded too, memory is measured and divided up
    built     `LoadedPair`: weights are where the plan wants them, and reading has begun

A target that is wholly in memory needs no plan and goes from prepared to built.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from llmcad_mlx.cpu import prepare_for_device
from llmcad_mlx.drafting import Drafter
from llmcad_mlx.drafting.lookup import NgramDrafter
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.drafting.table import NgramCounts, TableDrafter, vocabulary_hash
from llmcad_mlx.errors import BudgetError, ModelError, UsageError, VocabularyError
from llmcad_mlx.estimate import DraftEstimate, ModelEstimate, context_room, estimate_needs
from llmcad_mlx.files import home_folder
from llmcad_mlx.files.bundle import read_bundle, verify_bundle
from llmcad_mlx.first_run import compile_kernels
from llmcad_mlx.machine import memory_of_process, physical_memory_bytes, trim_heap, working_set_bytes
from llmcad_mlx.memory import (
    LEAST_CACHE,
    MemoryNeeds,
    MemoryPlan,
    TokenBytes,
    default_budget,
    make_plan,
    wired_share,
)
from llmcad_mlx.models.folder import (
    DRAFT_TOKENS,
    LoadedModel,
    check_same_tokens,
    check_token_list,
    load_model_folder,
    read_config,
)
from llmcad_mlx.models.probe import cached_probe, probe
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.policy.best_first import provisional_nodes
from llmcad_mlx.progress import Progress, progress_for
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.names import NO_DRAFT, TABLE_SUFFIX, PairPaths, device_name, find_pair, pair_profile_path
from llmcad_mlx.store.profile import Conditions, PairProfile
from llmcad_mlx.streaming.build import Prepared, token_state
from llmcad_mlx.streaming.stream import Read
from llmcad_mlx.verifying import Target


def load_tree_model(
    path: Path, like: LoadedModel | None = None, alone: bool = False
) -> tuple[LoadedModel, TreeModel]:
    """Load one folder and find out what the model can do. like, alone: see `load_model_folder`."""
    loaded = load_model_folder(path, like=like, alone=alone)
    prepare_for_device(loaded.model)
    report = cached_probe(loaded.model, loaded.config, probe_folder(), probe)
    return loaded, TreeModel(loaded.model, loaded.config, report)


def load_drafters(path: Path | None, target: LoadedModel, model: TreeModel, vocab_size: int) -> list[Drafter]:
    """Who drafts for `model`, which was loaded as `target`, cheapest first: the n-gram drafter, then what is at
    `path`: an n-gram table, or a draft model and the tables in its folder; nobody where no draft can be verified.

    Raises ModelError or VocabularyError for an unfit draft model.
    """
    if model.capability == "plain":
        return []
    drafters: list[Drafter] = [NgramDrafter()]
    if path is not None and path.name.endswith(TABLE_SUFFIX):
        drafters.append(_load_table(path, target))
    elif path is not None:
        drafters += [_load_table(table, target) for table in sorted(path.glob(f"*{TABLE_SUFFIX}"))]
        drafters.append(_load_drafter(path, target, vocab_size))
    return drafters


def _load_table(path: Path, target: LoadedModel) -> TableDrafter:
    counts = NgramCounts.load(path)
    if counts.vocabulary != vocabulary_hash(target.tokenizer.get_vocab()):
        raise VocabularyError(f"{path}: the table was made with other tokens than the target's; make one for it")
    return TableDrafter(counts)


def _load_drafter(path: Path, target: LoadedModel, vocab_size: int) -> ModelDrafter:
    loaded, model = load_tree_model(path, like=target)
    made_for = (loaded.config.get("llmcad") or {}).get("vocabulary")
    if made_for not in (None, vocabulary_hash(target.tokenizer.get_vocab())):
        raise VocabularyError(
            f"{path}: the draft was made for other tokens than the target's; choose another draft"
        )
    check_same_tokens(target.tokenizer.get_vocab(), loaded.tokenizer.get_vocab())
    tokens = loaded.draft_tokens
    if tokens is not None:
        check_token_list(tokens, vocab_size, str(path / DRAFT_TOKENS))  # padding is not proposed either
    elif model.vocab_size < vocab_size:
        raise ModelError(
            f"{path}: the draft has {model.vocab_size} logits for {vocab_size} tokens; choose another draft"
        )
    first = model.forward([0], model.new_cache()).logits
    if not bool(mx.all(mx.isfinite(first)).item()):  # the probe's report may stem from other weights
        raise ModelError(
            f"{path}: cannot be used as a draft: its logits are not finite; choose another draft or 'ngram'"
        )
    try:
        return ModelDrafter(model, vocabulary=tokens)
    except ValueError as error:
        raise ModelError(f"{path}: cannot be used as a draft: {error}; choose another draft or 'ngram'") from None


def real_tokens(loaded: LoadedModel, model: TreeModel) -> int:
    """Ids beyond the largest the tokenizer knows are padding. Raises ModelError for what cannot be a target."""
    if loaded.drafts_only:
        raise ModelError(f"{loaded.path}: can only draft: {loaded.drafts_only}; give it as --draft")
    ids: Sequence[int] = list(loaded.tokenizer.get_vocab().values())
    largest = max(ids, default=-1)
    if largest < 0:
        raise ModelError(f"{loaded.path}: the tokenizer has no tokens; download the folder again")
    return min(largest + 1, model.vocab_size)


def probe_folder() -> Path:
    """Where reports of probes are kept."""
    return home_folder() / "probes"


RESIDENT_MAX_NODES = 64
_DIFFERENCE = 8 << 20  # between the memory of two processes that have done the same


def conditions(options: MemoryOptions) -> Conditions:
    """What a tuned draft is chosen for."""
    return Conditions(device_name(), options.memory, options.pinned, options.read_bandwidth)


@dataclass(slots=True)
class LoadedPair:
    """A target, its drafters and what belongs to them."""

    target: Target
    drafters: list[Drafter]
    tokenizer: Any
    """mlx-lm's TokenizerWrapper."""
    vocab_size: int
    """Number of real tokens; logits may have more columns."""
    context_length: int | None
    profile: PairProfile
    names: PairPaths
    options: MemoryOptions = field(default_factory=MemoryOptions)
    plan: MemoryPlan | None = None
    """None: all weights are in memory and no budget was set."""
    clock: Callable[[], float] = field(default=time.perf_counter)
    limits: MlxLimits | None = None
    """What was set for the plan."""

    @property
    def context_in_words(self) -> str:
        """Whose limit `context_length` is: the model's own, or what the memory plan has made room for."""
        if advice := self.context_advice:
            return f"context of {self.context_length} tokens that the memory plan has room for ({advice})"
        return f"model's context of {self.context_length} tokens"

    @property
    def context_advice(self) -> str:
        """How to get more context; "" where the model has no more."""
        longest = self.target.model.context_length
        if self.plan is None or longest == self.context_length:
            return ""
        at_most = "" if longest is None else f", up to {longest}"
        return f"--context asks for more{at_most}, and more --memory gives more"

    @property
    def max_nodes(self) -> int:
        return self.plan.max_nodes if self.plan is not None else RESIDENT_MAX_NODES

    def release(self) -> None:
        """Drop models and caches."""
        self.drafters = []
        self.target.close()
        del self.target
        if self.limits is not None:
            self.limits.restore()


@dataclass(slots=True)
class MlxLimits:
    """MLX's own limits, which hold for the whole process: what they were before a plan set them."""

    cache_bytes: int
    wired_bytes: int | None = None

    @classmethod
    def while_loading(cls) -> MlxLimits:
        """Keep no more freed memory than any plan allows."""
        return cls(mx.set_cache_limit(LEAST_CACHE))

    def heed(self, plan: MemoryPlan) -> None:
        """Let MLX keep the freed memory that `plan` has room for. On Metal, what is used in each pass stays wired:
        pinned weights, buffers and the draft, and never what the system would have to take from others."""
        mx.set_cache_limit(plan.cache_bytes)
        working_set = working_set_bytes()
        if working_set is not None and plan.budget_bytes is not None:
            used = plan.pinned_bytes + plan.buffer_bytes + plan.draft_bytes + plan.resident_bytes
            self.wired_bytes = mx.set_wired_limit(min(used, wired_share(working_set)))

    def restore(self) -> None:
        mx.set_cache_limit(self.cache_bytes)
        if self.wired_bytes is not None:
            mx.set_wired_limit(self.wired_bytes)


@dataclass(slots=True)
class PreparedTarget:
    """A target's model, for one draft or for many: where it is in memory, their pairs have its cache in common."""

    loaded: LoadedModel
    model: TreeModel
    vocab_size: int
    weights: Prepared | None
    """Large weights that are yet to be read; None: all are in memory."""
    resident: Target | None

    @classmethod
    def in_memory(cls, folder: Path) -> PreparedTarget:
        """Raises ModelError for a folder that cannot be loaded."""
        loaded, model = load_tree_model(folder)
        vocab_size = real_tokens(loaded, model)
        return cls(loaded, model, vocab_size, None, Target(model, vocab_size))

    @classmethod
    def to_be_planned(cls, folder: Path, options: MemoryOptions) -> PreparedTarget:
        """Of the large weights nothing is in memory.

        Raises UsageError when weights without checksums are to be checked, ModelError for a model that cannot be
        streamed, StorageError for altered weights.
        """
        loaded = load_model_folder(folder, lazy=True)
        bundle = read_bundle(loaded.path, loaded.weights) if options.verify else None
        if options.verify and bundle is None:
            raise UsageError(
                f"verify: {loaded.path} has no checksums; make a bundle with "
                f"`llmcad-mlx convert {loaded.path} NEW_FOLDER`"
            )
        weights = Prepared(loaded, probe_folder(), bundle)
        return cls(loaded, weights.model, real_tokens(loaded, weights.model), weights, None)

    def drafters(self, names: PairPaths, options: MemoryOptions) -> list[Drafter]:
        """Load the draft of `names`. Raises ModelError or VocabularyError for an unfit one."""
        if names.draft_name == NO_DRAFT:
            return []
        if options.verify and names.draft_path is not None and names.draft_path.is_dir():
            verify_bundle(names.draft_path)  # where it has checksums
        return load_drafters(names.draft_path, self.loaded, self.model, self.vocab_size)

    def build(self, names: PairPaths) -> LoadedPair:
        """With the draft of `names`, all in memory. Raises the errors of `drafters`."""
        assert self.resident is not None
        options = MemoryOptions()
        return self.pair(names, options, self.resident, self.drafters(names, options))

    def pair(
        self,
        names: PairPaths,
        options: MemoryOptions,
        target: Target,
        drafters: list[Drafter],
        plan: MemoryPlan | None = None,
    ) -> LoadedPair:
        """The record of a pair of which all is where it has to be. target: of this model."""
        context, streamed = self.model.context_length, None
        if plan is not None:
            context, streamed = min(plan.context, context or plan.context), plan.streamed_bytes
        return LoadedPair(
            target=target,
            drafters=drafters,
            tokenizer=self.loaded.tokenizer,
            vocab_size=self.vocab_size,
            context_length=context,
            profile=PairProfile(pair_profile_path(names, streamed, options.read_bandwidth)),
            names=names,
            options=options,
            plan=plan,
        )


@dataclass(slots=True)
class PlannedPair:
    """A pair with its memory plan; of the target's large weights nothing is in memory yet."""

    names: PairPaths
    options: MemoryOptions
    target: PreparedTarget
    weights: Prepared
    drafters: list[Drafter]
    needs: MemoryNeeds
    plan: MemoryPlan
    limits: MlxLimits
    estimated: ClassVar[bool] = False

    @property
    def reads(self) -> list[Read]:
        """What a pass reads, in order."""
        return [read for unit in self.weights.streamed(self.plan)[1] for read in unit.reads]

    def build(self) -> LoadedPair:
        """Bring in the weights that the plan pins, and begin to read the others."""
        self.limits.heed(self.plan)
        feed = self.weights.build(self.plan, self.options.read_bandwidth)
        target = Target(self.target.model, self.target.vocab_size, feed, self.plan.prefill_chunk)
        if self.plan.budget_bytes is not None:  # caches take at once what the plan has put aside for them
            target.cache.expected_slots = self.plan.context + self.plan.max_nodes
            for cache in (drafter.cache for drafter in self.drafters if drafter.cache is not None):
                cache.expected_slots = self.plan.context + provisional_nodes(self.plan.max_nodes)
            for model in (drafter.model for drafter in self.drafters if drafter.model is not None):
                model.prefill_chunk = min(model.prefill_chunk, self.plan.prefill_chunk)
        pair = self.target.pair(self.names, self.options, target, self.drafters, self.plan)
        pair.limits = self.limits
        return pair


def load_pair(
    target: str | None, draft: str | None, show_progress: bool, options: MemoryOptions | None = None
) -> LoadedPair:
    """All phases. See `api.load` for the arguments and errors."""
    options = options or MemoryOptions()
    names = find_pair(target, draft, show_progress, conditions(options))
    return load_names(names, options, progress_for(show_progress))


def load_names(names: PairPaths, options: MemoryOptions, progress: Progress | None = None) -> LoadedPair:
    """All phases after the first. progress: is told when there is less room for context than usual."""
    if is_planned([names], options):
        planned = plan_pair(names, options)
        if progress is not None and planned.plan.context < planned.needs.context:
            progress.note(
                f"[memory: room for {planned.plan.context} tokens of context, not {planned.needs.context}; "
                f"--context {planned.needs.context} or more --memory makes it]"
            )
        return planned.build()
    return PreparedTarget.in_memory(names.target_path).build(names)


def is_planned(pairs: Sequence[PairPaths], options: MemoryOptions) -> bool:
    """Whether a memory plan is needed to load the target that `pairs` have in common with all their drafts."""
    asked = options != MemoryOptions(reserved=options.reserved)  # for what only a memory plan can heed
    return asked or _budget(pairs, options) is not None


def plan_pair(names: PairPaths, options: MemoryOptions) -> PlannedPair:
    """Load all but the target's large weights, measure what is taken, and plan the rest.

    Raises BudgetError naming the smallest budget that works, and the errors of `PreparedTarget`.
    """
    budget = _budget([names], options)
    if budget is not None:
        _refuse_early(names, options, budget)
        folders = [names.target_path, names.draft_path]
        compile_kernels([folder for folder in folders if folder is not None and folder.is_dir()], budget)
    limits = MlxLimits.while_loading()
    try:
        target = PreparedTarget.to_be_planned(names.target_path, options)
        assert target.weights is not None
        drafters = target.drafters(names, options)
        needs = _needs(target.weights, drafters, options)
        plan = make_plan(needs, budget, options.pinned)
    except BaseException:
        limits.restore()
        raise
    return PlannedPair(names, options, target, target.weights, drafters, needs, plan, limits)


def _refuse_early(names: PairPaths, options: MemoryOptions, budget: int) -> None:
    """Raise BudgetError for a budget that loading would exceed, or that could not work afterwards."""
    try:
        model = ModelEstimate.of(read_config(names.target_path), str(names.target_path))
        draft = DraftEstimate.at(names.draft_path)
    except ModelError:
        return  # loading says what is wrong
    needs = estimate_needs(model, draft, options, names.target_path)
    try:
        make_plan(needs, budget, options.pinned)
    except BudgetError:
        # The next process may begin with a little more memory than this one; the size that is named shall work.
        runtime, loading = needs.runtime_bytes + _DIFFERENCE, needs.loading_bytes + _DIFFERENCE
        make_plan(replace(needs, runtime_bytes=runtime, loading_bytes=loading), budget, options.pinned)
        raise


def _budget(pairs: Sequence[PairPaths], options: MemoryOptions) -> int | None:
    """What was asked for; else None where all models fit into memory, else what they may use of it."""
    drafts = dict.fromkeys(names.draft_path for names in pairs if names.draft_path is not None)
    files = [file for folder in (pairs[0].target_path, *drafts) for file in folder.glob("model*.safetensors")]
    return budget_for(sum(file.stat().st_size for file in files), options)


def budget_for(weight_bytes: int, options: MemoryOptions) -> int | None:
    """What was asked for, else the default for so many bytes of weights."""
    if options.memory is not None:
        return options.memory
    runtime = max(memory_of_process().now - mx.get_active_memory() - mx.get_cache_memory(), 0)
    return default_budget(weight_bytes, physical_memory_bytes(), working_set_bytes(), runtime)


def _needs(prepared: Prepared, drafters: Sequence[Drafter], options: MemoryOptions) -> MemoryNeeds:
    """Measure what is taken already."""
    sizes = prepared.sizes
    context, min_context = context_room(options, prepared.model.context_length)
    models = [drafter.model for drafter in drafters if drafter.model is not None]
    weights = sum(model.weight_bytes for model in models)
    release_free_memory()
    return MemoryNeeds(
        sizes,
        context=context,
        min_context=min_context,
        runtime_bytes=max(memory_of_process().now - weights - sizes.resident_bytes, 0) + options.reserved,
        draft_bytes=weights,
        draft_kv_bytes_per_token=sum((token_state(model).kv_bytes for model in models), TokenBytes()),
    )


def release_free_memory() -> None:
    """Give memory that is free inside the process back to the system."""
    gc.collect()
    mx.clear_cache()
    trim_heap()
