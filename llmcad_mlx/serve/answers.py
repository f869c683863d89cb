"""Answers in OpenAI's form: chunks of a stream, or one object."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from llmcad_mlx.serve.events import FinishedEvent, TokenEvent, TokenLogprob
from llmcad_mlx.serve.parts import Part
from llmcad_mlx.serve.requests import GenerationRequest

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
