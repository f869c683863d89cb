"""An engine on another machine: `Engine`'s methods over HTTP, in pure Python, for devices without MLX."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx
from httpx_sse import EventSource, SSEError

from llmcad_mlx.errors import ContextLengthError, RemoteError, UsageError, first_line
from llmcad_mlx.network import is_this_machine, through_proxy
from llmcad_mlx.prompt import Prompt, as_list, token_id
from llmcad_mlx.results import GenerationStats, Result
from llmcad_mlx.settings import (
    OWN_SAMPLING,
    GenerationOptions,
    SamplingSettings,
    SpeculationSettings,
    StopSettings,
)

_CONNECT_S = 10.0
_SILENCE_S = 120.0  # a server that works says so every few seconds, while a request waits too
_COUNTED = (
    "target_passes", "drafted", "tested", "accepted", "streamed_bytes",
    "prompt_s", "decode_s", "draft_s", "verify_s", "io_wait_s",
)  # fmt: skip
_PASSED_ON = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "policy", "tree_nodes",
)  # fmt: skip
_KNOWN = sorted((*_PASSED_ON, "max_tokens", "stop"))
_LOCAL_ONLY = {"on_progress", "on_round", *GenerationOptions().keywords()}.difference(_KNOWN)
_SAMPLING = SamplingSettings()
_ALWAYS = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "speculation": {"tokens": True},
    # An engine's defaults, whatever the server's are.
    **{name: getattr(_SAMPLING, name) for name in (*OWN_SAMPLING, "seed")},
}


@dataclass(frozen=True, slots=True)
class RemoteResponse:
    """One token of a generation. `stats` are filled when the last token, which has a `finish_reason`, comes."""

    text: str
    token: int
    from_draft: bool
    finish_reason: str | None
    stats: GenerationStats


class RemoteEngine:
    """What `load("http://…")` returns: generates as `Engine` does, where `llmcad-mlx serve` runs.

    Not thread-safe: one generation at a time. A context manager; `close` ends a running generation.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """url: "http://mac.local:8080". api_key: the server's; None: that of the environment's LLMCAD_MLX_API_KEY.

        Raises UsageError for a wrong address, a key that is none or refused, RemoteError when no server answers.
        """
        parts = urlsplit(url)
        is_plain = parts.hostname and not (parts.query or parts.fragment or parts.username)
        if parts.scheme not in ("http", "https") or not is_plain:
            raise UsageError(f"target: {url!r} is not a server's address; give one like http://mac.local:8080")
        self.url = url.rstrip("/").removesuffix("/v1")
        key = api_key if api_key is not None else os.environ.get("LLMCAD_MLX_API_KEY")
        if key is not None and not (key and all("!" <= letter <= "~" for letter in key)):
            raise UsageError("api_key: give printable ASCII characters without spaces")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
        # A connection for each request: one that was kept may close just when it is used again.
        limits = httpx.Limits(max_keepalive_connections=0)
        local = is_this_machine(parts.hostname or "")
        self._via = "" if local else through_proxy(self.url)
        try:
            # With a transport of its own a client asks no proxy.
            direct = httpx.HTTPTransport(verify=parts.scheme == "https", limits=limits) if local else None
            self._client = httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout, limits=limits, transport=direct,
                verify=direct is None,
            )  # fmt: skip
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            raise UsageError(
                f"{self.url}: cannot be reached with the proxy or certificates that the environment names "
                f"({first_line(error)}); change or unset ALL_PROXY, HTTP_PROXY, NO_PROXY, SSL_CERT_FILE"
            ) from None
        self._running: httpx.Response | None = None
        try:
            with self._asked("GET", "/v1/models") as response:
                match self._object(self._text(response)):
                    case {"data": [{"owned_by": "llmcad-mlx"} as card, *_]}:
                        pass
                    case _:
                        raise self._stranger()
        except BaseException:
            self.close()
            raise
        self.model: str = card["id"]
        """The name of what is served there."""
        self.context_length: int | None = card.get("context_length")

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End a running generation and the connection, for good; closing again does nothing."""
        self._end_running()
        self._client.close()

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """Generate to the end; options as for `stream_generate`."""
        responses = list(self.stream_generate(prompt, **options))
        last = responses[-1]
        text = "".join(response.text for response in responses)
        return Result(text, [response.token for response in responses], str(last.finish_reason), last.stats)

    def stream_generate(self, prompt: Prompt, **options: Any) -> Iterator[RemoteResponse]:
        """Generate, one response per token; the last one has a `finish_reason` ("stop" or "length").

        prompt: text, token ids, or chat messages. options: `max_tokens` (256; -1: as many as the server allows),
        `stop`, `temperature` (0), `top_p`, `top_k`, `min_p`, `seed` (0), the penalties, `logit_bias`, `policy` and
        `tree_nodes`, which mean what they mean in `Engine.stream_generate`: the same seed gives the same text.

        Closing the iterator ends the generation on the server; a new generation ends one that is still running.
        Raises UsageError, a ValueError, naming an option that is unknown, out of range or not to be had from here,
        ContextLengthError for too long a prompt, RemoteError when the server is busy, gone or unreachable.
        """
        self._check_open()
        path, body = _completion_request(prompt, options)
        return self._run(path, {"model": self.model, **body})

    def _run(self, path: str, body: Mapping[str, Any]) -> Iterator[RemoteResponse]:
        self._end_running()
        with self._asked("POST", path, json=body) as response:
            self._running = response
            try:
                yield from self._responses(response, GenerationStats())
            finally:
                if self._running is response:
                    self._running = None

    def _responses(self, response: httpx.Response, stats: GenerationStats) -> Iterator[RemoteResponse]:
        """One for each token. Each waits for the next, for the end may come without a token of its own."""
        held: RemoteResponse | None = None
        reason = None
        for chunk in self._chunks(response, stats):
            for choice in chunk["choices"]:
                reason = choice["finish_reason"] or reason
            for token in chunk.get("speculation", {}).get("tokens", []):
                if held is not None:
                    yield held
                stats.generated_tokens += 1
                held = RemoteResponse(token["text"], token["id"], token["from_draft"], None, stats)
            if chunk.get("usage"):
                _fill(stats, chunk["usage"])
        if held is None or reason is None:
            raise self._went_away(stats)
        yield replace(held, finish_reason=reason)

    def _chunks(self, response: httpx.Response, stats: GenerationStats) -> Iterator[dict[str, Any]]:
        """The stream's events, to its end. Raises RemoteError when it breaks off."""
        events = EventSource(response).iter_sse()
        while True:
            self._check_open()
            if self._running is not response:
                raise UsageError("this generation ended when a newer one began; run one at a time")
            try:
                event = next(events, None)
            except SSEError:
                raise self._stranger() from None
            except httpx.TimeoutException:
                raise RemoteError(f"{self.url}: the server fell silent; check it and the network") from None
            except httpx.HTTPError:
                raise self._went_away(stats) from None
            if event is None:
                raise self._went_away(stats)
            if event.data == "[DONE]":
                return
            chunk = self._object(event.data)
            if "error" in chunk:
                raise self._refusal(500, chunk, {})
            yield chunk

    def _end_running(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def _check_open(self) -> None:
        if self._client.is_closed:
            raise UsageError("this engine is closed; load it again")

    @contextmanager
    def _asked(self, method: str, path: str, **content: Any) -> Iterator[httpx.Response]:
        """An answer of 200, its body still to be read."""
        self._check_open()
        try:
            response = self._client.send(self._client.build_request(method, path, **content), stream=True)
        except httpx.TimeoutException:
            raise RemoteError(
                f"{self.url}: no answer in time{self._via}; check the address and the network"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(
                f"{self.url}: no connection ({first_line(error)}){self._via}; is `llmcad-mlx serve` running there?"
            ) from None
        try:
            if response.status_code != 200:
                raise self._refusal(response.status_code, self._object(self._text(response)), response.headers)
            yield response
        finally:
            response.close()

    def _text(self, response: httpx.Response) -> str:
        try:
            response.read()
        except httpx.HTTPError as error:
            raise RemoteError(f"{self.url}: the answer broke off ({first_line(error)}); try again") from None
        return response.text

    def _object(self, text: str) -> dict[str, Any]:
        with suppress(ValueError):
            if isinstance(found := json.loads(text), dict):
                return found
        raise self._stranger()

    def _refusal(self, status: int, answer: Mapping[str, Any], headers: Mapping[str, str]) -> Exception:
        """The error that says what the server said."""
        error = answer.get("error")
        if not isinstance(error, dict):
            return self._stranger()
        message = str(error.get("message"))
        if error.get("code") == "context_length_exceeded":
            return ContextLengthError(message)
        if status == 401:
            return UsageError(f"api_key: {self.url} refuses it ({message}); give the key of that server")
        if status in (400, 413):
            return UsageError(message)
        if status == 429:
            wait = headers.get("Retry-After", "some")
            return RemoteError(f"{self.url}: the server is busy; try again in {wait} seconds")
        return RemoteError(f"{self.url}: {message}")

    def _stranger(self) -> RemoteError:
        return RemoteError(f"{self.url}: no llmcad-mlx server answers there{self._via}; check address and port")

    def _went_away(self, stats: GenerationStats) -> RemoteError:
        return RemoteError(
            f"{self.url}: the server went away after {stats.generated_tokens} tokens; start it again and repeat"
        )


def _completion_request(prompt: Prompt, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of a streamed request. Raises UsageError naming the option that is wrong."""
    for name in options:
        if name in _LOCAL_ONLY:
            raise UsageError(f"{name}: an engine on another machine does not take it; leave it out")
        if name not in _KNOWN:
            raise UsageError(f"{name}: unknown option; the options are {', '.join(_KNOWN)}")
    SpeculationSettings(**{name: options[name] for name in ("policy", "tree_nodes") if name in options})
    stopping = StopSettings.of(**{name: options[name] for name in ("max_tokens", "stop") if name in options})
    path, body = _prompt(prompt)
    body |= _ALWAYS | {name: _checked(name, options[name]) for name in _PASSED_ON if name in options}
    if stopping.max_tokens != -1:
        body["max_tokens"] = stopping.max_tokens
    if stopping.stop_strings:
        body["stop"] = list(stopping.stop_strings)
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UsageError("prompt: it is not UTF-8 text") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"prompt: cannot be sent as JSON ({first_line(error)})") from None
    return path, body


def _checked(name: str, value: Any) -> Any:
    """A value that JSON can hold. The server would take null for an option that is left out."""
    if value is None and name not in ("logit_bias", "tree_nodes"):
        raise UsageError(f"{name}: None is not a value; leave it out")
    if isinstance(value, Mapping):
        value = {str(key): item for key, item in value.items()}
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise UsageError(f"{name}: {value!r} cannot be sent; give a finite number") from None
    return value


def _prompt(prompt: Prompt) -> tuple[str, dict[str, Any]]:
    items = prompt if isinstance(prompt, str) else as_list(prompt)
    if not items:
        raise UsageError("prompt: it is empty; give text, messages or at least one token")
    if isinstance(items, str):
        return "/v1/completions", {"prompt": items}
    if all(isinstance(item, Mapping) for item in items):
        return "/v1/chat/completions", {"messages": [dict(item) for item in items]}
    return "/v1/completions", {"prompt": [token_id(item) for item in items]}


def _fill(stats: GenerationStats, usage: Mapping[str, Any]) -> None:
    """Take over what the server counted."""
    counted = usage["speculation"]
    for name in _COUNTED:
        setattr(stats, name, counted[name])
    stats.prompt_tokens = usage["prompt_tokens"]
    stats.reused_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    stats.generated_tokens = usage["completion_tokens"]
    rate = counted["acceptance_rate"]
    stats.path_tested = round(stats.accepted / rate) if rate else 0
