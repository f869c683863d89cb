"""The ways of decoding that a benchmark compares, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmcad_mlx.errors import UsageError
from llmcad_mlx.settings import SpeculationSettings

PLAIN, MLX_LM, MLX_LM_DRAFT = "plain", "mlx-lm", "mlx-lm-draft"
DEFAULT_VARIANTS = "plain,chain,paper,throughput"

Drafters = Literal["all", "ngram", "wrong", "none"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of decoding. `settings` is None for mlx-lm's own paths, which need no drafters of ours."""

    name: str
    drafters: Drafters
    settings: SpeculationSettings | None

    @property
    def is_mlx_lm(self) -> bool:
        return self.settings is None


def variant_help() -> str:
    """The known names in one line each, for --help and errors."""
    return "; ".join(f"{name} ({meaning})" for name, meaning in _MEANINGS)


_MEANINGS = (
    (PLAIN, "no speculation"),
    ("chain or chain:K", "K drafted tokens in a line"),
    ("paper", "LLMCad's policy"),
    ("throughput", "the default policy"),
    ("tree:N", "N nodes in every pass"),
    ("ngram", "prompt lookup alone"),
    ("wrong", "a draft that is always wrong"),
    ("no-draft", "the default policy without a draft"),
    (MLX_LM, "mlx_lm.stream_generate"),
    (MLX_LM_DRAFT, "the same with its draft_model"),
)


def parse_variants(text: str) -> list[Variant]:
    """The variants of a comma-separated list. Raises UsageError for an unknown, repeated or missing name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"variants: none given; choose from {variant_help()}")
    if len(set(names)) < len(names):
        raise UsageError(f"variants: {text!r} names one twice; name each once")
    return [_variant(name) for name in names]


def needs_mlx_lm(variants: Sequence[Variant]) -> bool:
    """Whether mlx-lm's own copy of the target is wanted."""
    return any(variant.is_mlx_lm for variant in variants)


def _variant(name: str) -> Variant:
    kind, colon, number = name.partition(":")
    if colon:
        return _numbered(name, kind, number)
    speculation = SpeculationSettings
    known = {
        PLAIN: Variant(PLAIN, "none", speculation("plain")),
        "chain": Variant("chain", "all", speculation("chain")),
        "paper": Variant("paper", "all", speculation("paper")),
        "throughput": Variant("throughput", "all", speculation()),
        "ngram": Variant("ngram", "ngram", speculation()),
        "wrong": Variant("wrong", "wrong", speculation()),
        "no-draft": Variant("no-draft", "none", speculation()),
        MLX_LM: Variant(MLX_LM, "none", None),
        MLX_LM_DRAFT: Variant(MLX_LM_DRAFT, "none", None),
    }
    if name not in known:
        raise UsageError(f"variants: {name!r} is unknown; choose from {variant_help()}")
    return known[name]


def _numbered(name: str, kind: str, number: str) -> Variant:
    if kind not in ("chain", "tree") or not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise UsageError(f"variants: {name!r} is unknown; a number goes with chain:K or tree:N and is at least 1")
    if kind == "chain":
        return Variant(name, "all", SpeculationSettings("chain", int(number) + 1))
    return Variant(name, "all", SpeculationSettings("throughput", int(number)))
