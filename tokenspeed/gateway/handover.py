# SPDX-License-Identifier: MIT
"""`Link`: what several gateways give each other: connections with a request, questions, answers.

A connection is given whole: its file descriptor travels over a Unix socket in the engine's private
folder, and with it the request that was read. Who gets it answers its client directly, so that a
streamed token passes one process, and a client that hangs up is noticed where it matters. Knows
sockets; refuses to know which gateway should get what.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import Scope

from tokenspeed.gateway.api_error import overloaded
from tokenspeed.gateway.http_protocol import BoundedProtocol

TIMEOUT_S = 5.0  # to give, and for an answer
_CONNECTION, _QUESTION = b"c", b"q"
_BLOCK = 1 << 18

log = logging.getLogger("tokenspeed.gateway")


class GivenProtocol(BoundedProtocol):
    """A connection that can be given away: each request's scope says whose it is."""

    given = False  # to this process, with the request that comes first

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"tokenspeed.connection": {"of": self, "given": self.given}}
        self.given = False


def listeners(folder: str, count: int) -> list[socket.socket]:
    """Where each gateway listens for the others. All listen before one of them is started."""
    made = []
    for number in range(count):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(_address(folder, number))
        sock.listen(1024)
        made.append(sock)
    return made


class Link:
    """Gateway `number`'s end. `adopt` gets connections, `answer` questions."""

    def __init__(self, folder: str, number: int, count: int, listener: socket.socket) -> None:
        self.number, self.count = number, count
        self.adopt: Callable[[socket.socket, bytes], Awaitable[None]]
        self.answer: Callable[[dict[str, Any]], Any]
        self._folder, self._listener = folder, listener
        self._tasks: set[asyncio.Task[None]] = set()
        listener.setblocking(False)

    def start(self) -> None:
        """From now on the others are heard."""
        self._spawn(self._listen())

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._listener.close()

    async def give(self, number: int, scope: Scope, body: bytes) -> None:
        """Gives a request and its connection to another gateway. Raises 503 if that is gone."""
        held = scope["extensions"]["tokenspeed.connection"]["of"]
        data = request_bytes(scope, body, close=held.scope is not scope)
        held.flow.pause_reading()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while held.transport.get_write_buffer_size():  # of an answer before this one
                    await asyncio.sleep(0.005)
                sock = held.transport.get_extra_info("socket")
                with await self._connect(number) as to:
                    socket.send_fds(to, [_CONNECTION], [sock.fileno()])
                    await asyncio.get_running_loop().sock_sendall(to, data)
        except OSError:  # a timeout too
            held.flow.resume_reading()
            raise overloaded("a part of the server has ended", "draining", 2) from None
        held.cycle.disconnected = True  # nothing is answered here, and closing sends nothing
        held.transport.abort()

    async def ask(self, question: dict[str, Any]) -> list[Any]:
        """The others' answers. Who is gone gives none."""
        others = (n for n in range(self.count) if n != self.number)
        answers = await asyncio.gather(*(self._ask(n, question) for n in others))
        return [answer for answer in answers if answer is not None]

    async def _ask(self, number: int, question: dict[str, Any]) -> Any:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, msgspec.DecodeError):
            async with asyncio.timeout(TIMEOUT_S):
                with await self._connect(number) as to:
                    await loop.sock_sendall(to, _QUESTION + msgspec.json.encode(question))
                    to.shutdown(socket.SHUT_WR)
                    return msgspec.json.decode(await _read(to))
        return None

    async def _connect(self, number: int) -> socket.socket:
        to = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        to.setblocking(False)
        try:
            while True:
                try:
                    to.connect(_address(self._folder, number))
                    return to
                except BlockingIOError:  # too many wait there
                    await asyncio.sleep(0.005)
        except BaseException:
            to.close()
            raise

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            conn, _ = await loop.sock_accept(self._listener)
            self._spawn(self._take(conn))

    async def _take(self, conn: socket.socket) -> None:
        given: list[int] = []
        with conn, contextlib.suppress(OSError):
            async with asyncio.timeout(TIMEOUT_S):
                await _readable(conn)
                kind, given, _, _ = socket.recv_fds(conn, 1, 1)
                client = socket.socket(fileno=given[0]) if given else None
                try:
                    data = await _read(conn)
                except BaseException:
                    if client is not None:
                        client.close()
                    raise
            if client is not None:
                client.setblocking(False)
                await self.adopt(client, data)
            elif kind == _QUESTION:
                answer = msgspec.json.encode(self.answer(msgspec.json.decode(data)))
                await asyncio.get_running_loop().sock_sendall(conn, answer)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("what another gateway sent could not be taken", exc_info=error)


def request_bytes(scope: Scope, body: bytes, *, close: bool) -> bytes:
    """A request as it could have come. `close`: the client has sent more, which is not given: it
    is told that this connection's last answer is this one."""
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    parts = [f"{scope['method']} ".encode(), target, f" HTTP/{scope['http_version']}\r\n".encode()]
    left_out = {b"content-length", b"transfer-encoding", b"expect", b"trailer"}
    left_out |= {b"connection"} if close else set()
    for name, value in scope["headers"]:
        if name not in left_out:
            parts += [name, b": ", value, b"\r\n"]
    if body or scope["method"] == "POST":
        parts.append(b"content-length: %d\r\n" % len(body))
    if close:
        parts.append(b"connection: close\r\n")
    return b"".join([*parts, b"\r\n", body])


def _address(folder: str, number: int) -> str:
    return str(Path(folder, f"gateway{number}"))


async def _read(sock: socket.socket) -> bytes:
    """All that comes."""
    loop, parts = asyncio.get_running_loop(), []
    while part := await loop.sock_recv(sock, _BLOCK):
        parts.append(part)
    return b"".join(parts)


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
