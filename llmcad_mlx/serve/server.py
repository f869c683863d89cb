"""The server as a whole: a socket, a worker with the model, HTTP routes between them, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from difflib import get_close_matches
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmcad_mlx import __version__
from llmcad_mlx.api import Engine
from llmcad_mlx.errors import UsageError
from llmcad_mlx.prompt import encode_prompt, opened_thinking
from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.serve.answers import ChatAnswer, CompletionAnswer, GenerationResponse
from llmcad_mlx.serve.jobs import Job
from llmcad_mlx.serve.limits import Gate, GuardedProtocol, read_body
from llmcad_mlx.serve.metrics import CONTENT_TYPE, Metrics
from llmcad_mlx.serve.opening import beginning_with_call
from llmcad_mlx.serve.page import page_routes
from llmcad_mlx.serve.parts import AnswerListener, PartMaker
from llmcad_mlx.serve.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestReader,
    bad_request,
    error_response,
    shutting_down,
)
from llmcad_mlx.serve.worker import Ending, ServedModel, Worker

_log = logging.getLogger(__name__)
_MAX_HEAD_BYTES = 32 << 10
_MAX_CONNECTIONS = 1000
_IDLE_S = 30
_LINGER_S = 5  # how long answers that were broken off may take to reach their clients
_MOST_RETRY_S = 60
_PROBE_S = 1.0
_LIKE = 0.75  # difflib's ratio of two paths, from where on one is named for the other


class LlmServer:
    """Serves one model.

    server = LlmServer(settings, load, "name")
    server.start()   # takes the address, loads the model; raises what either raises
    server.run()     # serves until SIGINT, SIGTERM or `stop`
    """

    def __init__(self, settings: ServerSettings, load: Callable[[], Engine], name: str) -> None:
        """`load` runs on the worker's thread. `name`: what the model is called towards clients."""
        self._settings = settings
        self._metrics = Metrics()
        self._worker = Worker(load, settings, self._metrics, name)
        self._sockets: list[socket.socket] = []
        self._uvicorn: _Uvicorn | None = None
        self.url = ""
        """Where the server is, after `start`."""

    def start(self) -> ServedModel:
        """Take the address, then load. Raises UsageError for an address that is not to be had."""
        host = self._settings.host
        self._sockets = _bind(host, self._settings.port)
        port = self._sockets[0].getsockname()[1]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        try:
            model = self._worker.start()
        except BaseException:
            self._close()
            raise
        config = uvicorn.Config(
            Api(self._settings, model, self._worker, self._metrics).asgi(),
            http=type("Guarded", (GuardedProtocol,), {"header_s": self._settings.header_s}),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody can write such a header
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_LINGER_S,
        )
        self._uvicorn = _Uvicorn(config, self._worker)
        return model

    def run(self) -> Ending:
        """Serve until told to stop. Raises KeyboardInterrupt when told so twice: a generation may still run."""
        if self._uvicorn is None:
            raise RuntimeError("start the server before running it")
        try:
            self._uvicorn.run(sockets=self._sockets)
        finally:
            self._close()
        if self._uvicorn.force_exit:
            raise KeyboardInterrupt
        return self._uvicorn.ending.result()

    def stop(self) -> None:
        """Make `run` return; from any thread."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def _close(self) -> None:
        for one in self._sockets:
            one.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn, whose end is the worker's too, and which leaves the exit code alone."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker
        self.ending: Future[Ending] = Future()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it in order, the second at once; uvicorn would raise them again at the end."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what waits, break off what runs, send the last answers."""
        _log.warning("shutting down; once more to leave at once")
        # On a thread of its own: that may last a round, and the event loop has answers to send.
        threading.Thread(
            target=lambda: self.ending.set_result(self._worker.close()), name="closing", daemon=True
        ).start()
        await super().shutdown(sockets)


