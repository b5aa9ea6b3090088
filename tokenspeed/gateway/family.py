# SPDX-License-Identifier: MIT
"""`Family`: the further gateway processes, as the first one keeps them. Knows no request.

They get their options, the listening socket and the place of the engines' sockets when they start,
and words on their standard input while they live: `drain`, `now`, `reload`, `dead N`. When it
closes they leave. The end of one that nobody asked for is the end of all: with it the state of its
conversations is gone, and one started anew would answer as if that had never been.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.gateway.engine_pool import EnginePool
from tokenspeed.gateway.handover import Link, listeners

LEAVE_S = 10.0  # beyond the drain timeout, after which a process is ended by force

log = logging.getLogger("tokenspeed.gateway")


class Hello(msgspec.Struct):
    """What a further gateway is told first, as a line of JSON."""

    config: EngineConfig
    options: ServerOptions
    number: int
    folders: list[str]  # of each engine's sockets
    secret: bytes
    public: int  # descriptors: where clients come,
    private: int  # and where other gateways do

    def link(self) -> Link:
        """This gateway's link to the others."""
        private = socket.socket(fileno=self.private)
        return Link(self.folders[0], self.number, self.options.num_gateways, private)


@dataclass
class Stops:
    """That a gateway is to end: to drain and leave, or to leave now."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    now: asyncio.Event = field(default_factory=asyncio.Event)

    def again(self) -> None:
        """The first time it is to drain, the second time to leave."""
        (self.now if self.stop.is_set() else self.stop).set()


async def obey(pool: EnginePool, stops: Stops, reload: Callable[[], None]) -> None:
    """In a further gateway: does what the first one says; ends the process when that has ended."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        match line.split():
            case [b"drain"]:
                stops.stop.set()
            case [b"now"]:
                stops.stop.set()
                stops.now.set()
            case [b"reload"]:
                reload()
            case [b"dead", index]:
                pool.clients[int(index)].lose()
    os._exit(1)  # the engines are about to end too


class Family:
    """Gateways 1 to N - 1; and this one's link to them."""

    def __init__(self, pool: EnginePool, options: ServerOptions) -> None:
        self.lost = asyncio.Event()  # set once one has ended that should not have
        self._pool, self._options = pool, options
        self._processes: dict[int, Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False

    async def start(self, config: EngineConfig, secret: bytes, public: socket.socket) -> Link:
        """Starts the processes; returns at once, with the link of gateway 0."""
        count = self._options.num_gateways
        folders = [client.folder for client in self._pool.clients]
        own, *others = listeners(folders[0], count)
        for number, private in enumerate(others, 1):
            fds = (public.fileno(), private.fileno())
            hello = Hello(config, self._options, number, folders, secret, *fds)
            self._processes[number] = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tokenspeed.gateway.further", str(number)),
                stdin=PIPE,
                pass_fds=fds,
            )
            private.close()
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(hello) + b"\n")
            self._spawn(number, process)
        for index, client in enumerate(self._pool.clients):
            client.stuck = self._end
            self._tasks.append(asyncio.create_task(self._report(client.dead, f"dead {index}")))
        return Link(folders[0], 0, count, own)

    def tell(self, word: str) -> None:
        """To all that live."""
        self._ending |= word in ("drain", "now")
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.write(word.encode() + b"\n")

    async def ended(self, stop_now: asyncio.Event) -> None:
        """Waits until all have drained and left; with `stop_now` they leave at once."""
        loop = asyncio.get_running_loop()
        deadline, told = loop.time() + self._options.drain_timeout_s + LEAVE_S, False
        while self._processes and loop.time() < deadline:
            if stop_now.is_set() and not told:
                self.tell("now")
                deadline, told = loop.time() + LEAVE_S, True
            await asyncio.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """Ends whatever is left."""
        self._ending = True
        for number in list(self._processes):
            self._end(number)

    def close(self) -> None:
        self.kill()
        for task in self._tasks:
            task.cancel()

    def _spawn(self, number: int, process: Process) -> None:
        self._tasks.append(asyncio.create_task(self._watch(number, process)))

    async def _watch(self, number: int, process: Process) -> None:
        status = await process.wait()
        del self._processes[number]
        self._pool.gateway_gone(number)
        if not self._ending:
            log.error("gateway %d: its process ended with status %s", number, status)
            self.lost.set()

    async def _report(self, event: asyncio.Event, word: str) -> None:
        await event.wait()
        self.tell(word)

    def _end(self, number: int) -> None:
        if (process := self._processes.get(number)) is not None:
            if not self._ending:
                log.error("gateway %d does not read: its process is ended", number)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
