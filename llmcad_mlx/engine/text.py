"""Tokens in, text out: detokenisation, stop strings and the reason a generation ended.

Stop strings in streamed text, also where they cross token borders.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from llmcad_mlx.errors import UsageError
from llmcad_mlx.settings import StopSettings


@dataclass(frozen=True, slots=True)
class StopFeed:
    """`emit`: text that is now safe to show. `matched`: a stop string is complete; the text is over."""

    emit: str
    matched: bool


class StopStrings:
    """Finds the first stop string in a stream of text pieces.

    First means complete first; of several that end at the same character, the longest. So the answer does
    not depend on how the text is cut, and is known with the character that completes it. Text before the
    stop string is emitted; the string itself and what follows are not.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises UsageError when `stops` is not a list or tuple of non-empty strings."""
        if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError("stop: give a list of non-empty strings")
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._matched = False

    def feed(self, text: str) -> StopFeed:
        """Take the next piece. Only the longest tail that could begin a stop string is held back.

        After a match every further piece is swallowed.
        """
        if self._matched:
            return StopFeed("", True)
        text = self._held + text
        start = self._find(text)
        if start is not None:
            self._matched = True
            self._held = ""
            return StopFeed(text[:start], True)
        keep = self._possible_start(text)
        self._held = text[keep:]
        return StopFeed(text[:keep], False)

    def flush(self) -> str:
        """The held text, at the end of the stream: it began like a stop string and was none."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Where the stop string that is complete first begins."""
        starts = ((text.find(stop), len(stop)) for stop in self._stops)
        ends = [(start + length, start) for start, length in starts if start >= 0]
        return min(ends)[1] if ends else None

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