def _bind(host: str, port: int) -> list[socket.socket]:
    """A listening socket; for "localhost" one for each family of addresses that it has, as clients try any.

    It listens while the model loads, so that nobody else can take the address meanwhile, and clients wait.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"host: {host} is no address of this machine: {error.strerror}") from None
    by_family = {family: address for family, _, _, _, address in reversed(found)}
    families = [found[0][0], *(by_family if host == "localhost" else ())]
    sockets: list[socket.socket] = []
    for family in dict.fromkeys(families):
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            address, _, *more = by_family[family]
            if port:
                _require_silence(family, (address, port, *more))
            server.bind((address, port, *more))
            server.listen()
        except OSError as error:
            server.close()
            if error.errno == errno.EADDRNOTAVAIL and len(by_family) > 1:
                continue
            for one in sockets:
                one.close()
            raise UsageError(
                f"port: {host}:{port} cannot be used: {error.strerror}; give another --port"
            ) from None
        sockets.append(server)
        port = server.getsockname()[1]  # a free one is the same in both
    return sockets


def _require_silence(family: socket.AddressFamily, address: tuple[Any, ...]) -> None:
    """Raise OSError where somebody answers. macOS lets a server take one address of a port whose others are
    another's."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        # A connection may meet itself where nobody listens.
        if probe.connect_ex(address) == 0 and probe.getsockname() != probe.getpeername():
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


class Api:
    """The endpoints of one served model."""

    def __init__(self, settings: ServerSettings, model: ServedModel, worker: Worker, metrics: Metrics) -> None:
        self._settings = settings
        self._model = model
        self._worker = worker
        self._metrics = metrics
        self._reader = RequestReader(settings, model.name, model.sampling)
        self._card = {
            "id": model.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "llmcad-mlx",
            "context_length": model.context_length,
            "draft": model.draft,
            "sampling": self._reader.default_sampling,
        }
        # A tokenizer encodes for one at a time; not on the worker's thread, which may be busy for minutes.
        self._encoding = asyncio.Lock()

    def asgi(self) -> Starlette:
        """The application."""
        routes = [
            Route("/v1/chat/completions", partial(self.generation, self._reader.chat), methods=["POST"]),
            Route("/v1/completions", partial(self.generation, self._reader.completion), methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            *page_routes(self._settings),
        ]
        paths = [route.path for route in routes if "{" not in route.path]
        gate = Middleware(Gate, settings=self._settings, metrics=self._metrics, paths=paths)
        # Outermost, so that a page that may call the server can also read what it is refused for.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(self._settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # Chromium asks for it before a page of the web may call this machine
            expose_headers=["Retry-After"],
        )
        app = Starlette(
            routes=routes,
            middleware=[cors, gate] if self._settings.cors else [gate],
            exception_handlers={HTTPException: _on_http_error},
        )
        app.router.redirect_slashes = False
        return app

    async def generation(self, read: Callable[[bytes], GenerationRequest], request: Request) -> GenerationResponse:
        if not self._worker.is_alive:
            raise shutting_down()
        wanted, name = read(await read_body(request, self._settings)), self._model.name
        if wanted.tools is not None and not self._model.tokenizer.has_tool_calling:
            raise bad_request(f"tools: {name} has no chat template for tools; leave them out", "tools")
        async with self._encoding:
            prompt = await asyncio.to_thread(self._encode, wanted)
            thinking = self._thinking(wanted, prompt)
            if wanted.must_call:
                wanted = await asyncio.to_thread(
                    beginning_with_call, wanted, prompt, self._model.tokenizer, bool(thinking)
                )
        listener = None
        if thinking is not None or wanted.tools is not None:  # else the answer is nothing but text
            listener = AnswerListener(self._model.tokenizer, wanted.tools, thinking, wanted.one_call)
        client = f"{request.client.host if request.client else ''} {wanted.user}"
        job, queue = Job(wanted, prompt, client, asyncio.get_running_loop()), self._worker.queue
        if not queue.put(job):
            wait = math.ceil(len(queue) * self._metrics.mean_generation_s)
            retry_after = {"Retry-After": str(min(max(wait, 1), _MOST_RETRY_S))}
            raise ApiError(429, "too many requests are waiting", code="queue_full", headers=retry_after)
        answer = ChatAnswer(wanted, name) if wanted.kind == "chat" else CompletionAnswer(wanted, name)
        return GenerationResponse(job, queue, answer, PartMaker(listener), self._settings.keepalive_s)

    def _thinking(self, wanted: GenerationRequest, prompt: list[int]) -> bool | None:
        """Whether the answer begins within thinking; None for an answer without any."""
        tokenizer = self._model.tokenizer
        if wanted.kind != "chat" or not tokenizer.has_thinking:
            return None
        return bool(opened_thinking(tokenizer, prompt))

    def _encode(self, wanted: GenerationRequest) -> list[int]:
        """The prompt's tokens. Raises ApiError for one that is malformed or too long."""
        field = "messages" if wanted.kind == "chat" else "prompt"
        try:
            tokens = encode_prompt(
                wanted.prompt,
                self._model.tokenizer,
                self._model.vocab_size,
                wanted.tools,
                wanted.template_options,
            )
        except UsageError as error:
            raise bad_request(str(error), field) from None
        context, limit = self._model.context_length, self._settings.max_prompt_tokens
        # One place must be left for an answer.
        most = min((n for n in (None if context is None else context - 1, limit) if n is not None), default=None)
        if most is not None and len(tokens) > most:
            message = f"the prompt has {len(tokens)} tokens, and there is room for {most}; shorten it"
            if most != limit and (advice := self._model.context_advice):
                message += f", or start the server anew: {advice}"
            raise bad_request(message, field, "context_length_exceeded")
        return tokens

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model.name:
            raise ApiError(404, f"only {self._model.name} is served here", param="model", code="model_not_found")
        return JSONResponse(self._card)

    async def health(self, request: Request) -> Response:
        status, code = ("ok", 200) if self._worker.is_alive else ("unavailable", 503)
        return JSONResponse({"status": status}, code)

    async def metrics(self, request: Request) -> Response:
        text = self._metrics.text(len(self._worker.queue), int(self._worker.running is not None))
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(_openapi_document(needs_key=self._settings.api_key is not None))


