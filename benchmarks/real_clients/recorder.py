# SPDX-License-Identifier: MIT
"""A proxy on loopback that writes down what a client sends, and passes both ways unchanged."""

import http.client
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

_OWN = {"host", "connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass
class Exchange:
    """A request, and the answer to it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0
    reply: bytearray = field(default_factory=bytearray)


class Recorder:
    """`with Recorder(port)`: `exchanges` in the order of their requests."""

    def __init__(self, port: int) -> None:
        self.exchanges: list[Exchange] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                recorder.pass_on(self, port)

            do_GET = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port

    def pass_on(self, client: BaseHTTPRequestHandler, port: int) -> None:
        """One exchange, the answer as it comes."""
        body = client.rfile.read(int(client.headers.get("content-length") or 0))
        headers = {key.lower(): value for key, value in client.headers.items()}
        exchange = Exchange(client.command, client.path, headers, body)
        self.exchanges.append(exchange)
        sent = {key: value for key, value in headers.items() if key not in _OWN}
        server = http.client.HTTPConnection("127.0.0.1", port)
        server.request(client.command, client.path, body or None, sent)
        reply = server.getresponse()
        exchange.status = reply.status
        client.send_response(reply.status)
        for key, value in reply.getheaders():
            if key.lower() not in _OWN:
                client.send_header(key, value)
        client.send_header("connection", "close")
        client.end_headers()
        while part := reply.read1(1 << 16):
            exchange.reply += part
            client.wfile.write(part)
            client.wfile.flush()
        server.close()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
