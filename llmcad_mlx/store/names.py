"""From what users type for a target and its draft to folders, and to the file with what was learned about them.

Presets are fetched and checked, and GGUF files converted into bundles; repositories are used as they are.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from llmcad_mlx.cpu import chosen_kernels
from llmcad_mlx.errors import LlmcadError, ModelError, UsageError
from llmcad_mlx.files import check_destination, home_folder, read_object, user_path
from llmcad_mlx.gguf.convert import convert_gguf
from llmcad_mlx.models.folder import read_config
from llmcad_mlx.progress import Progress, progress_for
from llmcad_mlx.store import locked
from llmcad_mlx.store.convert import convert_folder
from llmcad_mlx.store.copies import DerivedDraft
from llmcad_mlx.store.download import cached_hub_repo, fetch_file, fetch_hub_file, fetch_hub_repo
from llmcad_mlx.store.presets import (
    NGRAM,
    FileSource,
    PackagedSource,
    RepoSource,
    Source,
    find_preset,
    get_preset,
    list_presets,
)
from llmcad_mlx.store.profile import Conditions, find_choice, profile_path

NO_DRAFT = "none"
AUTO_DRAFT = "auto"
DEFAULT_PRESET = "smollm2-135m"
TABLE_SUFFIX = ".ngrams.safetensors"
MARKER = "llmcad_source.json"
FORMAT = 3
"""Raised when conversion changes, so that folders of an older form are made again."""

_HUB_FOLDER = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, slots=True)
class PairPaths:
    """Where a pair's models lie. `draft_name`: as `--draft` takes it; `draft_path`: None for "ngram" and "none".
    `target_name`: what was asked for; "": only the folder is known."""

    target_path: Path
    draft_name: str
    draft_path: Path | None
    target_name: str = field(default="", compare=False)

    @property
    def target_label(self) -> str:
        """The target's name for people."""
        return public_name(self.target_name or str(self.target_path.resolve()))

    @property
    def draft_label(self) -> str:
        """The draft's name for people."""
        return public_name(own_draft_name(self.draft_name))


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
    choice = None
    if draft == AUTO_DRAFT:
        choice = find_choice(target_path, conditions or Conditions(device_name()))
        draft = preset_draft(target_name) if choice is None else choice.draft
    try:
        return replace(pair_with_draft(target_path, draft, show_progress), target_name=target_name)
    except LlmcadError as error:
        if choice is None:
            raise
        raise ModelError(
            f"{error}. `llmcad-mlx tune` chose this draft for {target_path}: run it again, or give --draft"
        ) from None


