"""Tokens in, text out: detokenisation, stop strings and the reason a generation ended."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmcad_mlx.settings import StopSettings


class StopStrings:
    """Finds the first stop string in a stream of text pieces, also where it crosses their borders.

    First means complete first; of several that end at the same character, the longest. So the answer does
    not depend on how the text is cut, and is known with the character that completes it. Text before the
    stop string is emitted; the string itself and what follows are not.

    `matched`: a stop string is complete; the text is over. `held`: text that may begin a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self.held = ""
        self.matched = False

    def feed(self, text: str) -> str:
        """Take the next piece; returns what is now safe to show. Only the longest tail that could begin a stop
        string is held back."""
        if not self._stops:
            return text
        text = self.held + text
        starts = ((text.find(stop), len(stop)) for stop in self._stops)
        ends = [(start + length, start) for start, length in starts if start >= 0]
        self.matched = bool(ends)
        shown = min(ends)[1] if ends else self._possible_start(text)
        self.held = "" if ends else text[shown:]
        return text[:shown]

    def _possible_start(self, text: str) -> int:
        """Start of the longest tail of `text` that is the beginning of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(text)


@dataclass(frozen=True, slots=True)
class Piece:
    """One token and the text it adds; `finish_reason` is "stop", "length" or None."""

    token: int
    text: str
    finish_reason: str | None


class Pieces(Protocol):
    """A detokenizer: `push` takes the next token and returns text that is certain now, `flush` the rest."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """Turns one generation's tokens into pieces of text.

    Ends at an end-of-sequence or stop token (its text is not shown), at a stop string (nor is it), or after
    `limit` tokens (None: never).
    """

    def __init__(
        self, detokenizer: Pieces, settings: StopSettings, eos_tokens: Collection[int], limit: int | None
    ) -> None:
        self._detokenizer = detokenizer
        self._ends = set(eos_tokens) | settings.stop_tokens
        self._stops = StopStrings(settings.stop_strings)
        self._left = limit
        self.finish_reason: str | None = None
        self._pieces: list[Piece] = []

    def push(self, token: int) -> bool:
        """Take the next token; True when it is the last. `take` hands out its piece."""
        if self._left is not None:
            self._left -= 1
        detokenizer, stops, text = self._detokenizer, self._stops, ""
        if token not in self._ends:
            text = stops.feed(detokenizer.push(token))
            if stops.matched:
                self.finish_reason = "stop"
        if self.finish_reason is None and (token in self._ends or self._left == 0):
            text += stops.feed(detokenizer.flush()) + stops.held
            self.finish_reason = "stop" if token in self._ends or stops.matched else "length"
        self._pieces.append(Piece(token, text, self.finish_reason))
        return self.finish_reason is not None

    def take(self) -> list[Piece]:
        """The pieces since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces
