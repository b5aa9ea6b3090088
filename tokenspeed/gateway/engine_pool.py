# SPDX-License-Identifier: MIT
"""`EnginePool`: the engines behind this gateway, as one. Knows load and prefixes, no text, no wire.

A prompt goes, with all its answers, to one engine, chosen by `engine/routing.py`. The pool is ready
while every engine is: when one dies or stands still nothing new is taken, because half a service
that looks whole is worse than one that is started again.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.engine import messages as m
from tokenspeed.engine.routing import PrefixRouter, Route
from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.gateway.api_error import ApiError, overloaded
from tokenspeed.gateway.engine_client import ENGINE_COMMAND, EngineClient
from tokenspeed.gateway.mailbox import TICK_S, Mailbox
from tokenspeed.gateway.metrics import Metrics
from tokenspeed.gateway.urgency import Urgency

ORDER_TIMEOUT_S = 10.0
_WORST_FIRST = ("dead", "draining", "loading", "hung", "ready")
_REFUSALS = {  # message, code, seconds after which to try again
    "loading": ("the model is still loading", "loading", 5),
    "hung": ("the engine does not make progress", "engine_hung", 5),
    "dead": ("the engine has stopped", "engine_dead", 5),
    "draining": ("the server is shutting down", "draining", 2),
    "full": ("too many requests are waiting", "overloaded", 1),
}

log = logging.getLogger("tokenspeed.gateway")


@dataclass(frozen=True, slots=True)
class Sent:
    """What the engine is told beside prompt and parameters."""

    salt: bytes = b""
    user: str = ""
    retention: m.Retention = field(default_factory=m.Retention)
    urgency: Urgency = Urgency()


class EnginePool:
    """`data_parallel_size` engines, each with all of the model."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServerOptions,
        metrics: Metrics,
        command: tuple[str, ...] = ENGINE_COMMAND,
        number: int = 0,
    ) -> None:
        """`number`: which of the gateways this is; only the first keeps the engines."""
        self.metrics = metrics
        self.draining = False
        self.dead = asyncio.Event()  # set once any engine process has ended
        self.clients = make_clients(config, options, metrics, command)
        self._keepalive_s, self._forces = options.keepalive_s, options.enable_forced_output
        self._number = number
        self._ids = itertools.count(secrets.randbits(m.GATEWAY_SHIFT - 1))
        self._mailboxes: set[Mailbox] = set()
        self._ready: m.Ready | None = None
        self._router: PrefixRouter | None = None
        self._started: list[EngineClient] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Spawns the engines; returns at once. Progress shows in `loading` and `ready`."""
        for client in self.clients:
            await client.start()
            self._started.append(client)
        self._begin()

    def join(self, folders: Sequence[str]) -> None:
        """Talks to engines that another gateway has started."""
        for client, folder in zip(self.clients, folders, strict=True):
            client.join(folder, self._number)
            self._started.append(client)
        self._begin()

    def _begin(self) -> None:
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._tick())]

    async def close(self) -> None:
        """Ends the engine processes, by force if they do not leave within two seconds."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(client.close() for client in self._started))

    @property
    def state(self) -> str:
        """The worst of the engines' states, or `draining`: only `ready` takes requests."""
        states = {client.state for client in self.clients}
        if self.draining:
            states.add("draining")
        return next(word for word in _WORST_FIRST if word in states)

    @property
    def ready(self) -> m.Ready | None:
        """What every engine can serve; None until all have loaded."""
        if self._ready is None:
            found = [client.ready for client in self.clients if client.ready is not None]
            if len(found) == len(self.clients):
                self._ready = m.Ready(
                    min(ready.max_model_len for ready in found),
                    min(ready.vocab_size for ready in found),
                    sum(ready.num_pages for ready in found),
                    found[0].page_size,
                )
                if len(found) > 1:
                    pages = [ready.num_pages for ready in found]
                    self._router = PrefixRouter(pages, found[0].page_size)
        return self._ready

    @property
    def loading(self) -> m.Loading:
        """How far the slowest engine is that still loads."""
        slow = [client.loading for client in self.clients if client.ready is None]
        return min(slow, key=lambda loading: loading.fraction, default=m.Loading(1.0, "ready"))

    @property
    def all_dead(self) -> bool:
        """Whether no engine is left that could finish anything."""
        return all(client.dead.is_set() for client in self.clients)

    @property
    def num_open(self) -> int:
        """HTTP requests that wait for outputs or still write them."""
        return len(self._mailboxes)

    @contextlib.contextmanager
    def mailbox(self) -> Iterator[Mailbox]:
        """A mailbox; what was submitted with it and has not finished is aborted on leaving."""
        box = Mailbox()
        self._mailboxes.add(box)
        try:
            yield box
        finally:
            self._mailboxes.discard(box)
            box.abort()

    def check_room(self, num_requests: int = 1) -> m.Ready:
        """The engines' limits. Raises 503 with Retry-After if requests cannot be taken now."""
        state = self.state
        ready = self.ready
        if state != "ready" or ready is None:
            raise self._refusal(state)
        if sum(client.room for client in self.clients) < num_requests:
            raise self._refusal("full")
        return ready

    def submit(
        self,
        mailbox: Mailbox,
        prompt_ids: list[int],
        choices: Sequence[tuple[int, SamplingParams]],
        stop_ids: list[int],
        sent: Sent,
    ) -> list[int]:
        """Sends the answers wanted to one prompt, all to one engine; returns their request ids.

        Outputs arrive in the mailbox as (index of the choice, output). Raises 503 if no engine has
        room for all; what had been sent is aborted with the mailbox. `RequestError`: an answer is
        dictated, and this server's are its own.
        """
        self.check_room(len(choices))
        if not self._forces and any(params.forced_output_ids for _, params in choices):
            raise _not_forced()
        route = self._route(prompt_ids, sent.salt, len(choices))
        client = self.clients[route.target]
        uncached = len(prompt_ids) - route.matched
        request_ids = []
        for index, params in choices:
            request_id = self._next_id()
            request = m.GenerateRequest(
                request_id,
                prompt_ids,
                params,
                stop_ids,
                sent.salt,
                sent.user,
                sent.retention,
                sent.urgency.tps_floor,
                sent.urgency.priority,
                sent.urgency.max_wait_s,
            )
            if not client.submit(mailbox, index, request, uncached):
                raise self._refusal("full")
            request_ids.append(request_id)
            uncached = 0  # the further answers share the first one's prompt
        self._count(route, choices)
        return request_ids

    def fail_open(self, error: Exception) -> None:
        """Answers every open HTTP request with `error`, after what has already arrived for it."""
        for mailbox in self._mailboxes:
            mailbox.fail(error)

    def flush_cache(self) -> None:
        """Asks the engines to forget cached pages. Raises 503 if one does not listen."""
        self.check_room(0)
        for target, client in enumerate(self.clients):
            if not client.flush_cache():
                raise self._refusal("full")
            if self._router is not None:
                self._router.forget(target)

    async def retain(self, token_ids: list[int], salt: bytes, retention: m.Retention) -> int:
        """Keeps a prefix's cached pages, or with the default retention no longer; returns of how
        many. Raises 503 if an engine does not answer."""
        return await self._order(m.RetainPrefix(self._next_id(), token_ids, salt, retention))

    async def release(self, token_ids: list[int], salt: bytes) -> int:
        """Drops the cached pages of a prefix that nothing else uses; returns how many.

        Raises 503 if an engine does not answer.
        """
        return await self._order(m.ReleasePrefix(self._next_id(), token_ids, salt))

    def gateway_gone(self, number: int) -> None:
        """Another gateway has ended: what it had open is aborted."""
        for client in self.clients:
            client.gateway_gone(number)

    def _next_id(self) -> int:
        low = next(self._ids) % (1 << m.GATEWAY_SHIFT)
        return self._number << m.GATEWAY_SHIFT | low

    async def _order(self, order: m.PrefixOrder) -> int:
        self.check_room(0)
        try:
            async with asyncio.timeout(ORDER_TIMEOUT_S):
                return sum(await asyncio.gather(*(c.order(order) for c in self.clients)))
        except TimeoutError:
            raise self._refusal("hung") from None

    def _route(self, prompt_ids: list[int], salt: bytes, num_requests: int) -> Route:
        loads = [c.load if c.room >= num_requests else None for c in self.clients]
        route: Route | None = None
        if self._router is not None:
            route = self._router.choose(prompt_ids, salt, loads)
        elif loads[0] is not None:
            route = Route(0, 0, False, [])
        if route is None:
            raise self._refusal("full")
        return route

    def _count(self, route: Route, choices: Sequence[tuple[int, SamplingParams]]) -> None:
        if self._router is not None:
            self._router.record(route)
        metrics = self.clients[route.target].metrics
        metrics.routing["requests"] += len(choices)
        metrics.routing["matched_tokens"] += route.matched
        metrics.routing["overridden"] += route.by_load
        metrics.params_n.observe(len(choices))
        max_tokens = choices[0][1].max_tokens
        if max_tokens is not None:
            metrics.params_max_tokens.observe(max_tokens)

    def _refusal(self, state: str) -> ApiError:
        self.metrics.rejections[state] += 1
        return overloaded(*_REFUSALS[state])

    async def _watch(self) -> None:
        waits = [asyncio.create_task(client.dead.wait()) for client in self.clients]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            self.dead.set()
        finally:
            for wait in waits:
                wait.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for client in self.clients:
                client.check_pulse()
            for mailbox in self._mailboxes:
                if not mailbox.tick(self._keepalive_s) and mailbox.task is not None:
                    log.warning("a client that does not read was dropped")
                    mailbox.task.cancel()


def _not_forced() -> RequestError:
    field = "forced_output_ids"
    why = f"{field}: this server takes none; start it with --enable-forced-output"
    return RequestError(why, field=field, code="unsupported_parameter")


def make_clients(
    config: EngineConfig, options: ServerOptions, metrics: Metrics, command: tuple[str, ...]
) -> list[EngineClient]:
    """A client for each engine. Several divide this machine's cores and memory."""
    count = config.parallel.data_parallel_size
    parallel = dataclasses.replace(config.parallel, data_parallel_size=1)
    config = dataclasses.replace(config, parallel=parallel)
    made = []
    for index, of_engine in enumerate(metrics.engines):
        share = ("--share", str(index), str(count)) if count > 1 else ()
        name = f"engine {index}" if count > 1 else "the engine"
        made.append(
            EngineClient(
                config,
                of_engine,
                options.watchdog_timeout_s,
                (*command, *share),
                name,
                options.num_gateways,
            )
        )
    return made
