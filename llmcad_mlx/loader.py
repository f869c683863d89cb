"""From names to a loaded pair: find the folders, load both models, make them tree-capable, compare tokens."""

from __future__ import annotations

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
from llmcad_mlx.models.host import prepare_for_host
from llmcad_mlx.models.loading import LoadedModel, load_model_folder
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.profile import PairProfile, profile_path
from llmcad_mlx.sources.cache_folder import home_folder
from llmcad_mlx.sources.resolve import DEFAULT_PRESET, resolve_draft, resolve_target
from llmcad_mlx.target.resident import ResidentTarget

NGRAM_DRAFT = "ngram"
NO_DRAFT = "none"
AUTO_DRAFT = "auto"


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
    clock: Callable[[], float] = field(default=time.perf_counter)

    def release(self) -> None:
        """Drop models and caches."""
        self.drafters = []
        del self.target


def load_pair(target: str | None, draft: str | None, show_progress: bool) -> LoadedPair:
    """Resolve, load and check. See `api.load` for the arguments and errors."""
    target_name = DEFAULT_PRESET if target is None else target
    target_path = resolve_target(target_name, show_progress)
    draft_name = _draft_name(draft, target_name)
    loaded, model = load_tree_model(target_path)
    vocab_size = _real_tokens(loaded, model)
    drafters: list[Drafter] = []
    draft_key: Path | str = draft_name
    if draft_name != NO_DRAFT and model.capability != "plain":
        drafters.append(NgramDrafter())
        if draft_name != NGRAM_DRAFT:
            draft_key = resolve_draft(draft_name, show_progress)
            drafters.append(_load_drafter(draft_key, loaded, vocab_size))
    return LoadedPair(
        target=ResidentTarget(model, vocab_size),
        drafters=drafters,
        tokenizer=loaded.tokenizer,
        vocab_size=vocab_size,
        context_length=model.context_length,
        profile=PairProfile(profile_path(home_folder(), [target_path.resolve(), draft_key], device_name())),
        target_path=target_path,
        draft_name=draft_name,
    )


def load_tree_model(path: Path) -> tuple[LoadedModel, TreeModel]:
    """Load one folder and find out what the model can do."""
    loaded = load_model_folder(path)
    prepare_for_host(loaded.model)
    return loaded, TreeModel(loaded.model, loaded.config)


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
    loaded, model = load_tree_model(path)
    check_same_tokens(target.tokenizer.get_vocab(), loaded.tokenizer.get_vocab())
    if model.vocab_size < vocab_size:
        raise ModelError(
            f"{path}: the draft has {model.vocab_size} logits for {vocab_size} tokens; choose another draft"
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
