"""Typed reading of GGUF metadata fields, one clear error for each that is missing or of the wrong kind."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.gguf_cursor import Value
from llmcad_mlx.sources.gguf_header import GgufHeader

MAX_FAMILY_LENGTH = 64  # errors repeat it

T = TypeVar("T", str, int, float, bool)


@dataclass(frozen=True, slots=True)
class Metadata:
    """The fields of one file. `prefix` is the family's name, put before keys that start with a dot."""

    path: Path
    fields: dict[str, Value]
    prefix: str

    @staticmethod
    def of(header: GgufHeader) -> Metadata:
        """Raises ModelError when the file does not name its architecture."""
        family = header.metadata.get("general.architecture")
        if not isinstance(family, str) or len(family) > MAX_FAMILY_LENGTH:
            raise ModelError(f"{header.path}: GGUF file without general.architecture; it is not a model")
        return Metadata(header.path, header.metadata, family)

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number. A per-layer array of equal numbers counts as that number."""
        value = self.fields.get(self._full(key))
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            first = value[0]
            if isinstance(first, int) and not isinstance(first, bool):
                return first
        return self._typed(key, int, default)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise self.wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 field as the shortest decimal that is the same float32: 1e-06, not 9.99999997e-07."""
        value = self._typed(key, float, default)
        if not math.isfinite(value):
            raise self.wrong(key, value)
        return shortest_float32(value)

    def above_zero(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, value)
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._typed(key, bool, default)

    def texts(self, key: str) -> list[str]:
        value = self.fields.get(self._full(key))
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, type(value).__name__)
        return [str(item) for item in value]

    def integers(self, key: str) -> list[int]:
        value = self.fields.get(self._full(key))
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.wrong(key, type(value).__name__)
        return [int(item) for item in value]

    def numbers(self, key: str) -> list[float]:
        value = self.fields.get(self._full(key))
        if not isinstance(value, list) or not all(isinstance(item, float) for item in value):
            raise self.wrong(key, type(value).__name__)
        return [float(item) for item in value]

    def has(self, key: str) -> bool:
        return self._full(key) in self.fields

    def wrong(self, key: str, value: object) -> ModelError:
        """The error for a field that is missing or cannot be used."""
        short = reprlib.Repr()  # one line, even where a file holds a list of millions
        short.maxstring = short.maxother = 80
        shown = short.repr(value)
        return ModelError(f"{self.path}: GGUF field {self._full(key)} is missing or unusable ({shown})")

    def _full(self, key: str) -> str:
        return self.prefix + key if key.startswith(".") else key

    def _typed(self, key: str, kind: type[T], default: T | None) -> T:
        value = self.fields.get(self._full(key), default)
        if type(value) is not kind:
            raise self.wrong(key, value)
        return value


def shortest_float32(value: float) -> float:
    """The shortest decimal that is the same float32."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= abs(value) * 2**-25:
            return short
    return value
