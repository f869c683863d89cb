"""How an answer goes out: in OpenAI's form, as one JSON object or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from abc import ABC, abstractmethod
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llmcad_mlx.serve.jobs import (
    FairQueue,
    FinishedEvent,
    Job,
    Progress,
    RoundEvent,
    TokenEvent,
    TokenLogprob,
)
from llmcad_mlx.serve.protocol import ApiError, GenerationRequest, shutting_down, to_json

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


class Answer(ABC):
    """The shape of one kind of answer, whole or in chunks, which share id and time."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(self, request: GenerationRequest, model: str) -> None:
        self._request = request
        self._model = model
        self._id = f"{self.id_prefix}-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._num_calls = 0

    def opening(self) -> list[Json]:
        """Chunks before any text."""
        return []

    def chunk(self, part: Part, finish_reason: str | None = None) -> Json:
        """A part as a chunk; the last one has a `finish_reason`."""
        choice = self._choice(part, finish_reason, is_whole=False)
        return self._chunk([choice], **self._speculation(part.tokens, round=part.tree))

    def whole(self, parts: Sequence[Part], finished: FinishedEvent) -> Json:
        """All parts as one object."""
        joined = Part(
            "".join(part.text for part in parts),
            "".join(part.reasoning for part in parts),
            [call for part in parts for call in part.calls],
            [token for part in parts for token in part.tokens],
        )
        choice = self._choice(joined, finished.finish_reason, is_whole=True)
        trees = [part.tree for part in parts if part.tree is not None]
        speculation = self._speculation(joined.tokens, rounds=trees)
        return self._object(self.object_name, [choice], usage=finished.usage, **speculation)

    def closing(self, part: Part, finished: FinishedEvent) -> list[Json]:
        """The last chunks: what is left of the text, and the usage where asked for."""
        chunks = [self.chunk(part, finished.finish_reason)]
        if self._request.include_usage:
            chunks.append(self._object(self.chunk_name, [], usage=finished.usage))
        return chunks

    def _choice(self, part: Part, finish_reason: str | None, *, is_whole: bool) -> Json:
        said = self._said(part, is_whole)
        self._num_calls += len(part.calls)
        # Where one call is all that is wanted, the limit may be reached before the generation is told to end.
        is_call = self._num_calls and (finish_reason == "stop" or (finish_reason and self._request.one_call))
        has_logprobs = self._request.top_logprobs is not None and len(part.tokens) > 0
        return {
            "index": 0,
            **said,
            "logprobs": self._logprobs(part.tokens) if has_logprobs else None,
            "finish_reason": "tool_calls" if is_call else finish_reason,
        }

    @abstractmethod
    def _said(self, part: Part, is_whole: bool) -> Json:
        """The part's text and calls; `_num_calls` came before them."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[TokenEvent]) -> Json: ...

    def _chunk(self, choices: list[Json], **more: Any) -> Json:
        usage = {"usage": None} if self._request.include_usage else {}
        return self._object(self.chunk_name, choices, **usage, **more)

    def _object(self, name: str, choices: list[Json], **more: Any) -> Json:
        head = {"id": self._id, "object": name, "created": self._created, "model": self._model}
        return {**head, "choices": choices, **more}

    def _speculation(self, tokens: Sequence[TokenEvent], **trees: Any) -> Json:
        found = {name: tree for name, tree in trees.items() if tree}
        if self._request.show_tokens and tokens:
            told = [{"id": token.token, "text": token.text, "from_draft": token.from_draft} for token in tokens]
            found = {"tokens": told, **found}
        return {"speculation": found} if found else {}


class ChatAnswer(Answer):
    """chat.completion and its chunks."""

    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def _said(self, part: Part, is_whole: bool) -> Json:
        if is_whole:
            text = part.text.rstrip() or None if part.calls else part.text
            more: Json = {"reasoning": part.reasoning} if part.reasoning else {}
            if part.calls:
                more["tool_calls"] = part.calls
            return {"message": {"role": "assistant", "content": text, "refusal": None, **more}}
        delta: Json = {"content": part.text} if part.text else {}
        if part.reasoning:
            delta["reasoning"] = part.reasoning
        if part.calls:
            numbered = enumerate(part.calls, self._num_calls)
            delta["tool_calls"] = [{"index": index, **call} for index, call in numbered]
        return {"delta": delta}

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> Json:
        content = []
        for token in tokens:
            own, *top = map(_logprob, token.logprobs)
            content.append({**own, "top_logprobs": top})
        return {"content": content, "refusal": None}


def _logprob(entry: TokenLogprob) -> Json:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.content)}


class CompletionAnswer(Answer):
    """text_completion, whose chunks have the same form."""

    object_name, chunk_name, id_prefix = "text_completion", "text_completion", "cmpl"
    _offset = 0

    def _said(self, part: Part, is_whole: bool) -> Json:
        return {"text": part.text}

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> Json:
        """The older form: lists side by side, with where each token's text begins."""
        ends = [*accumulate((len(token.text) for token in tokens), initial=self._offset)]
        self._offset = ends.pop()
        return {
            "tokens": [token.logprobs[0].text for token in tokens],
            "token_logprobs": [token.logprobs[0].logprob for token in tokens],
            "top_logprobs": [_by_text(*token.logprobs) for token in tokens],
            "text_offset": ends,
        }


