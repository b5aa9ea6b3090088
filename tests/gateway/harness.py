# SPDX-License-Identifier: MIT
"""The gateway without sockets and processes: the real application, wire and text, an echo."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from benchmarks.null_engine import MAX_MODEL_LEN, PAGE_SIZE, VOCAB_SIZE, Echo
from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.engine import messages as m
from tokenspeed.engine.routing import Load
from tokenspeed.engine.wire import Decoder, decode_config, encode, encode_config
from tokenspeed.gateway.app import Application
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.engine_client import EngineClient
from tokenspeed.gateway.engine_pool import EnginePool
from tokenspeed.gateway.metrics import EngineMetrics, Metrics
from tokenspeed.gateway.request_log import Journal, Observer, RequestLog
from tokenspeed.gateway.routes import route_table
from tokenspeed.gateway.service import Service
from tokenspeed.gateway.tenants import TenantSpec
from tokenspeed.models.hub import DEMO_FOLDER
from tokenspeed.text.chat_template import ChatTemplate
from tokenspeed.text.parsers import choose
from tokenspeed.text.template_worker import TemplateWorker
from tokenspeed.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(DEMO_FOLDER)


class FakeClient(EngineClient):
    """`EngineClient` whose engine is an `Echo` in this process; every message crosses the wire."""

    def __init__(self, config: EngineConfig, options: ServerOptions, echo: Echo) -> None:
        super().__init__(config, EngineMetrics(), options.watchdog_timeout_s)
        self.echo = echo
        self.sent: list[m.Down] = []
        self.paused = False
        self._down, self._decoder = Decoder(m.Down), Decoder(m.Up)

    async def start(self) -> None:
        self._push: Any = self
        self._up(m.Ready(MAX_MODEL_LEN, VOCAB_SIZE, 1 << 16, PAGE_SIZE))
        self._tasks = [asyncio.create_task(self._run_echo())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    @property
    def requests(self) -> list[m.GenerateRequest]:
        return [message for message in self.sent if isinstance(message, m.GenerateRequest)]

    def send(self, data: bytes, flags: int = 0) -> None:
        """Takes the place of the socket to the engine."""
        message = self._down.decode(data)
        assert message is not None
        self.sent.append(message)
        if isinstance(message, m.GenerateRequest):
            self.echo.add(message)
        elif isinstance(message, m.AbortRequest):
            self.echo.abort(message.request_id)
        elif isinstance(message, m.RetainPrefix | m.ReleasePrefix):
            self._up(self.echo.order(message))

    def die(self) -> None:
        """What `_watch` does when the engine process ends."""
        self._pull: Any = _Empty()
        self._tasks.append(asyncio.get_running_loop().create_task(self._watch(_Ended())))

    def reject(self, request_id: int, **what: Any) -> None:
        self._up(m.Rejected(request_id, **what))

    def _up(self, message: m.Up) -> None:
        decoded = self._decoder.decode(encode(message))
        if isinstance(decoded, m.Outputs):
            self._deliver(decoded.outputs)
        else:
            self._take(decoded)

    async def _run_echo(self) -> None:
        while True:
            await asyncio.sleep(0)
            if not self.paused and (outputs := self.echo.step()):
                self._up(m.Outputs(outputs))
                self._up(m.StatsMessage(self.echo.stats()))
            if not self.echo.running:
                await asyncio.sleep(0.001)


class _Ended:
    async def wait(self) -> int:
        return -9


class _Empty:
    closed = False

    def recv(self, flags: int) -> bytes:
        import zmq

        raise zmq.Again


class Gateway:
    """The application under test, with what the tests look into."""

    def __init__(self, service: Service, app: Application, http: httpx.AsyncClient) -> None:
        self.service, self.app, self.http = service, app, http
        self.pool = service.pool
        self.clients: list[FakeClient] = service.pool.clients  # type: ignore[assignment]
        self.client = self.clients[0]
        self.echo = self.client.echo

    async def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **kwargs)

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The data of every event of a stream; the last one must be [DONE]."""
        reply = await self.post(path, {**body, "stream": True})
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        return parse_events(reply.text)


def parse_events(text: str) -> list[Any]:
    blocks = [b for b in text.split("\n\n") if b and not b.startswith(":")]
    assert all(b.startswith("data: ") for b in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(b[6:]) for b in blocks[:-1]]


@asynccontextmanager
async def gateway(
    *,
    echo: Echo | None = None,
    engines: int = 1,
    keys: tuple[str, ...] = (),
    tenants: Sequence[TenantSpec] = (),
    observers: Sequence[Observer] = (),
    template: str | None = None,
    tokenizer: Tokenizer | None = TOKENIZER,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Gateway]:
    """A running gateway. Leaving it checks that nothing is left of any request."""
    made = EngineConfig.of(**{"served_model_name": ("null", "org/alias"), **(config or {})})
    assert decode_config(encode_config(made)) == made
    metrics, settings = Metrics("null", engines), ServerOptions(**options)
    pool = EnginePool(made, settings, metrics)
    echoes = [echo or Echo(), *(Echo() for _ in range(engines - 1))]
    clients = [FakeClient(made, settings, one) for one in echoes]
    metrics.engines = [client.metrics for client in clients]
    pool.clients[:] = clients
    special = TOKENIZER.special_tokens
    templates = ChatTemplate.from_folder(DEMO_FOLDER, special, template)
    worker = TemplateWorker(templates) if tokenizer is not None else None
    answers = choose("".join(templates.sources.values()), made.model.answer_format)
    names = made.model.served_model_name
    owners = Keys(keys, tenants)
    service = Service(names, pool, metrics, owners, tokenizer, worker, answers, settings)
    app = Application(
        route_table(service),
        service.keys,
        loopback=True,
        max_body=settings.max_body_bytes,
        journal=Journal("null", [service.sessions, service.watch, RequestLog(), *observers]),
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    await pool.start()
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield Gateway(service, app, http)
        await asyncio.sleep(0)
        assert pool.num_open == 0
        for client in clients:
            assert client._open == {}
            assert client.load == Load()
            if not client.dead.is_set():
                assert client.echo.running == {}
                assert client.echo.waiting == {}
    finally:
        await pool.close()
        service.close()
