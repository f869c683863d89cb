"""From what users type for a target and its draft to folders, and to the file with what was learned about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from llmcad_mlx.errors import LlmcadError, ModelError, UsageError
from llmcad_mlx.progress import progress_for
from llmcad_mlx.store.copies import DerivedDraft
from llmcad_mlx.store.presets import NGRAM
from llmcad_mlx.store.profile import Conditions, find_choice, profile_path
from llmcad_mlx.store.pull import DEFAULT_PRESET, preset_draft, resolve_draft, resolve_target

NGRAM_DRAFT = NGRAM
NO_DRAFT = "none"
AUTO_DRAFT = "auto"


@dataclass(frozen=True, slots=True)
class PairPaths:
    """Where a pair's models lie. `draft_name` is for people, `draft_path` None for "ngram" and "none"."""

    target_path: Path
    draft_name: str
    draft_path: Path | None


def find_pair(
    target: str | None, draft: str | None, show_progress: bool, conditions: Conditions | None = None
) -> PairPaths:
    """Resolve names to folders, fetching and making what is not there.

    conditions: what a tuned draft must have been chosen for, where `draft` is "auto"; None: this device and no
    memory options. Raises the errors of `resolve_target` and `pair_with_draft`.
    """
    target_name = DEFAULT_PRESET if target is None else target
    if draft is not None:  # before anything is looked for
        if not isinstance(draft, str) or not draft:
            raise UsageError(f"draft: {draft!r} is not a folder, repository, preset, 'ngram', 'self:4' or 'none'")
        DerivedDraft.parse(draft)
    target_path = resolve_target(target_name, show_progress)
    if draft != AUTO_DRAFT:
        return pair_with_draft(target_path, draft, show_progress)
    choice = find_choice(target_path, conditions or Conditions(device_name()))
    if choice is None:
        return pair_with_draft(target_path, preset_draft(target_name), show_progress)
    try:
        return pair_with_draft(target_path, choice.draft, show_progress)
    except LlmcadError as error:
        raise ModelError(
            f"{error}. `llmcad-mlx tune` chose this draft for {target_path}: run it again, or give --draft"
        ) from None


def pair_with_draft(target_path: Path, draft: str | None, show_progress: bool) -> PairPaths:
    """The target in a folder with a draft that is not "auto", which is fetched or made where it is not there.

    Raises the errors of `resolve_draft`, `DerivedDraft.parse` and `make`.
    """
    if draft is None or draft in (NO_DRAFT, NGRAM_DRAFT):
        return PairPaths(target_path, draft or NO_DRAFT, None)
    derived = DerivedDraft.parse(draft)
    if derived is None:
        return PairPaths(target_path, draft, resolve_draft(draft, show_progress))
    source = target_path
    if derived.source is not None:
        path = pair_with_draft(target_path, derived.source, show_progress).draft_path
        if path is None or not path.is_dir():
            raise UsageError(f"draft: {derived.source} is no draft model; leave {derived.prefix!r} out")
        source = path
    return PairPaths(target_path, draft, derived.make(source, progress_for(show_progress)))


def pair_profile_path(pair: PairPaths, streamed_bytes: int | None, read_bandwidth: float | None) -> Path:
    """Step times depend on what is streamed and how fast, so each way of running has a profile of its own.

    streamed_bytes: per pass; None where all is in memory and no budget was set. read_bandwidth: emulated.
    """
    way = () if streamed_bytes is None else (f"{streamed_bytes} streamed", f"{read_bandwidth} bytes/s")
    return profile_path([pair.target_path.resolve(), pair.draft_path or pair.draft_name, *way], device_name())


def device_name() -> str:
    """What computes, for people: "Apple M3 Pro (gpu)", "cpu"."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return f"{mx.device_info().get('device_name', 'gpu')} (gpu)"
