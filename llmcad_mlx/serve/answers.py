"""How an answer goes out: as one JSON object, or as server-sent events.

Tool calls in a model's text: where they begin and end, and what they ask for.

Each family of models writes them its own way; mlx-lm's tokenizer knows the markers and the parser.

From a generation's rounds to the parts of an answer: what becomes one chunk of a stream.

Answers in OpenAI's form: chunks of a stream, or one object.

A job's events as they come, for as long as the client is there.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmcad_mlx.serve.errors import ApiError, JsonResponse, to_json
from llmcad_mlx.serve.job import (
    Event,
    FailedEvent,
    FinishedEvent,
    Job,
    Progress,
    PromptEvent,
    RoundEvent,
    TokenEvent,
    TokenLogprob,
)
from llmcad_mlx.serve.limits import FairQueue
from llmcad_mlx.serve.protocol import GenerationRequest


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


@dataclass(frozen=True, slots=True)
class Part:
    """Text or tool calls, the tokens they came with, and the tree of the round they belong to."""

    text: str
    calls: Sequence[dict[str, Any]]
    tokens: Sequence[TokenEvent]
    tree: dict[str, Any] | None


class PartMaker:
    """Cuts rounds into parts, one for each piece of text.

    Tokens that show no text yet go with the next part that has some. Every round's tree is in one part: the
    round's first, or one without text where the whole round shows none.
    """

    def __init__(self, tools: ToolListener | None) -> None:
        """`tools`: listens for tool calls, None for a request without tools."""
        self._tools = tools
        self._held: list[TokenEvent] = []
        self._tree: dict[str, Any] | None = None

    def round(self, event: RoundEvent) -> Iterator[Part]:
        """The parts of a round."""
        if self._tree is not None:
            yield self._part(Heard())
        self._tree = event.tree
        for token in event.tokens:
            self._held.append(token)
            heard = Heard(token.text) if self._tools is None else self._tools.feed(token.text)
            if heard.text or heard.calls:
                yield self._part(heard)

    def finish(self) -> Part:
        """What is left at the end; it may be empty."""
        return self._part(Heard() if self._tools is None else self._tools.finish())

    def _part(self, heard: Heard) -> Part:
        tokens, self._held = self._held, []
        tree, self._tree = self._tree, None
        return Part(heard.text, heard.calls, tokens, tree)


Json = dict[str, Any]


class Answer(Protocol):
    """The shape of one kind of answer; an answer's objects share id and time."""

    def opening(self) -> list[Json]:
        """Chunks before any text."""

    def chunk(self, part: Part, finish_reason: str | None = None) -> Json:
        """A part as a chunk; the last one has a `finish_reason`."""

    def whole(self, parts: Sequence[Part], finished: FinishedEvent) -> Json:
        """All parts as one object."""

    def usage_chunk(self, finished: FinishedEvent) -> Json:
        """The chunk without choices that ends a stream with usage."""


def make_answer(request: GenerationRequest, model: str) -> Answer:
    """The answer to a request, still empty."""
    return ChatAnswer(request, model) if request.kind == "chat" else CompletionAnswer(request, model)


class _Answer:
    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(self, request: GenerationRequest, model: str) -> None:
        self._request = request
        self._model = model
        self._id = f"{self.id_prefix}-{secrets.token_hex(16)}"
        self._created = int(time.time())

    def _object(self, name: str, choices: list[Json], **more: Any) -> Json:
        head = {"id": self._id, "object": name, "created": self._created, "model": self._model}
        return {**head, "choices": choices, **more}

    def _chunk(self, choices: list[Json], part: Part | None = None) -> Json:
        more: Json = {"usage": None} if self._request.include_usage else {}
        speculation: Json = {}
        if part is not None and self._request.show_tokens and part.tokens:
            speculation["tokens"] = _speculated(part.tokens)
        if part is not None and part.tree is not None:
            speculation["round"] = part.tree
        if speculation:
            more["speculation"] = speculation
        return self._object(self.chunk_name, choices, **more)

    def usage_chunk(self, finished: FinishedEvent) -> Json:
        return self._object(self.chunk_name, [], usage=finished.usage)

    def _whole(self, choice: Json, parts: Sequence[Part], finished: FinishedEvent) -> Json:
        more: Json = {"usage": finished.usage}
        speculation: Json = {}
        if self._request.show_tokens:
            speculation["tokens"] = _speculated(_tokens(parts))
        if self._request.show_trees:
            speculation["rounds"] = [part.tree for part in parts if part.tree is not None]
        if speculation:
            more["speculation"] = speculation
        return self._object(self.object_name, [choice], **more)

    @property
    def _wants_logprobs(self) -> bool:
        return self._request.top_logprobs is not None


