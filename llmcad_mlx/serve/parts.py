"""What a model wrote, taken apart as it comes: text, thinking, tool calls."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmcad_mlx.serve.jobs import RoundEvent, TokenEvent

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """Plain text, thinking, finished tool calls (without OpenAI's "index"), their tokens, and the tree of their
    round."""

    text: str = ""
    reasoning: str = ""
    calls: Sequence[Json] = ()
    tokens: Sequence[TokenEvent] = ()
    tree: Json | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    """A stretch of text between markers, which are no text. `end`: "" where it goes on to the next one of its
    kind, None where to the end of the answer. `first_only`: with nothing but calls and thinking before it."""

    kind: Literal["thinking", "call", "json"]
    start: str
    end: str | None
    first_only: bool = False


# Models trained on other markers than their template's write calls as plain JSON.
_JSON_BLOCKS = (
    *(_Block("json", f"```{language}\n{bracket}", "\n```") for language in ("json", "") for bracket in "{["),
    _Block("json", "{", None, first_only=True),
    _Block("json", "[{", None, first_only=True),
)
_DECODER = json.JSONDecoder()
_OBJECT_BEGINS = re.compile(r'\[?\s*\{\s*("|$)')


class AnswerListener:
    """Separates text, thinking and tool calls as the text comes in.

    Each family of models writes them its own way; mlx-lm's tokenizer knows the markers and a parser of calls. What
    may be a call is held back until it is complete. What is none is given as text, markers included, so that
    nothing the model wrote is lost; markers inside of thinking are thinking.
    """

    def __init__(
        self, tokenizer: Any, tools: Sequence[Json] | None, thinking: bool | None = None, one_call: bool = False
    ) -> None:
        """`tokenizer`: mlx-lm's TokenizerWrapper, of a model that calls tools if there are `tools`. `thinking`:
        whether the answer begins within thinking; None for a model that does not think. `one_call`: nothing is
        wanted after the first."""
        self._blocks: list[_Block] = []
        self._block: _Block | None = None
        if thinking is not None:
            self._blocks.append(_Block("thinking", str(tokenizer.think_start), str(tokenizer.think_end)))
            self._block = self._blocks[0] if thinking else None
        if tools is not None:
            self._blocks += (
                _Block("call", str(tokenizer.tool_call_start), str(tokenizer.tool_call_end)),
                *_JSON_BLOCKS,
            )
            self._parse = tokenizer.tool_parser
        self._tools = list(tools or ())
        self._names = {tool["function"]["name"] for tool in self._tools}
        self._one_call = one_call
        self._buffer = ""
        self._parts: list[Part] = []
        self._has_text = False
        self._after_block = False  # where white space is no text
        self.is_complete = False
        """Whether the one call that is wanted is there."""

    def feed(self, text: str) -> Part:
        """What the next piece of text adds."""
        if self.is_complete:
            return Part()
        self._buffer += text
        while self._step():
            pass
        return self._heard()

    def finish(self) -> Part:
        """The end of the text: a call without its end is taken as it is."""
        if self.is_complete:
            return Part()
        if self._block is not None:
            self._close(self._buffer, "")
        else:
            self._show(self._buffer)
        self._buffer = ""
        return self._heard()

    def _step(self) -> bool:
        """Take a marker and what comes before it out of the buffer; False where there is none, and what may begin
        one stays."""
        block, buffer = self._block, self._buffer
        if self.is_complete:
            return False
        if block is None:
            starts = ((buffer.find(one.start), one) for one in self._possible())
            at, block = min(
                ((at, one) for at, one in starts if at >= 0 and not (one.first_only and buffer[:at].strip())),
                key=lambda found: found[0],
                default=(-1, None),
            )
            if block is None:
                self._keep(
                    min((_possible_start(buffer, one.start) for one in self._possible()), default=len(buffer))
                )
                return False
            self._show(buffer[:at])
            self._buffer, self._block = buffer[at + len(block.start) :], block
            return True
        end = block.start if block.end == "" else block.end
        if end is not None and end in buffer:
            before, _, self._buffer = buffer.partition(end)
            self._close(before, block.end or "")
            self._block = block if block.end == "" else None
            return True
        if block.kind == "thinking":
            self._keep(_possible_start(buffer, str(end)))
        elif end is None and not self._may_be_call(block.start + buffer):
            self._show(block.start)
            self._block = None
            return True
        return False

    def _possible(self) -> Iterator[_Block]:
        return (block for block in self._blocks if not (block.first_only and self._has_text))

    def _keep(self, start: int) -> None:
        """Give what is before `start`."""
        self._show(self._buffer[:start])
        self._buffer = self._buffer[start:]

    def _show(self, text: str) -> None:
        if self._block is not None and self._block.kind == "thinking":
            self._parts.append(Part(reasoning=text))
            return
        if self._after_block:
            text = text.lstrip()
        if text:
            self._after_block = False
            self._has_text = self._has_text or not text.isspace()
            self._parts.append(Part(text))

    def _close(self, text: str, end: str) -> None:
        block = self._block
        assert block is not None
        self._after_block = True
        if block.kind == "thinking":
            self._show(text)
            return
        try:
            found = self._parse(text, self._tools) if block.kind == "call" else self._read_json(block.start + text)
            calls = [_call(call) for call in (found if isinstance(found, list) else [found])]
        except Exception:  # parsers of many hands, fed with whatever a model wrote
            self._after_block = False
            self._show(block.start + text + end)
            return
        self.is_complete = self._one_call and bool(calls)
        self._parts.append(Part(calls=calls[:1] if self._one_call else calls))

    def _read_json(self, text: str) -> list[Json]:
        """Calls of the given tools, one after the other or in a list. Raises ValueError for anything else."""
        text = text.removeprefix("```json\n").removeprefix("```\n").rstrip().removesuffix("```").strip()
        calls: list[Json] = []
        while text:
            value, end = _DECODER.raw_decode(text)
            calls += value if isinstance(value, list) else [value]
            text = text[end:].lstrip()
        if not calls or not all(map(self._is_call, calls)):
            raise ValueError("no calls")
        return [
            {"name": call["name"], "arguments": call.get("arguments", call.get("parameters"))} for call in calls
        ]

    def _is_call(self, value: Any) -> bool:
        return (
            isinstance(value, dict)
            and value.get("name") in self._names
            and isinstance(value.get("arguments", value.get("parameters")), dict)
        )

    def _may_be_call(self, text: str) -> bool:
        """Whether more text may still make calls of it."""
        if not _OBJECT_BEGINS.match(text):
            return False
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            return True
        calls = value if isinstance(value, list) else [value]
        return all(map(self._is_call, calls)) and text[end:].lstrip()[:1] in ("", "{")

    def _heard(self) -> Part:
        parts, self._parts = self._parts, []
        return Part(
            "".join(part.text for part in parts),
            "".join(part.reasoning for part in parts),
            [call for part in parts for call in part.calls],
        )


def _call(parsed: Json) -> Json:
    name, arguments = parsed["name"], parsed.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    call_id = str(parsed.get("id") or f"call_{secrets.token_hex(12)}")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _possible_start(text: str, marker: str) -> int:
    """Where the longest tail of `text` begins that could be the beginning of `marker`."""
    starts = range(max(0, len(text) - len(marker) + 1), len(text))
    return next((start for start in starts if marker.startswith(text[start:])), len(text))


class PartMaker:
    """Cuts rounds into parts, one for each piece of text: what becomes one chunk of a stream.

    Tokens that show no text yet go with the next part that has some. Every round's tree is in one part: the
    round's first, or one without text where the whole round shows none.
    """

    def __init__(self, listener: AnswerListener | None) -> None:
        """`listener`: None where the answer is nothing but text."""
        self._listener = listener
        self._held: list[TokenEvent] = []
        self._tree: Json | None = None

    def round(self, event: RoundEvent) -> Iterator[Part]:
        if self._tree is not None:
            yield self._part(Part())
        self._tree = event.tree
        for token in event.tokens:
            self._held.append(token)
            heard = Part(token.text) if self._listener is None else self._listener.feed(token.text)
            if heard.text or heard.reasoning or heard.calls:
                yield self._part(heard)

    def finish(self) -> Part:
        """What is left at the end; it may be empty."""
        return self._part(Part() if self._listener is None else self._listener.finish())

    @property
    def is_complete(self) -> bool:
        """Whether nothing that still comes is wanted."""
        return self._listener is not None and self._listener.is_complete

    def _part(self, heard: Part) -> Part:
        part = replace(heard, tokens=self._held, tree=self._tree)
        self._held, self._tree = [], None
        return part
