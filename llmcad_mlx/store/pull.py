"""From what a user types for a model to a folder on the disk.

Presets are fetched and checked, and GGUF files converted into bundles; repositories are used as they are.
"""

from __future__ import annotations

import json
import re
import shutil
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


def pull_preset(name: str, progress: Progress | None = None, keep_source: bool = False) -> list[Path]:
    """Fetch a preset's target and its draft, if it has one; convert GGUF files; return at once where that is done.

    What is returned is a folder that `mlx_lm.load` opens, or an n-gram table's file. `keep_source` leaves the
    fetched GGUF files in the cache folder.
    Raises ModelError for an unknown preset or a file that cannot be converted, DownloadError when a file
    cannot be had or is not the one the preset names, DiskError when it does not fit the disk.
    """
    parts = ["target", "draft"] if get_preset(name).draft is not None else ["target"]
    return [pull_part(name, part, progress, keep_source) for part in parts]


def pull_part(name: str, part: str, progress: Progress | None = None, keep_source: bool = False) -> Path:
    """As `pull_preset`, for one part: "target", or where there is one "draft"."""
    preset = get_preset(name)
    source = preset.target if part == "target" else preset.draft
    assert source is not None
    if isinstance(source, PackagedSource):
        return source.path
    if isinstance(source, RepoSource):
        return pull_repo(source.repo, source.revision, progress)
    folder = home_folder() / "models" / name / part
    if _complete(folder, source):
        return folder
    with locked(folder):
        if not _complete(folder, source):
            file = fetch_file(source, progress or Progress())
            shutil.rmtree(folder, ignore_errors=True)  # of an older form, or damaged
            convert_gguf(file, folder, _BITS, _GROUP_SIZE, progress=progress)
            (folder / MARKER).write_text(json.dumps(_marker(folder, source), indent=2) + "\n", encoding="utf-8")
            if not keep_source:
                file.unlink()
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
    return _resolve(spec, "target" if preset_draft(spec) == NGRAM else "draft", show_progress)


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
