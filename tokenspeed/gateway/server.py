# SPDX-License-Identifier: MIT
"""`serve`: listeners, signals and what must be right before they open. Knows no request.

Everything that can be wrong with the options is found before a socket is opened. SIGTERM ends
readiness, lets open requests finish within the drain timeout and leaves; a second one leaves now.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from pathlib import Path

import uvloop

from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.engine.messages import MAX_GATEWAYS
from tokenspeed.gateway.engine_client import ENGINE_COMMAND
from tokenspeed.gateway.family import Stops
from tokenspeed.gateway.serving import Parts, prepare, run


def serve(
    config: EngineConfig, options: ServerOptions, command: tuple[str, ...] = ENGINE_COMMAND
) -> int:
    """Serves until a signal or the engine's end; returns the exit status.

    Raises `ModelLoadError`, `ValueError` or `OSError` for what cannot be served as asked.
    """
    if options.num_gateways > MAX_GATEWAYS:
        raise ValueError(f"num_gateways must be at most {MAX_GATEWAYS}: {options.num_gateways}")
    parts = prepare(config, options)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(listener) for listener in _listeners(options)]
        if options.uds is not None:
            stack.callback(Path(options.uds).unlink, missing_ok=True)
        stack.callback(parts.close)
        return uvloop.run(_run(config, options, command, parts, sockets))


async def _run(
    config: EngineConfig,
    options: ServerOptions,
    command: tuple[str, ...],
    parts: Parts,
    sockets: list[socket.socket],
) -> int:
    stops = Stops()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stops.again)
    return await run(
        config, options, parts, sockets, stops, command, lambda: _announce(options, sockets)
    )


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
