"""Tool calls in a model's text: where they begin and end, and what they ask for.

Each family of models writes them its own way; mlx-lm's tokenizer knows the markers and the parser.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Heard:
    """Plain text, and finished tool calls as OpenAI has them (without "index")."""

    text: str = ""
    calls: Sequence[dict[str, Any]] = field(default_factory=tuple)


class ToolListener:
    """Separates text from tool calls as the text comes in.

    Text between the markers is held back until the call is complete. What cannot be parsed is given as text,
    markers included, so that nothing the model wrote is lost.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[dict[str, Any]]) -> None:
        """`tokenizer`: mlx-lm's TokenizerWrapper of a model that calls tools."""
        self._start = str(tokenizer.tool_call_start)
        self._end = str(tokenizer.tool_call_end)  # "": a call goes on to the next one, or to the end
        self._parse = tokenizer.tool_parser
        self._tools = list(tools)
        self._buffer = ""
        self._inside = False
        self._called = False

    def feed(self, text: str) -> Heard:
        """Take the next piece of text."""
        self._buffer += text
        shown: list[str] = []
        calls: list[dict[str, Any]] = []
        while (cut := self._next_marker()) is not None:
            before, self._buffer = self._buffer[: cut[0]], self._buffer[cut[1] :]
            if self._inside:
                self._close(before, shown, calls)
                self._inside = not self._end  # without an end marker, the next call has begun
            else:
                shown.append(self._visible(before))
                self._inside = True
        if not self._inside:
            keep = _possible_start(self._buffer, self._start)
            shown.append(self._visible(self._buffer[:keep]))
            self._buffer = self._buffer[keep:]
        return Heard("".join(shown), calls)

    def finish(self) -> Heard:
        """The end of the text: a call without its end is taken as it is."""
        rest, self._buffer = self._buffer, ""
        if not self._inside:
            return Heard(self._visible(rest))
        self._inside = False
        shown: list[str] = []
        calls: list[dict[str, Any]] = []
        self._close(rest, shown, calls, end="")
        return Heard("".join(shown), calls)

    def _next_marker(self) -> tuple[int, int] | None:
        marker = (self._end or self._start) if self._inside else self._start
        at = self._buffer.find(marker)
        return None if at < 0 else (at, at + len(marker))

    def _close(self, text: str, shown: list[str], calls: list[dict[str, Any]], end: str | None = None) -> None:
        found = self._parsed(text)
        if found is None:
            shown.append(self._start + text + (self._end if end is None else end))
        else:
            calls.extend(found)
            self._called = True

    def _parsed(self, text: str) -> list[dict[str, Any]] | None:
        try:
            parsed = self._parse(text, self._tools)
            return [_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # parsers of many hands, fed with whatever a model wrote
            return None

    def _visible(self, text: str) -> str:
        """Without the white space after a call, which is no text."""
        if self._called and (text := text.lstrip()):
            self._called = False
        return text


def _call(parsed: dict[str, Any]) -> dict[str, Any]:
    name, arguments = parsed["name"], parsed.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    return {
        "id": str(parsed.get("id") or f"call_{secrets.token_hex(12)}"),
        "type": "function",
        "function": {
            "name": name,
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
        },
    }


def _possible_start(text: str, marker: str) -> int:
    """Where the longest tail of `text` begins that could be the beginning of `marker`."""
    for start in range(max(0, len(text) - len(marker) + 1), len(text)):
        if marker.startswith(text[start:]):
            return start
    return len(text)
