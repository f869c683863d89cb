"""Tokens in, text out: detokenisation, stop strings and the reason a generation ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from llmcad_mlx.settings import StopSettings
from llmcad_mlx.stop import StopStrings


@dataclass(frozen=True, slots=True)
class Piece:
    """One token and the text it adds; `finish_reason` is "stop", "length" or None."""

    token: int
    text: str
    finish_reason: str | None


class TextStream:
    """Turns one generation's tokens into pieces of text.

    Ends at an end-of-sequence or stop token (its text is not shown), at a stop string (nor is it), or after
    `limit` tokens (None: never).
    """

    def __init__(
        self, tokenizer: Any, settings: StopSettings, eos_tokens: Collection[int], limit: int | None
    ) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._detokenizer.reset()
        self._ends = set(eos_tokens) | settings.stop_tokens
        self._stops = StopStrings(settings.stop_strings) if settings.stop_strings else None
        self._left = limit
        self.finish_reason: str | None = None
        self._pieces: list[Piece] = []

    def push(self, token: int) -> bool:
        """Take the next token; True when it is the last. `take` hands out its piece."""
        if self._left is not None:
            self._left -= 1
        if token in self._ends:
            return self._end(token, "", "stop")
        self._detokenizer.add_token(token)
        text = self._detokenizer.last_segment
        if self._stops is not None:
            feed = self._stops.feed(text)
            if feed.matched:
                self.finish_reason = "stop"
                self._pieces.append(Piece(token, feed.emit, "stop"))
                return True
            text = feed.emit
        if self._left == 0:
            return self._end(token, text, "length")
        self._pieces.append(Piece(token, text, None))
        return False

    def _end(self, token: int, text: str, reason: str) -> bool:
        self._detokenizer.finalize()
        rest = self._detokenizer.last_segment
        if self._stops is not None:
            feed = self._stops.feed(rest)
            rest = feed.emit if feed.matched else feed.emit + self._stops.flush()
            reason = "stop" if feed.matched else reason
        self.finish_reason = reason
        self._pieces.append(Piece(token, text + rest, reason))
        return True

    def take(self) -> list[Piece]:
        """The pieces since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces
