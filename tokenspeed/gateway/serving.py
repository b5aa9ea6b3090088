# SPDX-License-Identifier: MIT
"""`run`: one gateway process from its start to its end, whether it is the first or a further one.

When it is to end, readiness goes first, open requests finish within the drain timeout, and then it
leaves. The death of one engine of several is the same, but for the requests that it had and the
status; so is the death of another gateway. Knows no listener's address and no signal.
"""

import asyncio
import contextlib
import functools
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.errors import EngineDeadError
from tokenspeed.gateway import request_log
from tokenspeed.gateway.api_error import ApiError, overloaded
from tokenspeed.gateway.app import Application, RouteSpec
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.dashboard import look_on
from tokenspeed.gateway.engine_client import ENGINE_COMMAND
from tokenspeed.gateway.engine_pool import EnginePool
from tokenspeed.gateway.family import Family, Hello, Stops, obey
from tokenspeed.gateway.handover import GivenProtocol, Link
from tokenspeed.gateway.http_protocol import BoundedProtocol
from tokenspeed.gateway.metrics import Metrics
from tokenspeed.gateway.request_log import Journal, RequestLog
from tokenspeed.gateway.routes import route_table
from tokenspeed.gateway.service import Service
from tokenspeed.gateway.sibling_answers import answer, has
from tokenspeed.gateway.siblings import Siblings
from tokenspeed.gateway.tenants import TenantSpec, read_tenants
from tokenspeed.gateway.tracing import Tracing, tracing_to
from tokenspeed.models.hub import resolve_model
from tokenspeed.text.channels import Format
from tokenspeed.text.chat_template import ChatTemplate
from tokenspeed.text.parsers import choose
from tokenspeed.text.template_worker import TemplateWorker
from tokenspeed.text.tokenizer import Tokenizer

DEATH_LINGER_S = 3.0  # after the engine's end the gateway still answers, with 503, for so long

log = logging.getLogger("tokenspeed.gateway")


@dataclass
class Parts:
    """What every gateway makes of the options."""

    keys: Keys
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    answers: Format
    tracing: list[Tracing]

    def close(self) -> None:
        for one in self.tracing:
            one.close()


