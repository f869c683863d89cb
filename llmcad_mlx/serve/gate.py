"""What every request passes: host, key, counting, and a last net that lets no traceback out."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import secrets
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmcad_mlx.serve.errors import ApiError, internal_error
from llmcad_mlx.serve.metrics import Metrics
from llmcad_mlx.serve.responses import error_response
from llmcad_mlx.serve.settings import ServerSettings

_log = logging.getLogger(__name__)
_GONE = 499


class Gate:
    """ASGI middleware. `paths`: the server's own, for the counters."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, paths: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)
        self._key = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()
        # A web page whose name resolves to this machine would be of the same origin; only its Host gives it away.
        self._checks_host = settings.is_loopback and self._key is None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            app = self._app if refusal is None else error_response(refusal)
            await app(scope, receive, noting)
        except Exception as error:
            error_id = secrets.token_hex(4)
            _log.error("internal error %s", error_id, exc_info=error)
            if not status:
                await error_response(internal_error(error_id))(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.count_request(path, status or _GONE)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._checks_host and not _is_local(headers.get("host")):
            return ApiError(400, "this server answers to localhost only; give it a key to serve other names")
        if self._key is None or _is_open(scope["path"]):
            return None
        if hmac.compare_digest(headers.get("authorization", "").encode("latin-1"), self._key):
            return None
        return ApiError(
            401,
            "a valid key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_open(path: str) -> bool:
    """Whether a path needs no key. The page asks its user for the key, so it comes without one."""
    return path in ("/", "/health") or path.startswith("/page/")


def _is_local(host: str | None) -> bool:
    """Whether a Host header names this machine; without one, no browser asks."""
    if host is None:
        return True
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
