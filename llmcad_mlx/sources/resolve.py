"""From what a user types for a model to a folder on the disk."""

from __future__ import annotations

import re
from pathlib import Path

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.presets import NGRAM, get_preset, list_presets
from llmcad_mlx.sources.progress import Progress, progress_for
from llmcad_mlx.sources.pull import pull_part, pull_repo

DEFAULT_PRESET = "smollm2-135m"
TABLE_SUFFIX = ".ngrams.safetensors"

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def resolve_target(spec: str, show_progress: bool = False) -> Path:
    """The folder of a target: a local folder, a preset's target, or a hub repository `org/name`.

    Fetches and converts what is not there yet. Raises ModelError when `spec` is none of these, and the
    errors of `pull_part` and `pull_repo`.
    """
    return _resolve(spec, "target", progress_for(show_progress))


def resolve_draft(spec: str, show_progress: bool = False) -> Path:
    """The folder of a draft model, or the file of an n-gram table.

    A preset means its draft model, or its target when it has none.
    """
    path = Path(spec).expanduser()
    if path.name.endswith(TABLE_SUFFIX) and path.is_file():
        return path
    has_draft = _is_preset(spec) and get_preset(spec).draft is not None
    return _resolve(spec, "draft" if has_draft else "target", progress_for(show_progress))


def preset_draft(target: str) -> str:
    """What drafts for a target by default: for a preset with a draft model its name, else "ngram"."""
    if not Path(target).exists() and _is_preset(target) and get_preset(target).draft is not None:
        return target
    return NGRAM


def _resolve(spec: str, part: str, progress: Progress) -> Path:
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise ModelError(_about_gguf(path))
    if path.is_file():
        raise ModelError(f"{spec}: is a file; give the model's folder")
    if _is_preset(spec):
        return pull_part(spec, part, progress)
    if _REPOSITORY.fullmatch(spec):
        return pull_repo(spec, progress=progress)
    names = ", ".join(preset.name for preset in list_presets())
    raise ModelError(f"{spec!r}: no such folder, preset ({names}) or hub repository (org/name)")


def _about_gguf(path: Path) -> str:
    if not path.exists():
        return f"{path}: no such file"
    return f"{path}: GGUF files must be converted first: llmcad-mlx convert {path} {path.stem}"


def _is_preset(spec: str) -> bool:
    return any(preset.name == spec for preset in list_presets())
