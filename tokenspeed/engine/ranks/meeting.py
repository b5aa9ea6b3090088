# SPDX-License-Identifier: MIT
"""Rank 0 gathers the others: hellos in, welcomes out. Knows no way in which they were started.

Whoever connects is listened to on a thread of its own, so that nobody who says nothing keeps a rank
waiting.
"""

import contextlib
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from tokenspeed.engine.ranks.connection import Connection, Kind, facts_of
from tokenspeed.engine.ranks.hello import Hello, refusal
from tokenspeed.errors import RankDiedError

HELLO_TIMEOUT_S = 10.0  # from a connection to its first words
MAX_HELLO = 1 << 16
MAX_STRANGERS = 256  # that may be listened to at once
POLL_S = 0.05

Watch = Callable[[], None]  # raises RankDiedError if a process that was started has ended


@dataclass
class Meeting:
    """A place where ranks come together: listens as long as it is open."""

    host: str = "127.0.0.1"
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind((self.host, 0))
        self._socket.listen(128)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._arrived: SimpleQueue[tuple[Connection, Hello]] = SimpleQueue()
        self._strangers: set[Connection] = set()

    def gather(
        self, mine: Hello, num_ranks: int, timeout_s: float, watch: Watch
    ) -> tuple[dict[int, Connection], dict[int, Hello]]:
        """A connection to every rank but 0, and its hello.

        `RankDiedError` names the ranks that did not come within `timeout_s`, or why one may not
        join; strangers (no hello, or another token) are turned away.
        """
        connections: dict[int, Connection] = {}
        hellos: dict[int, Hello] = {}
        deadline = time.monotonic() + timeout_s
        try:
            while len(hellos) < num_ranks - 1:
                watch()
                if time.monotonic() > deadline:
                    missing = [r for r in range(1, num_ranks) if r not in hellos]
                    raise RankDiedError(
                        f"rank(s) {', '.join(map(str, missing))} of {num_ranks} did not come within"
                        f" {timeout_s:g} s"
                    )
                self._accept()
                with contextlib.suppress(Empty):
                    while True:
                        connection, hello = self._arrived.get_nowait()
                        if _may_join(mine, num_ranks, connection, hello, set(hellos)):
                            connections[hello.rank], hellos[hello.rank] = connection, hello
        except BaseException:
            for connection in connections.values():
                connection.close()
            raise
        return connections, hellos

    def close(self) -> None:
        """Listens no longer; whoever has not been let in is cut off."""
        self._socket.close()
        for connection in list(self._strangers):
            connection.close()
        while not self._arrived.empty():
            self._arrived.get()[0].close()

    def _accept(self) -> None:
        """Waits a little for somebody to connect."""
        select.select([self._socket], [], [], POLL_S)
        with contextlib.suppress(OSError):  # nobody, or nobody any more
            while True:
                accepted, address = self._socket.accept()
                accepted.setblocking(True)
                if len(self._strangers) >= MAX_STRANGERS:
                    accepted.close()
                    continue
                connection = Connection(accepted, f"the process at {address[0]}:{address[1]}")
                self._strangers.add(connection)
                threading.Thread(
                    target=self._listen, args=(connection,), name="hello", daemon=True
                ).start()

    def _listen(self, connection: Connection) -> None:
        try:
            kind, body = connection.receive(HELLO_TIMEOUT_S, MAX_HELLO)
            if kind is not Kind.HELLO:
                raise RankDiedError("its first word was no hello")
            hello = Hello.from_facts(facts_of(body))
            connection.peer = f"rank {hello.rank} (pid {hello.pid} on {hello.host})"
            self._arrived.put((connection, hello))
        except (RankDiedError, ValueError):
            connection.close()
        finally:
            self._strangers.discard(connection)


def _may_join(
    mine: Hello, num_ranks: int, connection: Connection, hello: Hello, present: set[int]
) -> bool:
    """Whether it may; tells it why not. `RankDiedError` if it should have been one of ours."""
    why = refusal(mine, hello, num_ranks, present)
    if why is None:
        return True
    with contextlib.suppress(RankDiedError):
        connection.send(Kind.REFUSED, why.encode())
    connection.close()
    if mine.same_token(hello):
        raise RankDiedError(f"a rank may not join: {why}")
    return False


def introduce(
    host: str, port: int, mine: Hello, timeout_s: float
) -> tuple[Connection, dict[str, Any]]:
    """The other side: a connection to rank 0 and its welcome. `RankDiedError`: refused, or gone."""
    connection = Connection.open(host, port, timeout_s)
    try:
        connection.send_json(Kind.HELLO, **mine.facts())
        kind, body = connection.receive()
        if kind is Kind.REFUSED:
            raise RankDiedError(f"rank 0 refuses this rank: {body.decode(errors='replace')}")
        if kind is not Kind.WELCOME:
            raise RankDiedError(f"rank 0 said {kind.name} where a welcome was due")
        return connection, facts_of(body)
    except BaseException:
        connection.close()
        raise


def free_port(host: str) -> int:
    """A port that nobody listens on at the moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
