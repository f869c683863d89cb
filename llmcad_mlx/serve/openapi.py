"""The server's OpenAPI document, made of the schemas that it checks requests with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmcad_mlx import __version__
from llmcad_mlx.serve.fields import Schema
from llmcad_mlx.serve.requests import Kind

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
_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ANSWER: Schema = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"type": "string"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object"}},
        "usage": {"type": "object"},
        "speculation": {"type": "object"},
    },
    "required": ["id", "object", "created", "model", "choices", "usage"],
}


def openapi_document(schemas: Mapping[Kind, Mapping[str, Any]], needs_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document. `schemas`: of both kinds of request. `needs_key`: whether the server has one."""
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "llmcad-mlx", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _generation("Answer a conversation.", schemas["chat"])},
            "/v1/completions": {"post": _generation("Continue a text.", schemas["completion"])},
            "/v1/models": {"get": _get("The model that is served.")},
            "/health": {"get": {**_get("Whether the server works."), "security": []}},
            "/metrics": {"get": _get("Counters, as Prometheus reads them.", "text/plain")},
            "/openapi.json": {"get": _get("This document.")},
        },
        "components": {"schemas": {"Error": _ERROR, "Answer": _ANSWER}},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _generation(summary: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    answer = {
        "description": "The answer, whole or as server-sent events.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": answer, **{status: _error(text) for status, text in _REFUSALS.items()}},
    }


def _error(text: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _get(summary: str, media_type: str = "application/json") -> dict[str, Any]:
    content = {media_type: {"schema": {"type": "string" if media_type == "text/plain" else "object"}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "It is.", "content": content},
            "401": _error(_REFUSALS["401"]),
        },
    }
