# SPDX-License-Identifier: MIT
"""uvicorn's HTTP/1.1 protocol with bounds on all of a request but its body. Knows bytes, no routes.

Trailers are dropped: they come when the request is on its way, too late to be headers of it.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tokenspeed.gateway.api_error import ApiError

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 100
HEAD_TIMEOUT_S = 20.0
_FRAMING = 8  # bytes of chunked framing allowed a byte of body; the smallest chunks need 5


class BoundedProtocol(HttpToolsProtocol):
    """Answers 431 to a head that is too large and closes on one that never ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._overhead = 0  # bytes of this message that are no body, less what frames its body
        self._reading = 0  # bytes of the read that is being parsed
        self._in_head = True
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._reading = len(data)
        super().data_received(data)
        self._overhead += len(data)
        if self._overhead > MAX_HEAD_BYTES:
            self._refuse(431, "the request's headers or trailers are too large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._disarm()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > MAX_HEADERS or size > MAX_HEAD_BYTES:
            self._refuse(431, "the request's headers are too large or too many")
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead -= (1 + _FRAMING) * len(body)
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._overhead = -self._reading  # what follows in this read belongs to the next message
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not HTTP/1.1")

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _head_is_late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self._refuse(408, "the request's headers took too long")

    def _refuse(self, status: int, message: str) -> None:
        """An answer outside any request, after which the connection ends."""
        if self.transport.is_closing():
            return
        body = ApiError(status, message, code="invalid_http").body()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head % len(body) + body)
        self.transport.close()
