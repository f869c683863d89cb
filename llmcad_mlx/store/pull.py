"""From what a user types for a model to a folder on the disk.

Presets are fetched and checked, and GGUF files converted into bundles; repositories are used as they are.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmcad_mlx.errors import ModelError
from llmcad_mlx.files import read_object
from llmcad_mlx.gguf.convert import convert_gguf
from llmcad_mlx.progress import Progress, progress_for
from llmcad_mlx.store import home_folder, locked
from llmcad_mlx.store.download import fetch_file, fetch_hub_repo
from llmcad_mlx.store.presets import (
    NGRAM,
    FileSource,
    PackagedSource,
    RepoSource,
    find_preset,
    get_preset,
    list_presets,
)

DEFAULT_PRESET = "smollm2-135m"
TABLE_SUFFIX = ".ngrams.safetensors"
MARKER = "llmcad_source.json"
FORMAT = 2
"""Raised when conversion changes, so that folders of an older form are made again."""

_BITS, _GROUP_SIZE = 4, 32
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, slots=True)
class PulledPreset:
    """Folders that `mlx_lm.load` opens. `draft` is None when the n-gram drafter serves, a file for a table."""

    target: Path
    draft: Path | None


def pull_preset(name: str, progress: Progress | None = None, keep_source: bool = False) -> PulledPreset:
    """Fetch a preset's target and draft, convert GGUF files; return at once where that is done.

    `keep_source` leaves the fetched GGUF files in the cache folder.
    Raises ModelError for an unknown preset or a file that cannot be converted, DownloadError when a file
    cannot be had or is not the one the preset names, DiskError when it does not fit the disk.
    """
    has_draft = get_preset(name).draft is not None
    target = pull_part(name, "target", progress, keep_source)
    return PulledPreset(target, pull_part(name, "draft", progress, keep_source) if has_draft else None)


def pull_part(name: str, part: str, progress: Progress | None = None, keep_source: bool = False) -> Path:
    """The folder of a preset's `part`, "target" or "draft"; of the hub's cache where it is a whole repository. A
    draft that comes with the package is a file.

    Errors as for `pull_preset`.
    """
    preset = get_preset(name)
    source = preset.target if part == "target" else preset.draft
    if source is None:
        raise ModelError(f"{name}: this preset has no draft model; use --draft ngram")
    if isinstance(source, PackagedSource):
        return source.path
    if isinstance(source, RepoSource):
        return pull_repo(source.repo, source.revision, progress)
    folder = home_folder() / "models" / name / part
    if not _complete(folder, source):
        with locked(folder):
            if not _complete(folder, source):
                _fetch_and_convert(source, folder, progress or Progress(), keep_source)
    return folder


def pull_repo(repo: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The mlx-lm model in a hub repository, as a folder of the hub's cache.

    Raises DownloadError when it cannot be had, ModelError when the repository holds no mlx-lm model.
    """
    folder = fetch_hub_repo(repo, revision, progress or Progress())
    if not (folder / "config.json").exists() or not any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"{repo}: the repository has no config.json with model*.safetensors, so it is no mlx-lm model; "
            "a GGUF file must be downloaded and converted with `llmcad-mlx convert`"
        )
    return folder


def _fetch_and_convert(source: FileSource, folder: Path, progress: Progress, keep_source: bool) -> None:
    file = fetch_file(source, progress)
    shutil.rmtree(folder, ignore_errors=True)  # of an older form, or damaged
    convert_gguf(file, folder, _BITS, _GROUP_SIZE, progress=progress)
    (folder / MARKER).write_text(json.dumps(_marker(folder, source), indent=2) + "\n", encoding="utf-8")
    if not keep_source:
        file.unlink()


def _marker(folder: Path, source: FileSource) -> dict[str, object]:
    """Written last into a converted folder; what it must say for the folder to be complete."""
    return {
        "format": FORMAT,
        "sha256": source.sha256,
        "bits": _BITS,
        "group_size": _GROUP_SIZE,
        "weight_bytes": sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
    }


def _complete(folder: Path, source: FileSource) -> bool:
    return read_object(folder / MARKER) == _marker(folder, source)


def resolve_target(spec: str, show_progress: bool = False) -> Path:
    """The folder of a target: a local folder, a preset's target, or a hub repository `org/name`.

    Fetches and converts what is not there yet. Raises ModelError when `spec` is none of these, and the
    errors of `pull_part` and `pull_repo`.
    """
    return _resolve(spec, "target", show_progress)


def resolve_draft(spec: str, show_progress: bool = False) -> Path:
    """The folder of a draft model, or the file of an n-gram table.

    A preset means its draft model, or its target when it has none.
    """
    path = Path(spec).expanduser()
    if path.name.endswith(TABLE_SUFFIX) and path.is_file():
        return path
    preset = find_preset(spec)
    return _resolve(spec, "draft" if preset is not None and preset.draft is not None else "target", show_progress)


def preset_draft(target: str) -> str:
    """What drafts for a target by default: for a preset with a draft model its name, else "ngram"."""
    preset = None if Path(target).exists() else find_preset(target)
    return NGRAM if preset is None or preset.draft is None else target


def _resolve(spec: str, part: str, show_progress: bool) -> Path:
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return path
    if path.suffix == ".gguf" and not path.exists():
        raise ModelError(f"{path}: no such file")
    if path.suffix == ".gguf":
        raise ModelError(f"{path}: GGUF files must be converted first: llmcad-mlx convert {path} {path.stem}")
    if path.is_file():
        raise ModelError(f"{spec}: is a file; give the model's folder")
    progress = progress_for(show_progress)
    if find_preset(spec) is not None:
        return pull_part(spec, part, progress)
    if _REPOSITORY.fullmatch(spec):
        return pull_repo(spec, progress=progress)
    names = ", ".join(preset.name for preset in list_presets())
    raise ModelError(f"{spec!r}: no such folder, preset ({names}) or hub repository (org/name)")
