# SPDX-License-Identifier: MIT
"""The bounds on a request's head, with a real socket and a short deadline."""

import asyncio
from contextlib import asynccontextmanager

import uvicorn

from tokenspeed.gateway import http_protocol


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"fine"})


@asynccontextmanager
async def listening():
    """A port on which `application` answers."""
    config = uvicorn.Config(
        application, http=http_protocol.BoundedProtocol, lifespan="off", log_config=None, port=0
    )
    config.load()
    state = uvicorn.server.ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: http_protocol.BoundedProtocol(config, state, {}), "127.0.0.1", 0
    )
    async with server:
        yield server.sockets[0].getsockname()[1]
        for connection in list(state.connections):
            connection.transport.close()


async def talk(port: int, *pieces: bytes) -> bytes:
    """Sends pieces a moment apart; returns what came until the server closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.02)
    async with asyncio.timeout(5):
        reply = await reader.read()
    writer.close()
    return reply


async def test_a_head_that_never_ends_is_answered_408(monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    async with listening() as port:
        for pieces in ((), (b"GET / HTTP/1.1\r\n",), (b"GET /", b" HTTP/1.1\r\n", b"a: b\r\n")):
            assert (await talk(port, *pieces)).startswith(b"HTTP/1.1 408 ")


async def test_a_head_in_time_is_served_and_a_body_may_take_longer(monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    head = b"POST / HTTP/1.1\r\nconnection: close\r\ncontent-length: 4\r\n\r\n"
    async with listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        await asyncio.sleep(0.4)
        writer.write(b"body")
        assert b"fine" in await reader.read()
        writer.close()


async def test_the_second_request_of_a_connection_is_bounded_too(monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    one = b"GET / HTTP/1.1\r\n\r\n"
    async with listening() as port:
        late = await talk(port, one, b"GET / HT")
        large = await talk(port, one, b"GET / HTTP/1.1\r\na: " + b"x" * 100_000)
        many = await talk(port, one, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n")
    assert late.count(b"HTTP/1.1 200") == 1
    assert b"HTTP/1.1 408" in late
    assert b"HTTP/1.1 431" in large
    assert b"HTTP/1.1 431" in many