def _by_text(chosen: TokenLogprob, *likeliest: TokenLogprob) -> dict[str, float]:
    """Log probabilities by text. Of tokens with one text the chosen one has it, else the likeliest; the others are
    there by their ids."""
    found: dict[str, float] = {}
    for one in likeliest if chosen in likeliest else (*likeliest, chosen):
        is_taken = one.text in found or (one.text == chosen.text and one != chosen)
        found[f"token_id:{one.token}" if is_taken else one.text] = one.logprob
    return found


_DONE = b"data: [DONE]\n\n"
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """Waits for a job's answer and sends it, streamed or whole. Its status is known when the job's turn has come:
    a stream that has waited `keepalive_s` for that begins without, and tells of what goes wrong in an event."""

    job: Job
    queue: FairQueue
    answer: Answer
    parts: PartMaker
    keepalive_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._progress(receive)) as progress:
            with suppress(ClientDisconnect, OSError):  # servers differ in what a send to nobody does
                if self.job.request.stream:
                    await self._stream(progress, send)
                else:
                    await JSONResponse(await self._whole(progress))(scope, receive, send)

    async def _progress(self, receive: Receive) -> AsyncGenerator[Progress | None]:
        """The job's events to its end, None after every `keepalive_s` without one. Close it when you leave it.

        Raises ClientDisconnect, and the ApiError of a job that failed. Whoever leaves before the job has ended
        (the client gone, an error, the server going down) cancels it: it loses its place in the queue, or its
        generation ends within the round.
        """
        gone = asyncio.create_task(_wait_until_gone(receive))
        coming = asyncio.create_task(self.job.events.get())
        has_ended = False
        try:
            while not has_ended:
                done, _ = await asyncio.wait({coming, gone}, timeout=self.keepalive_s, return_when=FIRST_COMPLETED)
                if gone in done:
                    raise ClientDisconnect
                if not done:
                    yield None
                    continue
                event = coming.result()
                has_ended = isinstance(event, FinishedEvent | ApiError)
                if isinstance(event, ApiError):
                    raise event
                if not has_ended:
                    coming = asyncio.create_task(self.job.events.get())
                yield event
        finally:
            gone.cancel()
            coming.cancel()
            if not has_ended:
                self.job.cancel(shutting_down())
                self.queue.remove(self.job)

    async def _whole(self, progress: AsyncIterator[Progress | None]) -> Json:
        made: list[Part] = []
        async for event in progress:
            if isinstance(event, RoundEvent):
                made.extend(self._parts_of(event))
            elif isinstance(event, FinishedEvent):
                return self.answer.whole([*made, self.parts.finish()], event)
        raise AssertionError("a job ends with an event")

    def _parts_of(self, event: RoundEvent) -> Iterator[Part]:
        yield from self.parts.round(event)
        self.job.is_complete = self.parts.is_complete

    async def _stream(self, progress: AsyncIterator[Progress | None], send: Send) -> None:
        await anext(progress)  # raises what keeps it from beginning
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            await _send_piece(send, _events(self.answer.opening()))
            last = time.monotonic()
            async for event in progress:
                piece = self._piece(event)
                if event is None or (not piece and time.monotonic() - last >= self.keepalive_s):
                    piece = b": still working\n\n"
                if piece:
                    await _send_piece(send, piece)
                    last = time.monotonic()
        except ApiError as error:
            await _send_piece(send, _events([error.body]) + _DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _piece(self, event: Progress | None) -> bytes:
        """What a stream gets for an event; nothing for one that shows nothing."""
        match event:
            case RoundEvent():
                return _events([self.answer.chunk(part) for part in self._parts_of(event)])
            case FinishedEvent():
                return _events(self.answer.closing(self.parts.finish(), event)) + _DONE
        return b""


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_piece(send: Send, piece: bytes) -> None:
    if piece:
        await send({"type": "http.response.body", "body": piece, "more_body": True})


def _events(chunks: Sequence[Json]) -> bytes:
    return b"".join(b"data: " + to_json(chunk) + b"\n\n" for chunk in chunks)
