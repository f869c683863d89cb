"""From what users type for a target and its draft to folders, and to the file with what was learned about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from llmcad_mlx.errors import UsageError
from llmcad_mlx.profile import profile_path
from llmcad_mlx.sources.cache_folder import home_folder
from llmcad_mlx.sources.progress import progress_for
from llmcad_mlx.sources.resolve import DEFAULT_PRESET, preset_draft, resolve_draft, resolve_target
from llmcad_mlx.sources.self_draft import self_draft, self_draft_bits

NGRAM_DRAFT = "ngram"
NO_DRAFT = "none"
AUTO_DRAFT = "auto"


@dataclass(frozen=True, slots=True)
class PairNames:
    """Where a pair's models lie. `draft_name` is for people, `draft_path` None for "ngram" and "none"."""

    target_path: Path
    draft_name: str
    draft_path: Path | None


def find_pair(target: str | None, draft: str | None, show_progress: bool) -> PairNames:
    """Resolve names to folders, fetching and making what is not there.

    Raises the errors of `resolve_target` and `self_draft`.
    """
    target_name = DEFAULT_PRESET if target is None else target
    bits = self_draft_bits(draft) if isinstance(draft, str) else None
    target_path = resolve_target(target_name, show_progress)
    if bits is not None:
        copy = self_draft(target_path, bits, progress_for(show_progress))
        return PairNames(target_path, draft or "", copy)
    draft_name = _draft_name(draft, target_name)
    draft_path = None if draft_name in (NO_DRAFT, NGRAM_DRAFT) else resolve_draft(draft_name, show_progress)
    return PairNames(target_path, draft_name, draft_path)


def _draft_name(draft: str | None, target_name: str) -> str:
    if draft is None:
        return NO_DRAFT
    if not isinstance(draft, str) or not draft:
        raise UsageError(f"draft: {draft!r} is not a folder, repository, preset, 'ngram', 'self:4' or 'none'")
    return preset_draft(target_name) if draft == AUTO_DRAFT else draft


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
