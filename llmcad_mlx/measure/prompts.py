"""The prompts of a benchmark, by domain, from a TOML file."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmcad_mlx.errors import UsageError

DEFAULT_DOMAINS = ("code", "explanation", "sql", "translation")
ALL_DOMAINS = "all"


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """One user message; `name` is unique within its domain."""

    domain: str
    name: str
    text: str


def load_prompts(
    file: Path | None = None, domains: Sequence[str] = (), per_domain: int | None = None
) -> list[BenchPrompt]:
    """The prompts of the named domains, in the order the names are given; at most the first `per_domain` of each.

    file: a TOML file of tables `[[domain]]` with `name` and `text`; None: the prompts of this package.
    domains: empty means code, explanation, sql and translation, or all of them for a `file`; "all" is all.
    Raises UsageError for a file that cannot be read or has another form, and for an unknown domain.
    """
    by_domain = _parse(_read(file), str(file) if file is not None else "prompts.toml")
    if not domains:
        domains = DEFAULT_DOMAINS if file is None else tuple(by_domain)
    elif ALL_DOMAINS in domains:
        domains = tuple(by_domain)
    for domain in domains:
        if domain not in by_domain:
            raise UsageError(f"domains: {domain!r} is unknown; choose from {', '.join([*by_domain, ALL_DOMAINS])}")
    return [prompt for domain in dict.fromkeys(domains) for prompt in by_domain[domain][:per_domain]]


def mixed_by_domain(prompts: Sequence[BenchPrompt]) -> list[BenchPrompt]:
    """The first prompt of each domain, then the second of each, …: a short warm-up meets several domains."""
    seen: Counter[str] = Counter()
    ranks = []
    for prompt in prompts:
        ranks.append(seen[prompt.domain])
        seen[prompt.domain] += 1
    return [prompts[index] for index in sorted(range(len(prompts)), key=ranks.__getitem__)]


def _read(file: Path | None) -> str:
    if file is None:
        return files("llmcad_mlx.measure").joinpath("prompts.toml").read_text(encoding="utf-8")
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"prompts: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"prompts: {file} is not UTF-8 text") from None


def _parse(text: str, file: str) -> dict[str, list[BenchPrompt]]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"prompts: {file}: {error}") from None
    found = {domain: _domain(domain, entries, file) for domain, entries in tables.items()}
    if not found:
        raise UsageError(f"prompts: {file} holds no prompts; give tables [[domain]] with a name and a text")
    return found


def _domain(domain: str, entries: Any, file: str) -> list[BenchPrompt]:
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"prompts: {file}: {domain} is not a list of tables; write [[{domain}]]")
    prompts = [_prompt(domain, entry, file) for entry in entries]
    if len({prompt.name for prompt in prompts}) < len(prompts):
        raise UsageError(f"prompts: {file}: two prompts of {domain} have the same name")
    return prompts


def _prompt(domain: str, entry: Any, file: str) -> BenchPrompt:
    if not isinstance(entry, Mapping) or set(entry) != {"name", "text"}:
        raise UsageError(f"prompts: {file}: each [[{domain}]] has a name and a text, nothing else")
    name, text = entry["name"], entry["text"]
    if not isinstance(name, str) or not isinstance(text, str) or not name or not text.strip():
        raise UsageError(f"prompts: {file}: name and text of [[{domain}]] must be non-empty strings")
    return BenchPrompt(domain, name, text)
