"""How an answer goes out: in OpenAI's form, as one JSON object or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llmcad_mlx.serve.jobs import (
    FairQueue,
    FinishedEvent,
    Job,
    Progress,
    PromptEvent,
    RoundEvent,
    TokenEvent,
    TokenLogprob,
)
from llmcad_mlx.serve.protocol import ApiError, GenerationRequest, shutting_down, to_json

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """Plain text, finished tool calls (without OpenAI's "index"), their tokens, and the tree of their round."""

    text: str = ""
    calls: Sequence[Json] = ()
    tokens: Sequence[TokenEvent] = ()
    tree: Json | None = None


class ToolListener:
    """Separates text from tool calls as the text comes in.

    Each family of models writes calls its own way; mlx-lm's tokenizer knows the markers and the parser. Text
    between the markers is held back until the call is complete. What cannot be parsed is given as text, markers
    included, so that nothing the model wrote is lost.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Json]) -> None:
        """`tokenizer`: mlx-lm's TokenizerWrapper of a model that calls tools."""
        self._start = str(tokenizer.tool_call_start)
        self._end = str(tokenizer.tool_call_end)  # "": a call goes on to the next one, or to the end
        self._parse = tokenizer.tool_parser
        self._tools = list(tools)
        self._buffer = ""
        self._inside = False
        self._after_call = False

    def feed(self, text: str) -> Part:
        """What the next piece of text adds."""
        self._buffer += text
        shown: list[str] = []
        calls: list[Json] = []
        while (marker := (self._end or self._start) if self._inside else self._start) in self._buffer:
            before, _, self._buffer = self._buffer.partition(marker)
            heard = self._close(before, self._end) if self._inside else Part(self._visible(before))
            shown.append(heard.text)
            calls.extend(heard.calls)
            self._inside = not self._inside or not self._end  # without an end marker, the next call has begun
        if not self._inside:
            keep = _possible_start(self._buffer, self._start)
            shown.append(self._visible(self._buffer[:keep]))
            self._buffer = self._buffer[keep:]
        return Part("".join(shown), calls)

    def finish(self) -> Part:
        """The end of the text: a call without its end is taken as it is."""
        return self._close(self._buffer, "") if self._inside else Part(self._visible(self._buffer))

    def _close(self, text: str, end: str) -> Part:
        try:
            parsed = self._parse(text, self._tools)
            calls = [_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # parsers of many hands, fed with whatever a model wrote
            return Part(self._start + text + end)
        self._after_call = True
        return Part(calls=calls)

    def _visible(self, text: str) -> str:
        """Without the white space after a call, which is no text."""
        if self._after_call and (text := text.lstrip()):
            self._after_call = False
        return text


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

    def __init__(self, tools: ToolListener | None) -> None:
        """`tools`: listens for tool calls, None for a request without tools."""
        self._tools = tools
        self._held: list[TokenEvent] = []
        self._tree: Json | None = None

    def round(self, event: RoundEvent) -> Iterator[Part]:
        if self._tree is not None:
            yield self._part(Part())
        self._tree = event.tree
        for token in event.tokens:
            self._held.append(token)
            heard = Part(token.text) if self._tools is None else self._tools.feed(token.text)
            if heard.text or heard.calls:
                yield self._part(heard)

    def finish(self) -> Part:
        """What is left at the end; it may be empty."""
        return self._part(Part() if self._tools is None else self._tools.finish())

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
        has_logprobs = self._request.top_logprobs is not None and len(part.tokens) > 0
        return {
            "index": 0,
            **said,
            "logprobs": self._logprobs(part.tokens) if has_logprobs else None,
            "finish_reason": "tool_calls" if self._num_calls and finish_reason == "stop" else finish_reason,
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
            calls: Json = {"tool_calls": part.calls} if part.calls else {}
            return {"message": {"role": "assistant", "content": text, "refusal": None, **calls}}
        delta: Json = {"content": part.text} if part.text else {}
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
    # A token may be part of a character: then its text is a stand-in, and its bytes are not known.
    known = None if "\ufffd" in entry.text else list(entry.text.encode())
    return {"token": entry.text, "logprob": entry.logprob, "bytes": known}


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
            "top_logprobs": [{top.text: top.logprob for top in token.logprobs[1:]} for token in tokens],
            "text_offset": ends,
        }


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
                made.extend(self.parts.round(event))
            elif isinstance(event, FinishedEvent):
                return self.answer.whole([*made, self.parts.finish()], event)
        raise AssertionError("a job ends with an event")

    async def _stream(self, progress: AsyncIterator[Progress | None], send: Send) -> None:
        await anext(progress)  # raises what keeps it from beginning
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            await _send_piece(send, _events(self.answer.opening()))
            async for event in progress:
                await _send_piece(send, self._piece(event))
        except ApiError as error:
            await _send_piece(send, _events([error.body]) + _DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _piece(self, event: Progress | None) -> bytes:
        """What a stream gets for an event; nothing for a round that shows nothing."""
        match event:
            case None:
                return b": still working\n\n"
            case PromptEvent():
                return b": prompt %d of %d\n\n" % (event.done, event.total)
            case RoundEvent():
                return _events([self.answer.chunk(part) for part in self.parts.round(event)])
            case FinishedEvent():
                return _events(self.answer.closing(self.parts.finish(), event)) + _DONE


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_piece(send: Send, piece: bytes) -> None:
    if piece:
        await send({"type": "http.response.body", "body": piece, "more_body": True})


def _events(chunks: Sequence[Json]) -> bytes:
    return b"".join(b"data: " + to_json(chunk) + b"\n\n" for chunk in chunks)