_NEAR = {
    **{path: path for path in ("/v1/chat/completions", "/v1/completions", "/v1/models")},
    "/v1/responses": "/v1/chat/completions",
    "/v1/messages": "/v1/chat/completions",
    "/api/chat": "/v1/chat/completions",
    "/api/generate": "/v1/completions",
    "/api/tags": "/v1/models",
}  # paths that clients ask for, of other programs too, and what they want


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    told = {404: "there is nothing here; see /openapi.json", 405: "this method is not allowed here"}
    message = told.get(error.status_code, error.detail)
    if error.status_code == 404:
        path = request.scope["path"].rstrip("/")
        near = [known for known in _NEAR if path.endswith(known.removeprefix("/v1"))]
        near = near or get_close_matches(path, _NEAR, 1, _LIKE)
        message = f"there is nothing here; try {_NEAR[near[0]]}, or see /openapi.json" if near else message
    return error_response(ApiError(error.status_code, message, headers=error.headers))


class _ErrorObject(BaseModel):
    """Why a request is refused; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: _ErrorObject


class Answer(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    speculation: dict[str, Any] | None = None


def _openapi_document(needs_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document of the whole server."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in (ChatRequest, CompletionRequest, Answer, Error)],
        ref_template="#/components/schemas/{model}",
    )
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "llmcad-mlx", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _generation("Answer a conversation.", ChatRequest)},
            "/v1/completions": {"post": _generation("Continue a text.", CompletionRequest)},
            "/v1/models": {"get": _get("The model that is served.")},
            "/health": {"get": {**_get("Whether the server works."), "security": []}},
            "/metrics": {"get": _get("Counters, as Prometheus reads them.", "text/plain", "string")},
            "/openapi.json": {"get": _get("This document.")},
        },
        "components": {"schemas": schemas["$defs"]},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _generation(summary: str, request: type[BaseModel]) -> dict[str, Any]:
    content = {**_content(Answer), "text/event-stream": {"schema": {"type": "string"}}}
    operation = _operation(summary, "The answer, whole or as server-sent events.", content)
    return {**operation, "requestBody": {"required": True, "content": _content(request)}}


def _get(summary: str, media_type: str = "application/json", kind: str = "object") -> dict[str, Any]:
    return _operation(summary, "It is.", {media_type: {"schema": {"type": kind}}})


def _operation(summary: str, said: str, content: dict[str, Any]) -> dict[str, Any]:
    refused = {"description": "A refusal; the message says why.", "content": _content(Error)}
    return {
        "summary": summary,
        "responses": {"200": {"description": said, "content": content}, "default": refused},
    }


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
