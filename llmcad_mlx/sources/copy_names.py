"""Drafts made from other drafts, by name: "4bit:DRAFT" is DRAFT in 4 bits, "trimmed:8192:DRAFT" proposes only the
8192 most usual tokens. DRAFT is whatever else names a draft model, such a copy too: "trimmed:8192:4bit:DRAFT"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmcad_mlx.errors import UsageError
from llmcad_mlx.models.loading import load_model_folder
from llmcad_mlx.sources.kept_copy import kept_copy
from llmcad_mlx.sources.progress import NoProgress, Progress
from llmcad_mlx.sources.quantised_copy import BITS, quantised_copy
from llmcad_mlx.sources.token_counts import usual_tokens
from llmcad_mlx.sources.trimmed_draft import KIND as TRIMMED
from llmcad_mlx.sources.trimmed_draft import write_trimmed_draft

_BITS = re.compile(r"(\d+)bit:(.+)", re.DOTALL)
_TRIMMED = re.compile(r"trimmed:(\d+):(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CopyName:
    """`draft` in so many `bits`, or with an output vocabulary of so many `tokens`; one of the two is None."""

    draft: str
    bits: int | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.prefix}{self.draft}"

    @property
    def prefix(self) -> str:
        """What comes before the draft's name."""
        return f"{self.bits}bit:" if self.bits is not None else f"trimmed:{self.tokens}:"

    @classmethod
    def of(cls, name: str) -> CopyName | None:
        """None for a name of another kind. Raises UsageError for bits that cannot be had, here or further in."""
        copy, found = None, _BITS.fullmatch(name)
        if found is not None:
            bits = next((bits for bits in BITS if found[1] == str(bits)), None)
            if bits is None:
                choices = ", ".join(f"{bits}bit:DRAFT" for bits in BITS)
                raise UsageError(f"draft: {name!r} is not one of {choices}")
            copy = cls(found[2], bits=bits)
        elif (found := _TRIMMED.fullmatch(name)) is not None:
            copy = cls(found[2], tokens=int(found[1]))
        if copy is not None:
            cls.of(copy.draft)
        return copy

    def make(self, source: Path, progress: Progress | None = None) -> Path:
        """The copy of the model in `source`, made where it is not there yet.

        Raises the errors of `quantised_copy` and of `write_trimmed_draft`.
        """
        if self.bits is not None:
            return quantised_copy(source, self.bits, progress, name=str(self))
        return kept_copy(source, TRIMMED, f"{self.tokens}usual", lambda dest: self._trim(source, dest, progress))

    def _trim(self, source: Path, dest: Path, progress: Progress | None) -> None:
        tokenizer = load_model_folder(source, lazy=True, alone=True).tokenizer
        tokens = usual_tokens(tokenizer, self.tokens or 0)
        (progress or NoProgress()).note(f"trimming the vocabulary of {source} to {self.tokens} tokens")
        write_trimmed_draft(source, dest, tokens, progress)