def prepare(config: EngineConfig, options: ServerOptions, secret: bytes | None = None) -> Parts:
    """Raises `ModelLoadError`, `ValueError` or `OSError` for what cannot be served as asked."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("tokenspeed.text").setLevel(logging.INFO)  # what is changed in prompts
    keys = _keys(config, options, secret)
    tracing = [] if options.otlp_endpoint is None else [tracing_to(options.otlp_endpoint)]
    if options.log_requests:
        request_log.log.setLevel(logging.INFO)
    folder = resolve_model(config.model.model, config.model.revision)
    if config.model.tokenizer is not None:
        folder = resolve_model(config.model.tokenizer)
    tokenizer = None if config.model.skip_tokenizer_init else Tokenizer.from_folder(folder)
    template = None
    if tokenizer is not None:
        given = config.model.chat_template
        template = ChatTemplate.from_folder(folder, tokenizer.special_tokens, given)
    sources = "" if template is None else "".join(template.sources.values())
    return Parts(keys, tokenizer, template, choose(sources, config.model.answer_format), tracing)


async def run(
    config: EngineConfig,
    options: ServerOptions,
    parts: Parts,
    sockets: list[socket.socket],
    stops: Stops,
    command: tuple[str, ...] = ENGINE_COMMAND,
    announce: Callable[[], None] = lambda: None,
    further: Hello | None = None,
) -> int:
    """Serves until it is asked to stop, or something ends it; returns the exit status.

    `further`: what a gateway that is not the first was told.
    """
    names = config.model.served_model_name or (_public_name(config.model.model),)
    metrics = Metrics(names[0], config.parallel.data_parallel_size)
    pool = EnginePool(config, options, metrics, command, further.number if further else 0)
    keys = parts.keys
    service = _service(names, pool, metrics, parts, options)
    service.watch.streams.default_floor = config.pacing.tps_floor
    family = Family(pool, options)
    link: Link | None = None
    watching: asyncio.Task[None] | None = None
    try:
        if further is not None:
            link = further.link()
            listening = asyncio.create_task(
                obey(pool, stops, functools.partial(_reload, config, options, keys))
            )
            pool.join(further.folders)
        else:
            await pool.start()
            _reload_on_hangup(config, options, keys, family)
            if options.num_gateways > 1:
                link = await family.start(config, keys.secret, sockets[0])
        gc.collect()
        gc.freeze()  # what exists now stays: later collections need not look at it
        journal = Journal(names[0], [service.sessions, service.watch, RequestLog(), *parts.tracing])
        if link is not None:
            service.siblings = Siblings(link, functools.partial(has, service))
        servers = _servers(options, keys, route_table(service), journal, service.siblings)
        del servers[len(sockets) :]  # only the first gateway has a listener for administration
        if link is not None:
            _hear(link, service, servers[0])
        if further is None:
            watching = asyncio.create_task(look_on(service))
        return await _until_the_end(pool, options, servers, sockets, stops, family, announce)
    finally:
        if watching is not None:
            watching.cancel()
        if link is not None:
            link.close()
        if further is not None:
            listening.cancel()
        family.close()
        await pool.close()
        service.close()


def _service(
    names: tuple[str, ...], pool: EnginePool, metrics: Metrics, parts: Parts, options: ServerOptions
) -> Service:
    worker = TemplateWorker(parts.template) if parts.template else None
    if worker is not None:
        worker.start()
    made = Service(
        names, pool, metrics, parts.keys, parts.tokenizer, worker, parts.answers, options
    )
    made.warm_up()
    return made


def _public_name(model: str) -> str:
    """A folder is known by its last part: clients need not learn where it lies."""
    path = Path(os.path.expanduser(model))
    return path.resolve().name if path.is_dir() else model


def _keys(config: EngineConfig, options: ServerOptions, secret: bytes | None = None) -> Keys:
    tenants = () if options.tenants is None else _tenants(config, options.tenants)
    return Keys(options.api_key, tenants, secret)


def _tenants(config: EngineConfig, path: str) -> list[TenantSpec]:
    return read_tenants(path, paced=config.pacing.is_on)


def _reload_on_hangup(
    config: EngineConfig, options: ServerOptions, keys: Keys, family: Family | None = None
) -> None:
    """SIGHUP reads the tenants again, here and in further gateways."""

    def reload() -> None:
        _reload(config, options, keys)
        if family is not None:
            family.tell("reload")

    if options.tenants is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def _reload(config: EngineConfig, options: ServerOptions, keys: Keys) -> None:
    """Reads the tenants again. A file that is wrong changes nothing."""
    try:
        keys.replace(_tenants(config, options.tenants or ""))
    except ValueError as error:
        log.error("the tenants stay as they were: %s", error)
    else:
        log.warning("the tenants were read again")


def _servers(
    options: ServerOptions,
    keys: Keys,
    table: list[RouteSpec],
    journal: Journal | None = None,
    siblings: Siblings | None = None,
) -> list["_Server"]:
    """The public one and, if it is asked for, the one for administration."""
    local = _is_loopback(options.host)

    def server(routes: list[RouteSpec], loopback: bool) -> _Server:
        app = Application(
            routes,
            keys,
            loopback=loopback,
            max_body=options.max_body_bytes,
            journal=journal,
            place=None if siblings is None else siblings.place,
        )
        return _Server(
            uvicorn.Config(
                app,
                http=BoundedProtocol if siblings is None else GivenProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=1,
            )
        )

    if options.admin_port is None:
        return [server(table, local and options.uds is None)]
    public = [spec for spec in table if not spec.admin]
    admin = [spec for spec in table if spec.admin or spec.open]
    return [server(public, local and options.uds is None), server(admin, local)]


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: draining comes before it is told to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def adopt(self, sock: socket.socket, data: bytes) -> None:
        """Goes on with a connection that another gateway has accepted, from a request on."""
        loop = asyncio.get_running_loop()
        protocol = GivenProtocol(self.config, self.server_state, {}, loop)
        protocol.given = True
        await loop.connect_accepted_socket(lambda: protocol, sock)
        protocol.data_received(data)


def _hear(link: Link, service: Service, server: _Server) -> None:
    link.adopt = server.adopt
    link.answer = functools.partial(answer, service, link.number)
    link.start()


async def _until_the_end(
    pool: EnginePool,
    options: ServerOptions,
    servers: list[_Server],
    sockets: list[socket.socket],
    stops: Stops,
    family: Family,
    announce: Callable[[], None],
) -> int:
    """Serves, and waits for whatever ends it. Returns the exit status."""
    loop = asyncio.get_running_loop()
    running = [
        loop.create_task(server.serve([sock]))
        for server, sock in zip(servers, sockets, strict=True)
    ]
    announce()
    ends = [loop.create_task(event.wait()) for event in (stops.stop, pool.dead, family.lost)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    died = pool.dead.is_set() or family.lost.is_set()
    pool.draining = not pool.dead.is_set()
    family.tell("drain")
    drained = [_drain(pool, stops.now, options.drain_timeout_s), family.ended(stops.now)]
    if died and pool.ready is not None:
        drained.append(_first_of(stops.stop, timeout_s=DEATH_LINGER_S))
    await asyncio.gather(*drained)
    pool.fail_open(_cut_off(pool))
    for server in servers:
        server.should_exit = True
        server.force_exit = stops.now.is_set()
    for task in ends:
        task.cancel()
    await asyncio.wait(running, timeout=3.0)
    return 1 if died else 0


def _cut_off(pool: EnginePool) -> ApiError | EngineDeadError:
    if pool.dead.is_set():
        return EngineDeadError("the server stops because one of its engines died")
    return overloaded("the server is shutting down", "draining", 2)


async def _first_of(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


async def _drain(pool: EnginePool, stop_now: asyncio.Event, timeout_s: float) -> None:
    """Waits until no request is open, the deadline passes, a second signal comes or all is lost."""
    if pool.num_open:
        log.warning("draining %d requests", pool.num_open)
    deadline = asyncio.get_running_loop().time() + timeout_s
    while pool.num_open and not pool.all_dead and not stop_now.is_set():
        if asyncio.get_running_loop().time() >= deadline:
            log.warning("%d requests were cut off by the drain timeout", pool.num_open)
            return
        await _first_of(stop_now, timeout_s=0.05)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
