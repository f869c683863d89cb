"""The HTTP API: routes, and what becomes of a request."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmcad_mlx import __version__
from llmcad_mlx.errors import UsageError
from llmcad_mlx.prompt import encode_prompt
from llmcad_mlx.serve.answers import (
    GenerationResponse,
    PartMaker,
    ToolListener,
    make_answer,
)
from llmcad_mlx.serve.jobs import FairQueue, Job, QueueClosedError, QueueFullError
from llmcad_mlx.serve.limits import Gate, read_body
from llmcad_mlx.serve.metrics import CONTENT_TYPE, Metrics
from llmcad_mlx.serve.options import ServerSettings
from llmcad_mlx.serve.page import page_routes
from llmcad_mlx.serve.protocol import (
    ApiError,
    GenerationRequest,
    JsonResponse,
    RequestReader,
    bad_request,
    error_response,
    refused,
    shutting_down,
)
from llmcad_mlx.serve.worker import ServedModel, Worker

_MOST_RETRY_S = 60


class Api:
    """The endpoints of one served model."""

    def __init__(
        self, settings: ServerSettings, model: ServedModel, worker: Worker, queue: FairQueue[Job], metrics: Metrics
    ) -> None:
        self._settings = settings
        self._model = model
        self._worker = worker
        self._queue = queue
        self._metrics = metrics
        self._reader = RequestReader(settings, model.name)
        self._created = int(time.time())
        # One thread: a tokenizer encodes for one at a time. Not the worker's, which may be busy for minutes.
        self._encoding = ThreadPoolExecutor(1, "encoding")

    def asgi(self) -> Starlette:
        """The application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            *page_routes(self._settings),
        ]
        gate = Middleware(
            Gate,
            settings=self._settings,
            metrics=self._metrics,
            paths=[route.path for route in routes if "{" not in route.path],
        )
        # Outermost, so that a page that may call the server can also read what it is refused for.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(self._settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
        app = Starlette(
            routes=routes,
            middleware=[cors, gate] if self._settings.cors else [gate],
            exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error},
        )
        app.router.redirect_slashes = False
        return app

    def close(self) -> None:
        """Stop encoding."""
        self._encoding.shutdown(wait=False, cancel_futures=True)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._generation(request, self._reader.chat)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._generation(request, self._reader.completion)

    async def _generation(self, request: Request, read: Callable[[bytes], GenerationRequest]) -> Response:
        if not self._worker.is_alive:
            raise shutting_down()
        wanted = read(await read_body(request, self._settings))
        tools = self._tool_listener(wanted)
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._encoding, self._encode, wanted)
        address = request.client.host if request.client else ""
        job = Job(wanted, prompt, f"{address} {wanted.user}", loop)
        try:
            self._queue.put(job.client, job)
        except QueueFullError:
            wait = len(self._queue) * self._metrics.mean_generation_s
            retry_after = {"Retry-After": str(min(max(math.ceil(wait), 1), _MOST_RETRY_S))}
            message = "too many requests are waiting"
            raise ApiError(429, message, code="queue_full", headers=retry_after) from None
        except QueueClosedError:
            raise shutting_down() from None
        answer = make_answer(wanted, self._model.name)
        return GenerationResponse(job, self._queue, answer, PartMaker(tools), self._settings.keepalive_s)

    def _tool_listener(self, wanted: GenerationRequest) -> ToolListener | None:
        if wanted.tools is None:
            return None
        if not self._model.tokenizer.has_tool_calling:
            raise bad_request(f"tools: {self._model.name} has no chat template for tools; leave them out", "tools")
        return ToolListener(self._model.tokenizer, wanted.tools)

    def _encode(self, wanted: GenerationRequest) -> list[int]:
        """The prompt's tokens. Raises ApiError for one that is malformed or too long."""
        try:
            tokens = encode_prompt(wanted.prompt, self._model.tokenizer, self._model.vocab_size, wanted.tools)
        except UsageError as error:
            api_error = refused(error)
            api_error.param = "messages" if wanted.kind == "chat" else "prompt"
            raise api_error from None
        context, limit = self._model.context_length, self._settings.max_prompt_tokens
        # One place must be left for an answer.
        most = min((n for n in (None if context is None else context - 1, limit) if n is not None), default=None)
        if most is not None and len(tokens) > most:
            raise bad_request(
                f"the prompt has {len(tokens)} tokens, and there is room for {most}; shorten it",
                "messages" if wanted.kind == "chat" else "prompt",
                "context_length_exceeded",
            )
        return tokens

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JsonResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        if request.path_params["name"] != self._model.name:
            raise ApiError(404, f"only {self._model.name} is served here", param="model", code="model_not_found")
        return JsonResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "llmcad-mlx",
            "context_length": self._model.context_length,
            "draft": self._model.draft,
        }

    async def health(self, request: Request) -> Response:
        """GET /health."""
        if not self._worker.is_alive:
            return JsonResponse({"status": "unavailable"}, 503)
        return JsonResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        text = self._metrics.text(len(self._queue), self._worker.num_running)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return JsonResponse(openapi_document(self._reader, needs_key=self._settings.api_key is not None))


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    message = {404: "there is nothing here; see /openapi.json", 405: "this method is not allowed here"}.get(
        error.status_code, error.detail
    )
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


_REFUSALS = {
    "400": "The request cannot be served as it is; the message names the field.",
    "401": "The key is missing or wrong.",
    "404": "Another model than the one served.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "Too many requests wait; Retry-After says for how long.",
    "503": "The server is shutting down.",
}
_JSON = "application/json"


def openapi_document(reader: RequestReader, needs_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document of the whole server."""
    chat, completion = reader.chat_model, reader.completion_model
    _, schemas = models_json_schema(
        [(model, "validation") for model in (chat, completion, Answer, Error)],
        ref_template="#/components/schemas/{model}",
    )
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "llmcad-mlx", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _generation("Answer a conversation.", chat)},
            "/v1/completions": {"post": _generation("Continue a text.", completion)},
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
    answer = {_JSON: _reference(Answer), "text/event-stream": {"schema": {"type": "string"}}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: _reference(request)}},
        "responses": {
            "200": {"description": "The answer, whole or as server-sent events.", "content": answer},
            **{status: _error(status) for status in _REFUSALS},
        },
    }


def _get(summary: str, media_type: str = _JSON, kind: str = "object") -> dict[str, Any]:
    answer = {"description": "It is.", "content": {media_type: {"schema": {"type": kind}}}}
    return {"summary": summary, "responses": {"200": answer, "401": _error("401")}}


def _error(status: str) -> dict[str, Any]:
    return {"description": _REFUSALS[status], "content": {_JSON: _reference(Error)}}


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
