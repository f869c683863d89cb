"""A request's body: read with limits on size and time, parsed with limits on shape."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request

from llmcad_mlx.serve.errors import ApiError, bad_request
from llmcad_mlx.serve.settings import ServerSettings

_MOST_DISCARDED = 64 << 20
_DISCARDING_S = 1.0
_CLOSE = {"Connection": "close"}  # the rest of such a body is not worth reading


async def read_json(request: Request, settings: ServerSettings) -> Any:
    """The JSON in the body.

    Raises ApiError: 400 for what is no JSON, 408 for a body that comes too slowly, 413 for one that is too large,
    415 for another content type (which also keeps web pages of other origins out: their plain forms cannot send
    JSON).
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "send the request with Content-Type: application/json", code="content_type")
    body = await _read(request, settings)
    return parse(body)


async def _read(request: Request, settings: ServerSettings) -> bytes:
    limit = settings.max_body_bytes
    body = bytearray()
    pieces = request.stream()
    if int(request.headers.get("content-length", "0")) > limit:  # a number: h11 lets nothing else through
        await _discard(pieces)
        raise _too_large(limit)
    try:
        async with asyncio.timeout(settings.body_s):
            async for piece in pieces:
                body += piece
                if len(body) > limit:
                    await _discard(pieces)
                    raise _too_large(limit)
    except TimeoutError:
        raise ApiError(
            408,
            f"the request's body did not arrive within {settings.body_s:g} s",
            code="slow_body",
            headers=_CLOSE,
        ) from None
    except ClientDisconnect:
        raise bad_request("the request's body ended early") from None
    return bytes(body)


async def _discard(pieces: AsyncIterator[bytes]) -> None:
    """Read on a little: an answer to a client that still sends would be lost when the connection closes."""
    left = _MOST_DISCARDED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARDING_S):
            async for piece in pieces:
                left -= len(piece)
                if left < 0:
                    return


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body may have {limit} bytes at most", code="body_too_large", headers=_CLOSE)


def parse(body: bytes) -> Any:
    """JSON as the standard has it: UTF-8, no NaN, no half characters. Raises ApiError (400)."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except ValueError as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise bad_request(f"the body is not valid JSON{where}") from None
    if "\\ud" in text or "\\uD" in text:
        _refuse_half_characters(value)
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _refuse_half_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("the body has half of a surrogate pair in a string") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
