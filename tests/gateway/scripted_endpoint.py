# SPDX-License-Identifier: MIT
"""A server of the tests that is a script, and a clock that jumps to whatever comes next.

Nothing here waits: a minute of traffic takes as long as its Python, and every time is exact.
"""

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx


class _Jumping(selectors.SelectSelector):
    """Where a loop would wait, its clock goes on at once."""

    now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits and nothing will come"
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose seconds cost nothing."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return round(self._jumping.now, 9)


def run_virtual(make: Callable[[Callable[[], float]], Coroutine[Any, Any, Any]]) -> Any:
    """Runs what `make` makes of the clock."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(make(loop.time))
    finally:
        loop.close()


@dataclass
class Reply:
    """What a request gets: `before_s` until the head, then pieces, each after a time.

    A piece that is an exception breaks the connection; one that is None is silence for ever.
    """

    pieces: list[tuple[float, bytes | Exception | None]] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    before_s: float = 0.0


@dataclass
class Seen:
    """A request as the server saw it."""

    at: float
    url: str
    body: dict[str, Any]
    headers: dict[str, str]


class ScriptedServers(httpx.AsyncBaseTransport):
    """Takes the place of the network. `answer` makes a reply of each POST to a dialect's path.

    From `dies_at` on, the host of that name answers nothing and its streams break.
    """

    def __init__(self, answer: Callable[[Seen], Reply], **dies_at: float) -> None:
        self.answer, self.dies_at = answer, dies_at
        self.seen: list[Seen] = []
        self.open = self.most_open = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._refuse_if_dead(request)
        path = request.url.path
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "scripted"}]})
        if path == "/health":
            return httpx.Response(200)
        body = json.loads(await request.aread())
        if path == "/tokenize":
            return httpx.Response(200, json={"tokens": [len(w) for w in body["prompt"].split()]})
        now = asyncio.get_running_loop().time()
        seen = Seen(now, str(request.url), body, dict(request.headers))
        self.seen.append(seen)
        reply = self.answer(seen)
        await asyncio.sleep(reply.before_s)
        stream = _Pieces(self, request, reply)
        return httpx.Response(reply.status, headers=reply.headers, stream=stream)

    def _refuse_if_dead(self, request: httpx.Request) -> None:
        if self.is_dead(request):
            raise httpx.ConnectError("connection refused", request=request)

    def is_dead(self, request: httpx.Request) -> bool:
        now = asyncio.get_running_loop().time()
        return now >= self.dies_at.get(request.url.host, float("inf"))

    def seen_by(self, host: str) -> list[Seen]:
        return [one for one in self.seen if httpx.URL(one.url).host == host]


class _Pieces(httpx.AsyncByteStream):
    def __init__(self, servers: ScriptedServers, request: httpx.Request, reply: Reply) -> None:
        self._servers, self._request, self._reply = servers, request, reply

    async def __aiter__(self) -> AsyncIterator[bytes]:
        servers = self._servers
        servers.open += 1
        servers.most_open = max(servers.most_open, servers.open)
        try:
            for after_s, piece in self._reply.pieces:
                await asyncio.sleep(after_s)
                if piece is None:
                    await asyncio.sleep(1e9)
                if isinstance(piece, Exception):
                    raise piece
                if servers.is_dead(self._request):
                    raise httpx.ReadError("connection reset", request=self._request)
                yield piece or b""
        finally:
            servers.open -= 1


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chat_pieces(
    num_tokens: int,
    step_s: float,
    *,
    first_s: float = 0.0,
    prompt: int = 100,
    cached: int | None = 0,
    burst: int = 1,
    tells: bool = True,
) -> list[tuple[float, bytes | Exception | None]]:
    """A chat answer of `num_tokens` words, `burst` to an event, one event each `step_s`."""
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    pieces, told = [(first_s, event({"choices": [{"delta": {"role": "assistant"}}]}))], 0
    while told < num_tokens:
        gained = min(burst, num_tokens - told)
        told += gained
        usage = {"prompt_tokens": prompt, "completion_tokens": told} | details
        choice = {"delta": {"content": "word " * gained}, "finish_reason": None}
        data = {"choices": [choice]} | ({"usage": usage} if tells else {})
        pieces.append((step_s, event(data)))
    last = {"delta": {}, "finish_reason": "length"}
    usage = {"prompt_tokens": prompt, "completion_tokens": num_tokens} | details
    end = event({"choices": [last]}) + event({"choices": [], "usage": usage})
    pieces.append((0.0, end + b"data: [DONE]\n\n"))
    return pieces
