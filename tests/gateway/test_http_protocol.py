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


CHUNKED = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_trailers_and_extensions_of_chunks_are_bounded_and_no_headers(monkeypatch):
    seen, answer = [], application

    async def waits_for_the_body(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        seen.append([name for name, _ in scope["headers"]])
        await answer(scope, receive, send)

    monkeypatch.setitem(globals(), "application", waits_for_the_body)
    fields = b"x: y\r\n" * 6000
    async with listening() as port:
        few = await talk(port, CHUNKED, b"1\r\na\r\n0\r\nx-late: 1\r\n\r\n", b"end\r\n\r\n")
        many = await talk(port, CHUNKED, b"1\r\na\r\n0\r\n", fields, fields)
        long = await talk(port, CHUNKED, b"1\r\na\r\n0\r\nx: ", *[b"y" * 40_000] * 2)
        extended = await talk(port, CHUNKED, b"1;", *[b"x" * 40_000] * 2)
    assert few.startswith(b"HTTP/1.1 200 ")
    assert seen[0] == [b"host", b"transfer-encoding"]
    for reply in (many, long, extended):
        assert reply.startswith(b"HTTP/1.1 431 ")


async def test_framing_and_bodies_are_no_part_of_a_head():
    tiny = b"1\r\na\r\n" * 30_000 + b"0\r\n\r\n"
    large = b"POST / HTTP/1.1\r\ncontent-length: 100000\r\n\r\n" + b"x" * 100_000
    async with listening() as port:
        # The next head begins in the very read in which a body ends; garbage makes the server end.
        reply = await talk(port, CHUNKED + tiny + large + b"GET / HT", b"TP/1.1\r\n\r\n", b"\0\r\n")
    assert reply.count(b"HTTP/1.1 200 ") == 3
    assert b"HTTP/1.1 431" not in reply
