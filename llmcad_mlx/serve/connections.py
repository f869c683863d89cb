"""uvicorn's HTTP protocol, with a limit on how long a request's head may take.

Its own limits: the size of a head, and how long a connection may idle between two requests.
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def _refusal(status: bytes, message: str, code: str) -> bytes:
    """A whole answer, for what never becomes a request."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    head = b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


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
        self._timer = self.loop.call_later(self.header_s, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._refuse(_refusal(b"408 Request Timeout", "the request's head came too slowly", "slow_head"))

    def send_400_response(self, msg: str) -> None:
        """What uvicorn does with what is not HTTP."""
        self._refuse(_refusal(b"400 Bad Request", "this is not a valid HTTP request", "invalid_http"))

    def _refuse(self, answer: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR):  # else there is an answer already
            self.transport.write(answer)
        self.transport.close()


def protocol_with(header_s: float) -> type[GuardedProtocol]:
    """The protocol with its own limit."""
    return type("GuardedProtocol", (GuardedProtocol,), {"header_s": header_s})
