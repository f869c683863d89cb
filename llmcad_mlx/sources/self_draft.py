"""`--draft self:4`: the target in fewer bits is its own draft (SubSpec, arXiv 2509.18344)."""

from __future__ import annotations

from pathlib import Path

from llmcad_mlx.errors import UsageError
from llmcad_mlx.sources.progress import Progress
from llmcad_mlx.sources.quantised_copy import quantised_copy

PREFIX = "self:"
BITS = (2, 3, 4)
KIND = "self-drafts"


def self_draft_bits(draft: str) -> int | None:
    """The bits of a draft named like "self:4"; None for every other name. Raises UsageError for other bits."""
    if not draft.startswith(PREFIX):
        return None
    for bits in BITS:
        if draft == f"{PREFIX}{bits}":
            return bits
    choices = ", ".join(f"{PREFIX}{bits}" for bits in BITS)
    raise UsageError(f"draft: {draft!r} is not one of {choices}")


def self_draft(target: Path, bits: int, progress: Progress | None = None) -> Path:
    """The folder of the target's copy in `bits` bits (2, 3 or 4), made where it is not there yet.

    Raises the errors of `quantised_copy`.
    """
    return quantised_copy(target, bits, progress, KIND, f"{PREFIX}{bits}")
