"""What the server refuses, and how it says so: OpenAI's error object, with no path and no traceback in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with a 4xx or 5xx status. `param` names the request's field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is: 400."""
    return ApiError(400, message, param=param, code=code)


def queue_full(retry_after_s: int) -> ApiError:
    """Too many requests wait: 429, with the time after which a place should be free."""
    message = "too many requests are waiting"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry_after_s)})


def shutting_down() -> ApiError:
    """The server is going away: 503."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def internal_error(error_id: str) -> ApiError:
    """Something that should not happen: 500. The server's own log has the rest, under the same id."""
    return ApiError(500, f"internal error {error_id}; the server's log has the details", code="internal_error")


def to_json(value: Any) -> bytes:
    """Compact JSON; raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class JsonResponse(Response):
    """An object as the answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def error_response(error: ApiError) -> Response:
    """An error as the answer."""
    return JsonResponse(error.body, error.status, error.headers)