class ChatAnswer(_Answer):
    """chat.completion and its chunks."""

    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, request: GenerationRequest, model: str) -> None:
        super().__init__(request, model)
        self._num_calls = 0

    def opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def chunk(self, part: Part, finish_reason: str | None = None) -> Json:
        delta: Json = {"content": part.text} if part.text else {}
        if part.calls:
            numbered = enumerate(part.calls, self._num_calls)
            delta["tool_calls"] = [{"index": index, **call} for index, call in numbered]
            self._num_calls += len(part.calls)
        reason = _reason(finish_reason, self._num_calls) if finish_reason else None
        logprobs = _chat_logprobs(part.tokens) if self._wants_logprobs and part.tokens else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk([choice], part)

    def whole(self, parts: Sequence[Part], finished: FinishedEvent) -> Json:
        calls = [call for part in parts for call in part.calls]
        text = "".join(part.text for part in parts)
        message: Json = {
            "role": "assistant",
            "content": (text.rstrip() or None) if calls else text,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _chat_logprobs(_tokens(parts)) if self._wants_logprobs else None,
            "finish_reason": _reason(finished.finish_reason, len(calls)),
        }
        return self._whole(choice, parts, finished)


class CompletionAnswer(_Answer):
    """text_completion, whose chunks have the same form."""

    object_name, chunk_name, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, request: GenerationRequest, model: str) -> None:
        super().__init__(request, model)
        self._offset = 0

    def opening(self) -> list[Json]:
        return []

    def chunk(self, part: Part, finish_reason: str | None = None) -> Json:
        return self._chunk([self._choice(part.text, part.tokens, finish_reason)], part)

    def whole(self, parts: Sequence[Part], finished: FinishedEvent) -> Json:
        text = "".join(part.text for part in parts)
        return self._whole(self._choice(text, _tokens(parts), finished.finish_reason), parts, finished)

    def _choice(self, text: str, tokens: Sequence[TokenEvent], finish_reason: str | None) -> Json:
        logprobs = self._logprobs(tokens) if self._wants_logprobs and tokens else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> Json:
        """The older form: lists side by side, with where each token's text begins."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [_known(token).text for token in tokens],
            "token_logprobs": [_known(token).logprob for token in tokens],
            "top_logprobs": [{top.text: top.logprob for top in token.top_logprobs} for token in tokens],
            "text_offset": offsets,
        }


def _tokens(parts: Sequence[Part]) -> list[TokenEvent]:
    return [token for part in parts for token in part.tokens]


def _reason(reason: str, num_calls: int) -> str:
    return "tool_calls" if num_calls and reason == "stop" else reason


def _speculated(tokens: Sequence[TokenEvent]) -> list[Json]:
    return [{"id": token.token, "text": token.text, "from_draft": token.from_draft} for token in tokens]


def _chat_logprobs(tokens: Sequence[TokenEvent]) -> Json:
    content = []
    for token in tokens:
        top = [_logprob(other) for other in token.top_logprobs]
        content.append({**_logprob(_known(token)), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _known(token: TokenEvent) -> TokenLogprob:
    assert token.logprob is not None  # asked for, so the worker looked
    return token.logprob


def _logprob(entry: TokenLogprob) -> Json:
    # A token may be part of a character: then its text is a stand-in, and its bytes are not known.
    known = "\ufffd" not in entry.text
    return {
        "token": entry.text,
        "logprob": entry.logprob,
        "bytes": list(entry.text.encode()) if known else None,
    }


class ClientGoneError(Exception):
    """The client closed the connection."""


class Listener:
    """Hands out a job's events; an asynchronous context manager.

    Whoever leaves it before the job has ended (the client gone, an error, the server going down) cancels the
    job: it loses its place in the queue, or its generation ends within the round.
    """

    def __init__(self, job: Job, queue: FairQueue[Job], receive: Receive) -> None:
        """`receive`: the connection's, its body read to the end."""
        self._job = job
        self._queue = queue
        self._receive = receive
        self._next: asyncio.Task[Event] | None = None
        self._ended = False

    async def __aenter__(self) -> Listener:
        self._gone = asyncio.create_task(self._wait_until_gone())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gone.cancel()
        if self._next is not None:
            self._next.cancel()
        if not self._ended:
            self._job.cancel()
            self._queue.remove(self._job.client, self._job)

    async def next(self, timeout_s: float | None = None) -> Progress | None:
        """The next event; None after `timeout_s` without one.

        Raises ClientGoneError, and the ApiError of a job that failed.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._job.events.get())
        done, _ = await asyncio.wait(
            {self._next, self._gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if self._gone in done:
            raise ClientGoneError
        if not done:
            return None
        event, self._next = self._next.result(), None
        if isinstance(event, FailedEvent):
            self._ended = True
            raise event.error
        self._ended = isinstance(event, FinishedEvent)
        return event

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


_DONE = b"data: [DONE]\n\n"
_GONE = 499  # nobody reads it; the counters do


class GenerationResponse(Response):
    """Waits for a job's answer and sends it, streamed or whole.

    The status is known when the job's turn has come; a stream that has waited `keepalive_s` for that begins
    without, and says what goes wrong later as an event of its own.
    """

    def __init__(
        self, job: Job, queue: FairQueue[Job], answer: Answer, parts: PartMaker, keepalive_s: float
    ) -> None:
        super().__init__()
        self._job = job
        self._queue = queue
        self._answer = answer
        self._parts = parts
        self._keepalive_s = keepalive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with Listener(self._job, self._queue, receive) as listener:
            try:
                if self._job.request.stream:
                    await self._stream(listener, send)
                else:
                    await JsonResponse(await self._whole(listener))(scope, receive, send)
            except (ClientGoneError, OSError):  # servers differ in what a send to nobody does
                if not self._job.request.stream:
                    await Response(status_code=_GONE)(scope, receive, send)

    async def _whole(self, listener: Listener) -> Any:
        made: list[Part] = []
        while True:
            event = await listener.next()
            if isinstance(event, RoundEvent):
                made.extend(self._parts.round(event))
            elif isinstance(event, FinishedEvent):
                return self._answer.whole([*made, self._parts.finish()], event)

    async def _stream(self, listener: Listener, send: Send) -> None:
        await listener.next(self._keepalive_s)  # raises what keeps it from beginning
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for piece in self._pieces(listener):
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": _event(error.body) + _DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self, listener: Listener) -> AsyncIterator[bytes]:
        yield _joined(self._answer.opening())
        while True:
            event = await listener.next(self._keepalive_s)
            if event is None:
                yield b": still working\n\n"
            elif isinstance(event, PromptEvent):
                yield b": prompt %d of %d\n\n" % (event.done, event.total)
            elif isinstance(event, RoundEvent):
                yield _joined([self._answer.chunk(part) for part in self._parts.round(event)])
            else:
                yield self._last(event)
                return

    def _last(self, event: FinishedEvent) -> bytes:
        chunks = [self._answer.chunk(self._parts.finish(), event.finish_reason)]
        if self._job.request.include_usage:
            chunks.append(self._answer.usage_chunk(event))
        return _joined(chunks) + _DONE


def _joined(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(map(_event, chunks))


def _event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
