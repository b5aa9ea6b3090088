# SPDX-License-Identifier: MIT
"""`serve`: listeners, signals and the order in which things start and end. Knows no request.

Everything that can be wrong with the options is found before a socket is opened. SIGTERM ends
readiness, lets open requests finish within the drain timeout and leaves; a second one leaves now.
The death of one engine of several is the same, but for the requests that it had and the status.
"""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop

from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.errors import EngineDeadError
from tokenspeed.gateway import request_log
from tokenspeed.gateway.api_error import overloaded
from tokenspeed.gateway.app import Application, RouteSpec
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.engine_client import ENGINE_COMMAND
from tokenspeed.gateway.engine_pool import EnginePool
from tokenspeed.gateway.http_protocol import BoundedProtocol
from tokenspeed.gateway.metrics import Metrics
from tokenspeed.gateway.request_log import Journal, RequestLog
from tokenspeed.gateway.routes import route_table
from tokenspeed.gateway.service import Service
from tokenspeed.gateway.tenants import read_tenants
from tokenspeed.gateway.tracing import Tracing, tracing_to
from tokenspeed.models.hub import resolve_model
from tokenspeed.text.channels import Format
from tokenspeed.text.chat_template import ChatTemplate
from tokenspeed.text.parsers import choose
from tokenspeed.text.template_worker import TemplateWorker
from tokenspeed.text.tokenizer import Tokenizer

DEATH_LINGER_S = 3.0  # after the engine's end the gateway still answers, with 503, for so long

log = logging.getLogger("tokenspeed.gateway")


def serve(
    config: EngineConfig, options: ServerOptions, command: tuple[str, ...] = ENGINE_COMMAND
) -> int:
    """Serves until a signal or the engine's end; returns the exit status.

    Raises `ModelLoadError`, `ValueError` or `OSError` for what cannot be served as asked.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("tokenspeed.text").setLevel(logging.INFO)  # what is changed in prompts
    keys = _keys(options)
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
    answers = choose(sources, config.model.answer_format)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(listener) for listener in _listeners(options)]
        if options.uds is not None:
            stack.callback(Path(options.uds).unlink, missing_ok=True)
        for one in tracing:
            stack.callback(one.close)
        return uvloop.run(
            _run(config, options, command, keys, tokenizer, template, answers, sockets, tracing)
        )


async def _run(
    config: EngineConfig,
    options: ServerOptions,
    command: tuple[str, ...],
    keys: Keys,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    answers: Format,
    sockets: list[socket.socket],
    tracing: list[Tracing],
) -> int:
    names = config.model.served_model_name or (_public_name(config.model.model),)
    metrics = Metrics(names[0], config.parallel.data_parallel_size)
    pool = EnginePool(config, options, metrics, command)
    worker = TemplateWorker(template) if template else None
    if worker is not None:
        worker.start()
    service = Service(names, pool, metrics, keys, tokenizer, worker, answers, options)
    service.warm_up()
    try:
        await pool.start()
        gc.collect()
        gc.freeze()  # what exists now stays: later collections need not look at it
        _reload_on_hangup(options, keys)
        journal = Journal(names[0], [service.sessions, RequestLog(), *tracing])
        servers = _servers(options, keys, route_table(service), journal)
        return await _until_the_end(pool, options, servers, sockets)
    finally:
        await pool.close()
        service.close()


def _public_name(model: str) -> str:
    """A folder is known by its last part: clients need not learn where it lies."""
    path = Path(os.path.expanduser(model))
    return path.resolve().name if path.is_dir() else model


def _keys(options: ServerOptions) -> Keys:
    tenants = () if options.tenants is None else read_tenants(options.tenants)
    return Keys(options.api_key, tenants)


def _reload_on_hangup(options: ServerOptions, keys: Keys) -> None:
    """SIGHUP reads the tenants again. A file that is wrong changes nothing."""
    path = options.tenants
    if path is None:
        return

    def reload() -> None:
        try:
            keys.replace(read_tenants(path))
        except ValueError as error:
            log.error("the tenants stay as they were: %s", error)
        else:
            log.warning("the tenants were read again")

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def _servers(
    options: ServerOptions, keys: Keys, table: list[RouteSpec], journal: Journal | None = None
) -> list["_Server"]:
    local = _is_loopback(options.host)

    def server(routes: list[RouteSpec], loopback: bool) -> _Server:
        app = Application(
            routes, keys, loopback=loopback, max_body=options.max_body_bytes, journal=journal
        )
        return _Server(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
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


async def _until_the_end(
    pool: EnginePool,
    options: ServerOptions,
    servers: list[_Server],
    sockets: list[socket.socket],
) -> int:
    """Serves, and waits for whatever ends it. Returns the exit status."""
    loop = asyncio.get_running_loop()
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, on_signal)
    running = [
        loop.create_task(server.serve([sock]))
        for server, sock in zip(servers, sockets, strict=True)
    ]
    _announce(options, sockets)
    ends = [loop.create_task(event.wait()) for event in (stop, pool.dead)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    died = pool.dead.is_set()
    if died and pool.ready is not None:
        lingering = _first_of(stop, timeout_s=DEATH_LINGER_S)
        await asyncio.gather(lingering, _drain(pool, stop_now, options.drain_timeout_s))
        pool.fail_open(EngineDeadError("the server stops because one of its engines died"))
    elif not died:
        pool.draining = True
        await _drain(pool, stop_now, options.drain_timeout_s)
        pool.fail_open(overloaded("the server is shutting down", "draining", 2))
    for server in servers:
        server.should_exit = True
        server.force_exit = stop_now.is_set()
    for task in ends:
        task.cancel()
    await asyncio.wait(running, timeout=3.0)
    return 1 if died else 0


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


def _listeners(options: ServerOptions) -> list[socket.socket]:
    """Bound sockets: the public one, then the one for metrics and administration if asked for."""
    if options.uds is not None:
        made = [_unix_listener(options.uds)]
    else:
        made = [_listener(options.host, options.port)]
    if options.admin_port is not None:
        host = options.host if options.uds is None else "127.0.0.1"
        made.append(_listener(host, options.admin_port))
    return made


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen()  # only this fails if another socket that has not begun to listen is bound
    except (OSError, OverflowError) as error:
        made.close()
        raise OSError(f"cannot listen on {host} port {port}: {error}") from None
    return made


def _unix_listener(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket() and _is_deserted(path):
            os.unlink(path)
        made.bind(path)
        os.chmod(path, 0o600)
        made.listen()
    except OSError as error:
        made.close()
        raise OSError(f"cannot listen on {path}: {error}") from None
    return made


def _is_deserted(path: str) -> bool:
    """Whether the server that made this socket is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _announce(options: ServerOptions, sockets: list[socket.socket]) -> None:
    if options.uds is not None:
        print(f"TokenSpeed listens on {options.uds}; loading shows at /ready", flush=True)
        return
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{sockets[0].getsockname()[1]}"
    print(f"TokenSpeed listens on {url}; readiness and loading show at {url}/ready", flush=True)
    if len(sockets) > 1:
        port = sockets[1].getsockname()[1]
        print(f"metrics and administration on http://{host}:{port}", flush=True)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