def pair_with_draft(target_path: Path, draft: str | None, show_progress: bool) -> PairPaths:
    """The target in a folder with a draft that is not "auto", which is fetched or made where it is not there.

    Raises the errors of `resolve_draft`, `DerivedDraft.parse` and `make`.
    """
    if draft is None or draft in (NO_DRAFT, NGRAM):
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

    streamed_bytes: per pass; None or 0 where all is in memory, with a budget or without. read_bandwidth: emulated.
    """
    way = () if not streamed_bytes else (f"{streamed_bytes} streamed", f"{read_bandwidth} bytes/s")
    folders = [path for path in (pair.target_path, pair.draft_path) if path is not None]
    files = [file.stat() for folder in folders for file in sorted(folder.glob("model*.safetensors"))]
    weights = [f"{file.st_size} {file.st_mtime_ns}" for file in files]  # another model may come to lie there
    models = (pair.target_path.resolve(), pair.draft_path or pair.draft_name)
    return profile_path([*models, *weights, *way], device_name())


def device_name() -> str:
    """What computes, for people: "Apple M3 Pro (gpu)", "cpu", and "cpu, MLX's kernels" where those were asked for.
    Raises UsageError where something unknown was."""
    chosen = chosen_kernels()
    if mx.default_device() == mx.cpu:
        return "cpu" if chosen == "auto" else "cpu, MLX's kernels"
    return f"{mx.device_info().get('device_name', 'gpu')} (gpu)"


def public_name(name: str | None) -> str:
    """A preset's or repository's name as it is, a local file or folder by its last part and with its prefix, like
    "4bit:"; None: the default target."""
    if name is None:
        return DEFAULT_PRESET
    head, colon, rest = name.rpartition(":")
    path = user_path(rest)
    if not (path.is_absolute() or rest.startswith(("~", ".")) or path.exists()):
        return name
    in_cache = _HUB_FOLDER.search(str(path))
    own = os.fsencode(path.resolve().name).decode(errors="replace")  # a file's name may be no text
    return f"{head}{colon}{'/'.join(in_cache.groups()) if in_cache else own or 'model'}"


def own_draft_name(name: str) -> str:
    """A draft as `--draft` takes it, but a preset's by a name that is not also its target's."""
    derived = DerivedDraft.parse(name)
    if derived is not None:
        return derived.renamed(own_draft_name)
    preset = None if Path(name).exists() else find_preset(name)
    return name if preset is None else preset.draft_name or name


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
    path = user_path(spec)
    if path.name.endswith(TABLE_SUFFIX) and path.is_file():
        return path
    return _resolve(spec, "target" if preset_draft(spec) == NGRAM else "draft", show_progress)


def preset_draft(target: str) -> str:
    """What drafts for a target by default: for a preset with a draft model its name, else "ngram"."""
    preset = None if Path(target).exists() else find_preset(target)
    return NGRAM if preset is None or preset.draft is None else target


def missing_pair(target: str | None, draft: str, conditions: Conditions) -> tuple[str, str] | None:
    """Target and draft, the latter never "auto", where the weights of one would have to be fetched; None where all
    are here, or where a name is none and `find_pair` says why. Nothing is fetched."""
    name = DEFAULT_PRESET if target is None else target
    found = local_folder(name, "target")
    if draft == AUTO_DRAFT:
        choice = None if found is None else find_choice(found, conditions)
        draft = preset_draft(name) if choice is None else choice.draft
    source: str | None = draft
    while source is not None and (derived := DerivedDraft.parse(source)) is not None:
        source = derived.source
    is_here = source in (None, NO_DRAFT, NGRAM) or local_folder(str(source), "draft") is not None
    return None if found is not None and is_here else (name, draft)


def published_config(spec: str, part: str) -> dict[str, Any]:
    """config.json of a folder, a preset's "target" or "draft", or a hub repository, of which it alone is fetched.

    Raises ModelError for what has none, DownloadError where it cannot be had.
    """
    path = user_path(spec)
    if path.is_dir():
        return read_config(path)
    source = _source_of(spec, part)
    if isinstance(source, FileSource):
        if not source.config:
            raise ModelError(f"{spec}: what it needs is not known before it is here: llmcad-mlx pull {spec}")
        return dict(source.config)
    if isinstance(source, PackagedSource):
        return read_config(source.path)
    if isinstance(source, RepoSource):
        return read_config(fetch_hub_file(source.repo, source.revision, "config.json", Progress()).parent)
    return read_config(_resolve(spec, part, show_progress=False))  # which says what is wrong


def _source_of(spec: str, part: str) -> Source | None:
    """Where the part of a preset, or a repository, comes from; None for any other name."""
    preset = find_preset(spec)
    if preset is not None:
        return preset.target if part == "target" else preset.draft or preset.target
    return RepoSource(spec, None) if _REPOSITORY.fullmatch(spec) else None


def local_folder(spec: str, part: str) -> Path | None:
    """Where the weights lie; None where they are to be fetched. What is neither is the place where it is not."""
    path, source = user_path(spec), _source_of(spec, part)
    if path.is_dir():
        only_config = (path / "config.json").is_file() and not any(path.glob("*.safetensors"))
        return None if only_config else path
    if isinstance(source, FileSource):
        folder = home_folder() / "models" / spec / part
        return folder if _complete(folder, source) else None
    if isinstance(source, RepoSource):
        return cached_hub_repo(source.repo, source.revision)
    return source.path if isinstance(source, PackagedSource) else path


def is_gguf(path: Path) -> bool:
    """Whether the name is that of a GGUF file."""
    return path.suffix.lower() == ".gguf"


def _resolve(spec: str, part: str, show_progress: bool) -> Path:
    path = user_path(spec)
    if spec and path.is_dir():
        return path
    if is_gguf(path) and not path.exists():
        raise ModelError(f"{path}: no such file")
    if is_gguf(path):
        command = shlex.join(["llmcad-mlx", "convert", str(path), path.stem])
        raise ModelError(f"{path}: GGUF files must be converted first: {command}")
    if path.is_file():
        raise ModelError(f"{spec}: is a file; give the model's folder")
    progress = progress_for(show_progress)
    if find_preset(spec) is not None:
        return pull_part(spec, part, progress)
    if _REPOSITORY.fullmatch(spec):
        return pull_repo(spec, progress=progress)
    names = ", ".join(preset.name for preset in list_presets())
    raise ModelError(f"{spec!r}: no such folder, preset ({names}) or hub repository (org/name)")


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
            made = folder.with_name(f"{part}.new")
            shutil.rmtree(made, ignore_errors=True)  # of a try that was killed
            convert_gguf(file, made, source.bits, progress=progress, sampling=source.sampling)
            (made / MARKER).write_text(json.dumps(_marker(made, source), indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # of an older form, or damaged; kept while the disk may fill
            made.rename(folder)
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
        **({} if source.bits is None else {"bits": source.bits}),
        "weight_bytes": sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
    }


def _complete(folder: Path, source: FileSource) -> bool:
    return read_object(folder / MARKER) == _marker(folder, source)


def convert(
    source: str, dest: Path, bits: int | None = None, group_size: int | None = None, show_progress: bool = False
) -> None:
    """Make the bundle `dest` from a GGUF file, a model folder, a preset or a hub repository, fetched where needed.

    Without `bits` and `group_size`: a GGUF file's matrices keep their precision, in groups of the size of its
    blocks, 32; folders get 4 bits in groups of 64. Errors as for `convert_gguf`, `convert_folder` and
    `resolve_target`.
    """
    check_destination(dest)  # before anything is fetched
    path = user_path(source)
    progress = progress_for(show_progress)
    if path.is_file() or is_gguf(path):
        convert_gguf(path, dest, bits, group_size or 32, progress=progress)
        return
    folder = resolve_target(source, show_progress)
    name = folder.resolve().name if path.is_dir() else source
    convert_folder(folder, dest, bits, group_size, name=name, progress=progress)
