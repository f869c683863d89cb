"""From what users type for a target and its draft to folders, and to the file with what was learned about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from llmcad_mlx.errors import LlmcadError, ModelError, UsageError
from llmcad_mlx.progress import progress_for
from llmcad_mlx.store.cache_folder import home_folder
from llmcad_mlx.store.choice import Conditions, find_choice
from llmcad_mlx.store.copies import CopyName, self_draft, self_draft_bits
from llmcad_mlx.store.profile import profile_path
from llmcad_mlx.store.pull import DEFAULT_PRESET, preset_draft, resolve_draft, resolve_target

NGRAM_DRAFT = "ngram"
NO_DRAFT = "none"
AUTO_DRAFT = "auto"


@dataclass(frozen=True, slots=True)
class PairNames:
    """Where a pair's models lie. `draft_name` is for people, `draft_path` None for "ngram" and "none"."""

    target_path: Path
    draft_name: str
    draft_path: Path | None


def find_pair(
    target: str | None, draft: str | None, show_progress: bool, conditions: Conditions | None = None
) -> PairNames:
    """Resolve names to folders, fetching and making what is not there.

    conditions: what a tuned draft must have been chosen for, where `draft` is "auto"; None: this device and no
    memory options. Raises the errors of `resolve_target` and `name_pair`.
    """
    target_name = DEFAULT_PRESET if target is None else target
    _check_draft(draft)
    target_path = resolve_target(target_name, show_progress)
    if draft != AUTO_DRAFT:
        return name_pair(target_path, draft, show_progress)
    choice = find_choice(target_path, conditions or Conditions(device_name()))
    if choice is None:
        return name_pair(target_path, preset_draft(target_name), show_progress)
    try:
        return name_pair(target_path, choice.draft, show_progress)
    except LlmcadError as error:
        raise ModelError(
            f"{error}. `llmcad-mlx tune` chose this draft for {target_path}: run it again, or give --draft"
        ) from None


def name_pair(target_path: Path, draft: str | None, show_progress: bool) -> PairNames:
    """The target in a folder with a draft that is not "auto", which is fetched or made where it is not there.

    Raises the errors of `resolve_draft`, `quantised_copy` and `write_trimmed_draft`.
    """
    _check_draft(draft)
    if draft is None or draft in (NO_DRAFT, NGRAM_DRAFT):
        return PairNames(target_path, draft or NO_DRAFT, None)
    progress = progress_for(show_progress)
    bits, copy = self_draft_bits(draft), CopyName.of(draft)
    if bits is not None:
        path = self_draft(target_path, bits, progress)
    elif copy is not None:
        source = name_pair(target_path, copy.draft, show_progress).draft_path
        if source is None or not source.is_dir():
            raise UsageError(f"draft: {copy.draft} is no draft model; leave {copy.prefix!r} out")
        path = copy.make(source, progress)
    else:
        path = resolve_draft(draft, show_progress)
    return PairNames(target_path, draft, path)


def _check_draft(draft: str | None) -> None:
    """Raises UsageError for what can name no draft, before anything is looked for."""
    if draft is None:
        return
    if not isinstance(draft, str) or not draft:
        raise UsageError(f"draft: {draft!r} is not a folder, repository, preset, 'ngram', 'self:4' or 'none'")
    copy = CopyName.of(draft)
    while copy is not None:
        draft, copy = copy.draft, CopyName.of(copy.draft)
    self_draft_bits(draft)


def pair_profile_path(names: PairNames, streamed_bytes: int | None, read_bandwidth: float | None) -> Path:
    """Step times depend on what is streamed and how fast, so each way of running has a profile of its own.

    streamed_bytes: per pass; None where all is in memory and no budget was set. read_bandwidth: emulated.
    """
    way = () if streamed_bytes is None else (f"{streamed_bytes} streamed", f"{read_bandwidth} bytes/s")
    models = [names.target_path.resolve(), names.draft_path or names.draft_name, *way]
    return profile_path(home_folder(), models, device_name())


def device_name() -> str:
    """What computes, for people: "Apple M3 Pro (gpu)", "cpu"."""
    device = mx.default_device()
    if device == mx.cpu:
        return "cpu"
    info = mx.device_info()
    return f"{info.get('device_name', 'gpu')} (gpu)"
