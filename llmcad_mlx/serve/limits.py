"""What every request has to pass: a check of Host and key, and limits in size and time on head and body."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Collection
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmcad_mlx.network import is_loopback, is_this_machine
from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.serve.metrics import Metrics
from llmcad_mlx.serve.protocol import ApiError, bad_request, error_response, internal_error, to_json

_GONE = 499  # a client that did not wait; nobody reads it, the counters do
_MOST_DISCARDED = 64 << 20
_DISCARDING_S = 1.0
_CLOSE = {"Connection": "close"}  # the rest of such a body is not worth reading


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """The body of a request that says it is JSON.

    Raises ApiError: 408 for a body that comes too slowly, 413 for one that is too large, 415 for another content
    type (which also keeps web pages of other origins out: their plain forms cannot send JSON).
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "send the request with Content-Type: application/json", code="content_type")
    announced = int(request.headers.get("content-length", "0"))  # a number: h11 lets nothing else through
    limit, body, pieces = settings.max_body_bytes, bytearray(), request.stream()
    try:
        async with asyncio.timeout(settings.body_s):
            while max(announced, len(body)) <= limit:
                piece = await anext(pieces, None)
                if piece is None:
                    return bytes(body)
                body += piece
    except TimeoutError:
        message = f"the request's body did not arrive within {settings.body_s:g} s"
        raise ApiError(408, message, code="slow_body", headers=_CLOSE) from None
    except ClientDisconnect:
        raise bad_request("the request's body ended early") from None
    await _discard(pieces)
    raise ApiError(413, f"the body may have {limit} bytes at most", code="body_too_large", headers=_CLOSE)


async def _discard(pieces: AsyncIterator[bytes]) -> None:
    """Read on a little: an answer to a client that still sends would be lost when the connection closes."""
    left = _MOST_DISCARDED
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DISCARDING_S):
            async for piece in pieces:
                left -= len(piece)
                if left < 0:
                    return


class Gate:
    """ASGI middleware: checks Host and key, counts, lets no traceback out. `paths`: the server's own.

    Paths of the API are found with doubled and trailing slashes, and without `/v1`, too: clients join them with
    base addresses that their users write.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, paths: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)
        self._key = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()
        # A web page whose name resolves to this machine would be of the same origin; only its Host gives it away.
        self._checks_host = is_loopback(settings.host) and self._key is None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": self._path(scope["path"])}
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
            told = error if isinstance(error, ApiError) else internal_error(error)
            if not status:
                await error_response(told)(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.count_request(path, status or _GONE)

    def _path(self, path: str) -> str:
        plain = "/" + "/".join(filter(None, path.split("/")))
        for known in (plain, f"/v1{plain}"):
            if (known != "/" and known in self._paths) or known.startswith("/v1/models/"):
                return known
        return path

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._checks_host and not _is_local(headers.get("host", "localhost")):
            message = (
                "this server answers to localhost only; give it a key to serve other names "
                "(llmcad-mlx serve --api-key KEY), or call it 127.0.0.1"
            )
            return ApiError(400, message, code="unknown_host")
        # The page asks its user for the key, so it comes without one.
        if self._key is None or scope["path"] in ("/", "/health") or scope["path"].startswith("/page/"):
            return None
        if hmac.compare_digest(headers.get("authorization", "").encode("latin-1"), self._key):
            return None
        return ApiError(
            401,
            "a valid key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine; without one, no browser asks."""
    try:
        return is_this_machine(urlsplit(f"//{host}").hostname or "")  # no name server gives a page such a name
    except ValueError:
        return False


class GuardedProtocol(H11Protocol):
    """Closes a connection whose request's head has not arrived `header_s` seconds after its first byte, or after
    the connection was made."""

    header_s: float = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE or not self.conn.trailing_data[0]:
            self._stop()
        elif self._timer is None:
            self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        told = (b"408 Request Timeout", "the request's head came too slowly", "slow_head")
        self._timer = self.loop.call_later(self.header_s, self._refuse, *told)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg: str) -> None:
        """What uvicorn does with what is not HTTP."""
        self._refuse(b"400 Bad Request", "this is not a valid HTTP request", "invalid_http")

    def _refuse(self, status: bytes, message: str, code: str) -> None:
        """A whole answer, for what never becomes a request."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR):  # else there is an answer already
            body = to_json(bad_request(message, code=code).body)
            head = b"Connection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            self.transport.write(b"HTTP/1.1 " + status + b"\r\n" + head + body)
        self.transport.close()
