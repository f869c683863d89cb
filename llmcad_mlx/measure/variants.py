"""The ways of decoding that a benchmark compares, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from llmcad_mlx.errors import UsageError
from llmcad_mlx.settings import SpeculationSettings

PLAIN, PLAIN_EQUAL, MLX_LM, MLX_LM_DRAFT = "plain", "plain-equal", "mlx-lm", "mlx-lm-draft"
ABLATION = "ablation"
DEFAULT_VARIANTS = "plain,chain,paper,throughput"

Drafters = Literal["all", "draft", "ngram", "wrong", "none"]

_ADAPTIVE = ("paper", "throughput")
_PARTS = ("tree", "fallback", "pipeline")
_FORCED = ("tree", "draft")

_MEANINGS = (
    (PLAIN, "no speculation"),
    (PLAIN_EQUAL, "the same, with more of the target pinned instead of a draft"),
    ("chain or chain:K", "K drafted tokens in a line"),
    ("paper", "LLMCad's policy"),
    ("throughput", "the default policy"),
    ("paper-no-X and throughput-no-X", f"without one or more of {', '.join(_PARTS)}"),
    (ABLATION, "plain, both policies, and both without each part and without all"),
    ("tree:N", "N nodes in every pass"),
    ("draft:N", "the same by the draft alone, without prompt lookup"),
    ("ngram", "prompt lookup alone"),
    ("wrong", "a draft that is always wrong"),
    ("no-draft", "the default policy without a draft"),
    (MLX_LM, "mlx_lm.stream_generate"),
    (MLX_LM_DRAFT, "the same with its draft_model"),
)


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


def variant_help() -> str:
    """The known names in one line each, for --help and errors."""
    return "; ".join(f"{name} ({meaning})" for name, meaning in _MEANINGS)


def parse_variants(text: str) -> list[Variant]:
    """The variants of a comma-separated list. Raises UsageError for an unknown, repeated or missing name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = [name for given in names for name in (_ablation() if given == ABLATION else [given])]
    if not names:
        raise UsageError(f"variants: none given; choose from {variant_help()}")
    if len(set(names)) < len(names):
        raise UsageError(f"variants: {text!r} names one twice; name each once")
    return [_variant(name) for name in names]


def _ablation() -> list[str]:
    """Both policies whole, without each of their parts, and without all of them."""
    without = ["", *(f"-no-{part}" for part in _PARTS), "".join(f"-no-{part}" for part in _PARTS)]
    return [PLAIN, *(policy + parts for policy in _ADAPTIVE for parts in without)]


@dataclass(frozen=True, slots=True)
class Ablated:
    """What a name says of an adaptive policy: which one, and the parts it is without."""

    policy: str
    missing: tuple[str, ...]


def ablated(name: str) -> Ablated | None:
    """Of "paper", "throughput" and either without parts; None for every other variant."""
    policy, *missing = name.split("-no-")
    return Ablated(policy, tuple(missing)) if policy in _ADAPTIVE else None


def forced_nodes(name: str) -> int | None:
    """N of "tree:N" and "draft:N", None for every other variant."""
    kind, _, number = name.partition(":")
    return int(number) if kind in _FORCED and number else None


def _variant(name: str) -> Variant:
    kind, colon, number = name.partition(":")
    if colon:
        return _numbered(name, kind, number)
    default = SpeculationSettings()
    known = {
        PLAIN: Variant(PLAIN, "none", SpeculationSettings("plain")),
        PLAIN_EQUAL: Variant(PLAIN_EQUAL, "none", SpeculationSettings("plain"), equal_memory=True),
        "chain": Variant("chain", "all", SpeculationSettings("chain")),
        "paper": Variant("paper", "all", SpeculationSettings("paper")),
        "throughput": Variant("throughput", "all", default),
        "ngram": Variant("ngram", "ngram", default),
        "wrong": Variant("wrong", "wrong", default),
        "no-draft": Variant("no-draft", "none", default),
        MLX_LM: Variant(MLX_LM, "none", None),
        MLX_LM_DRAFT: Variant(MLX_LM_DRAFT, "none", None),
    }
    parts = ablated(name)
    if parts is not None and parts.missing and sorted(parts.missing) == sorted(set(parts.missing) & set(_PARTS)):
        whole = known[parts.policy].settings or default
        kept: dict[str, Any] = {part: part not in parts.missing for part in _PARTS}
        return Variant(name, "all", replace(whole, **kept))
    if name not in known:
        raise UsageError(f"variants: {name!r} is unknown; choose from {variant_help()}")
    return known[name]


def _numbered(name: str, kind: str, number: str) -> Variant:
    if kind not in ("chain", *_FORCED) or not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise UsageError(
            f"variants: {name!r} is unknown; a number goes with chain:K, tree:N or draft:N and is at least 1"
        )
    if kind == "chain":
        return Variant(name, "all", SpeculationSettings("chain", int(number) + 1))
    return Variant(name, "draft" if kind == "draft" else "all", SpeculationSettings("throughput", int(number)))
