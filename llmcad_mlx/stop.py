"""Stop strings in streamed text, also where they cross token borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmcad_mlx.errors import UsageError


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
