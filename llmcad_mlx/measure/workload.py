"""What a benchmark runs: ways of decoding by name, prompts by domain from a TOML file, and how often."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

from llmcad_mlx.errors import UsageError
from llmcad_mlx.settings import GenerationOptions, PolicyName, SpeculationSettings, check_integer

PLAIN, PLAIN_EQUAL, MLX_LM, MLX_LM_DRAFT = "plain", "plain-equal", "mlx-lm", "mlx-lm-draft"
ABLATION = "ablation"
DEFAULT_VARIANTS = "plain,chain,paper,throughput"

Item = TypeVar("Item")
Key = TypeVar("Key")
Drafters = Literal["all", "draft", "ngram", "wrong", "none"]

_ADAPTIVE: tuple[PolicyName, ...] = ("paper", "throughput")
_PARTS = ("tree", "fallback", "pipeline")

_MEANINGS = {
    PLAIN: "no speculation",
    PLAIN_EQUAL: "the same, with more of the target pinned instead of a draft",
    "chain or chain:K": "K drafted tokens in a line",
    "paper": "LLMCad's policy",
    "throughput": "the default policy",
    "paper-no-X and throughput-no-X": f"without one or more of {', '.join(_PARTS)}",
    ABLATION: "plain, both policies, and both without each part and without all",
    "tree:N": "N nodes in every pass",
    "draft:N": "the same by the draft alone, without prompt lookup",
    "ngram": "prompt lookup alone",
    "wrong": "a draft that is always wrong",
    "no-draft": "the default policy without a draft",
    MLX_LM: "mlx_lm.stream_generate",
    MLX_LM_DRAFT: "the same with its draft_model",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of decoding. `settings` is None for mlx-lm's own paths, which need no drafters of ours.

    `equal_memory`: without a draft, the target may keep in memory what the draft would take.
    """

    name: str
    drafters: Drafters
    settings: SpeculationSettings | None
    equal_memory: bool = False

    @property
    def is_mlx_lm(self) -> bool:
        return self.settings is None


_KNOWN = {
    variant.name: variant
    for variant in (
        Variant(PLAIN, "none", SpeculationSettings("plain")),
        Variant(PLAIN_EQUAL, "none", SpeculationSettings("plain"), equal_memory=True),
        Variant("chain", "all", SpeculationSettings("chain")),
        Variant("paper", "all", SpeculationSettings("paper")),
        Variant("throughput", "all", SpeculationSettings()),
        Variant("ngram", "ngram", SpeculationSettings()),
        Variant("wrong", "wrong", SpeculationSettings()),
        Variant("no-draft", "none", SpeculationSettings()),
        Variant(MLX_LM, "none", None),
        Variant(MLX_LM_DRAFT, "none", None),
    )
}


def variant_help() -> str:
    """The known names in one line each, for --help and errors."""
    return "; ".join(f"{name} ({meaning})" for name, meaning in _MEANINGS.items())


def listed(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_variants(text: str) -> list[Variant]:
    """The variants of a comma-separated list. Raises UsageError for an unknown, repeated or missing name."""
    without = ["", *(f"-no-{part}" for part in _PARTS), "".join(f"-no-{part}" for part in _PARTS)]
    ablation = [PLAIN, *(policy + parts for policy in _ADAPTIVE for parts in without)]
    names = [name for given in listed(text) for name in (ablation if given == ABLATION else [given])]
    if not names:
        raise UsageError(f"variants: none given; choose from {variant_help()}")
    if len(set(names)) < len(names):
        raise UsageError(f"variants: {text!r} names one twice; name each once")
    return [_variant(name) for name in names]


def _variant(name: str) -> Variant:
    kind, colon, number = name.partition(":")
    policy, *missing = name.split("-no-")
    if colon:
        if not re.fullmatch("(chain|tree|draft):0*[1-9][0-9]*", name):
            raise UsageError(
                f"variants: {name!r} is unknown; a number goes with chain:K, tree:N or draft:N and is at least 1"
            )
        if kind == "chain":
            return Variant(name, "all", SpeculationSettings("chain", int(number) + 1))
        return Variant(name, "draft" if kind == "draft" else "all", SpeculationSettings("throughput", int(number)))
    if policy in _ADAPTIVE and missing and sorted(missing) == sorted(set(missing) & set(_PARTS)):
        kept: dict[str, Any] = {part: part not in missing for part in _PARTS}
        return Variant(name, "all", SpeculationSettings(policy, **kept))
    if name not in _KNOWN:
        raise UsageError(f"variants: {name!r} is unknown; choose from {variant_help()}")
    return _KNOWN[name]


DEFAULT_DOMAINS = ("code", "explanation", "sql", "translation")
ALL_DOMAINS = "all"
_PACKAGED = Path(__file__).with_name("prompts.toml")


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """One user message; `name` is unique within its domain. `tokens`: for a model; () until it is encoded."""

    domain: str
    name: str
    text: str
    tokens: tuple[int, ...] = ()


def load_prompts(
    file: Path | None = None, domains: Sequence[str] = (), per_domain: int | None = None
) -> list[BenchPrompt]:
    """The prompts of the named domains, in the order the names are given; at most the first `per_domain` of each.

    file: a TOML file of tables `[[domain]]` with `name` and `text`; None: the prompts of this package.
    domains: empty means code, explanation, sql and translation, or all of them for a `file`; "all" is all.
    Raises UsageError for a file that cannot be read or has another form, and for an unknown domain.
    """
    found = _read(file or _PACKAGED)
    if ALL_DOMAINS in domains or not domains:
        domains = DEFAULT_DOMAINS if file is None and not domains else tuple(found)
    for domain in domains:
        if domain not in found:
            raise UsageError(f"domains: {domain!r} is unknown; choose from {', '.join([*found, ALL_DOMAINS])}")
    return [prompt for domain in dict.fromkeys(domains) for prompt in found[domain][:per_domain]]


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items of each key, in their order."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _read(file: Path) -> dict[str, list[BenchPrompt]]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"prompts: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"prompts: {file} is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"prompts: {file}: {error}") from None
    if not tables:
        raise UsageError(f"prompts: {file} holds no prompts; give tables [[domain]] with a name and a text")
    found = {}
    for domain, entries in tables.items():
        if not isinstance(entries, list) or not entries:
            raise UsageError(f"prompts: {file}: {domain} is not a list of tables; write [[{domain}]]")
        found[domain] = [_prompt(domain, entry, file) for entry in entries]
        if len({prompt.name for prompt in found[domain]}) < len(entries):
            raise UsageError(f"prompts: {file}: two prompts of {domain} have the same name")
    return found


def _prompt(domain: str, entry: Any, file: Path) -> BenchPrompt:
    if not isinstance(entry, Mapping) or set(entry) != {"name", "text"}:
        raise UsageError(f"prompts: {file}: each [[{domain}]] has a name and a text, nothing else")
    if not all(isinstance(text, str) and text.strip() for text in entry.values()):
        raise UsageError(f"prompts: {file}: name and text of [[{domain}]] must be non-empty strings")
    return BenchPrompt(domain, entry["name"], entry["text"])


@dataclass(frozen=True, slots=True)
class Workload:
    """What every contender has to do: `repeat` times all prompts, after the first `warmup` of them."""

    prompts: tuple[BenchPrompt, ...]
    options: GenerationOptions
    repeat: int
    warmup: int

    @classmethod
    def of(
        cls,
        file: Path | None,
        domains: str,
        least: int = 1,
        *,
        per_domain: int | None,
        repeat: int,
        warmup: int,
        **options: Any,
    ) -> Workload:
        """Check what the command line was given: `domains` separated by commas, `least` prompts of each or more,
        `options` as for `GenerationOptions.of`. Raises UsageError naming the option, and the errors of
        `load_prompts`."""
        checked = GenerationOptions.of(**options)
        if checked.stopping.max_tokens < 1:
            raise UsageError("max_tokens: a benchmark needs a limit; give 1 or more")
        check_integer("repeat", repeat, 1, 10_000)
        check_integer("warmup", warmup, 0, 10_000)
        if per_domain is not None:
            check_integer("per_domain", per_domain, least, 10_000)
        found = grouped(load_prompts(file, listed(domains), per_domain), lambda prompt: prompt.domain)
        # The first prompt of each domain, then the second of each, …: a short warm-up meets several domains.
        mixed = (prompt for rank in zip_longest(*found.values()) for prompt in rank if prompt is not None)
        return cls(tuple(mixed), checked, repeat, warmup)

    @property
    def temperature(self) -> float:
        return self.options.sampling.temperature

    @property
    def summary(self) -> str:
        """Repetitions and options, for a note."""
        limit = self.options.stopping.max_tokens
        return f"repetitions: {self.repeat}; at most {limit} tokens; temperature {self.temperature:g}."

    def to_json(self) -> dict[str, Any]:
        """Without the prompts."""
        sampling, stopping = self.options.sampling, self.options.stopping
        options = {"max_tokens": stopping.max_tokens, "temperature": self.temperature, "seed": sampling.seed}
        return {"repeat": self.repeat, "warmup": self.warmup, **options}
