# SPDX-License-Identifier: MIT
"""`EngineClient`: the gateway's end of the wire and the engine process's keeper. Knows no text.

All outputs of a step arrive in one message and are handed to their mailboxes in one callback. When
the engine process ends, every open request fails at once; when it stands still, readiness ends. It
is never restarted silently.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq

from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.engine import messages as m
from tokenspeed.engine.wire import Decoder, encode, encode_config
from tokenspeed.errors import EngineDeadError, RequestError
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.gateway.api_error import overloaded
from tokenspeed.gateway.metrics import Metrics

ENGINE_COMMAND = (sys.executable, "-m", "tokenspeed.engine.server")
TICK_S = 0.25
STALL_S = 60.0  # a client that takes nothing for so long is dropped
MAX_UNREAD = 16384  # outputs that may wait for one slow client
_SEND_LIMIT = 4096  # messages that may wait for the engine
_MESSAGES_AT_ONCE = 64  # before the event loop serves others

log = logging.getLogger("tokenspeed.gateway")


class Mailbox:
    """Where the outputs of one HTTP request arrive: (choice index, output) in order."""

    def __init__(self) -> None:
        self.task = asyncio.current_task()
        self.request_ids: list[int] = []
        self.sending = 0  # counts up before and after each write; odd while the client is slow
        self.idle_s = 0.0
        self.stalled_s = 0.0
        self._seen_sending = 0
        self._items: list[tuple[int, m.TokenOutput]] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, output: m.TokenOutput) -> None:
        self._items.append((index, output))
        self.wake()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[tuple[int, m.TokenOutput]]:
        """All that has arrived, at least one output; or nothing when it is time for a sign of life.

        Raises what the engine answered instead: `RequestError`, `EngineDeadError`.
        """
        if not self._items:
            if self._failure is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
                self._waiter = None
            if self._failure is not None and not self._items:
                raise self._failure
        self.idle_s = 0.0
        items, self._items = self._items, []
        return items

    def tick(self, keepalive_s: float) -> bool:
        """Called at every tick; False once the client has taken nothing for too long."""
        self.idle_s += TICK_S
        if self.idle_s >= keepalive_s and self._waiter is not None:
            self.idle_s = 0.0
            self.wake()
        moved = self.sending != self._seen_sending or self.sending % 2 == 0
        self.stalled_s = 0.0 if moved else self.stalled_s + TICK_S
        self._seen_sending = self.sending
        return self.stalled_s < STALL_S and len(self._items) < MAX_UNREAD


@dataclass(slots=True)
class _Open:
    """A request that the engine has not finished."""

    mailbox: Mailbox
    index: int
    num_prompt: int
    arrived: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0


class EngineClient:
    """Starts the engine process and carries requests to it and outputs back."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServerOptions,
        metrics: Metrics,
        command: tuple[str, ...] = ENGINE_COMMAND,
    ) -> None:
        self.metrics = metrics
        self.ready: m.Ready | None = None
        self.loading = m.Loading(0.0, "starting the engine")
        self.draining = False
        self.dead = asyncio.Event()  # set once the engine process has ended
        self._config, self._options, self._command = config, options, command
        self._limit = config.scheduler.max_num_seqs + config.scheduler.max_queue_len
        self._ids = itertools.count(secrets.randbits(62))
        self._open: dict[int, _Open] = {}
        self._mailboxes: set[Mailbox] = set()
        self._unsent: set[int] = set()  # aborts that did not fit into the engine's queue
        self._hung = False
        self._beat = self._moved = time.monotonic()
        self._steps = -1
        self._closing = False

    async def start(self) -> None:
        """Spawns the engine; returns at once. Progress shows in `loading` and `ready`."""
        self._folder = tempfile.TemporaryDirectory(prefix="tokenspeed-")
        self._context = zmq.Context()
        inbox, outbox = (f"ipc://{self._folder.name}/{name}" for name in ("inbox", "outbox"))
        self._push = self._context.socket(zmq.PUSH)
        self._push.sndhwm = _SEND_LIMIT
        self._push.linger = 200
        self._pull = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.bind(outbox)
        self._push.connect(inbox)
        self._decoder = Decoder(m.Up)
        config = encode_config(self._config)
        arguments = ("--config", config, "--inbox", inbox, "--outbox", outbox)
        self._process = await asyncio.create_subprocess_exec(*self._command, *arguments)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pull.FD, self._receive)
        self._tasks = [loop.create_task(self._watch()), loop.create_task(self._tick())]

    async def close(self) -> None:
        """Ends the engine process, by force if it does not leave within two seconds."""
        self._closing = True
        with contextlib.suppress(zmq.Again):
            self._push.send(encode(m.Shutdown()), zmq.NOBLOCK)
        try:
            async with asyncio.timeout(2.0):
                await self.dead.wait()
        except TimeoutError:
            self._process.kill()
            await self.dead.wait()
        for task in self._tasks:
            task.cancel()
        asyncio.get_running_loop().remove_reader(self._pull.FD)
        self._push.close()
        self._pull.close()
        self._context.destroy(linger=0)
        self._folder.cleanup()

    @property
    def state(self) -> str:
        """`loading`, `ready`, `hung`, `draining` or `dead`: only `ready` takes requests."""
        if self.dead.is_set():
            return "dead"
        if self.draining:
            return "draining"
        if self.ready is None:
            return "loading"
        return "hung" if self._hung else "ready"

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
            for request_id in box.request_ids:
                self.abort(request_id)

    def check_room(self, num_requests: int = 1) -> m.Ready:
        """The engine's limits. Raises 503 with Retry-After if requests cannot be taken now."""
        state = self.state
        if state == "ready" and self.ready is not None:
            if len(self._open) + num_requests <= self._limit:
                return self.ready
            state = "full"
        self.metrics.rejections[state] += 1
        why, code, retry_s = {
            "loading": ("the model is still loading", "loading", 5),
            "hung": ("the engine does not make progress", "engine_hung", 5),
            "dead": ("the engine has stopped", "engine_dead", 5),
            "draining": ("the server is shutting down", "draining", 2),
            "full": ("too many requests are waiting", "overloaded", 1),
        }[state]
        raise overloaded(why, code, retry_s)

    def submit(
        self,
        mailbox: Mailbox,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        stop_ids: list[int],
        salt: bytes,
    ) -> int:
        """Sends one request; its outputs arrive in the mailbox as (index, output)."""
        self.check_room()
        request_id = next(self._ids) & (2**63 - 1)
        request = m.GenerateRequest(request_id, prompt_ids, params, stop_ids, salt)
        try:
            self._push.send(encode(request), zmq.NOBLOCK)
        except zmq.Again:
            self.metrics.rejections["full"] += 1
            raise overloaded("the engine's inbox is full", "overloaded", 1) from None
        self._open[request_id] = _Open(mailbox, index, len(prompt_ids))
        mailbox.request_ids.append(request_id)
        return request_id

    def abort(self, request_id: int) -> None:
        """Ends a request that is no longer wanted. Finished and unknown ones are ignored."""
        if self._open.pop(request_id, None) is not None:
            self.metrics.finished["abort"] += 1
            self._send_abort(request_id)

    def stop_early(self, request_id: int) -> None:
        """Ends a request that is complete for its client, by a stop string, but not the engine."""
        if (request := self._open.pop(request_id, None)) is not None:
            self._finished(request, m.TokenOutput(request_id, [], "stop"), time.monotonic())
            self._send_abort(request_id)

    def fail_open(self, error: Exception) -> None:
        """Answers every open HTTP request with `error`, after what has already arrived for it."""
        for mailbox in self._mailboxes:
            mailbox.fail(error)

    def flush_cache(self) -> None:
        """Asks the engine to forget cached pages. Raises 503 if it does not listen."""
        self.check_room(0)
        try:
            self._push.send(encode(m.FlushCache()), zmq.NOBLOCK)
        except zmq.Again:
            raise overloaded("the engine's inbox is full", "overloaded", 1) from None

    def _send_abort(self, request_id: int) -> None:
        try:
            self._push.send(encode(m.AbortRequest(request_id)), zmq.NOBLOCK)
            self._unsent.discard(request_id)
        except zmq.Again:
            self._unsent.add(request_id)

    def _receive(self) -> None:
        """Empties the outbox. The descriptor signals changes, not messages: read until empty."""
        for _ in range(0 if self._pull.closed else _MESSAGES_AT_ONCE):
            try:
                data = self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = self._decoder.decode(data)
            if type(message) is m.Outputs:
                self._deliver(message.outputs)
            elif message is not None:
                self._take(message)
        if not self._pull.closed:
            asyncio.get_running_loop().call_soon(self._receive)  # after what else is due

    def _deliver(self, outputs: list[m.TokenOutput]) -> None:
        now = time.monotonic()
        counted = 0
        for output in outputs:
            request = self._open.get(output.request_id)
            if request is None:
                continue  # it was aborted while this was on its way
            counted += len(output.token_ids)
            request.num_tokens += len(output.token_ids)
            if request.first:
                self.metrics.itl.observe(now - request.last)
            elif output.token_ids:
                request.first = now
                self._first(request, output, now)
            request.last = now
            if output.finish_reason is not None:
                del self._open[output.request_id]
                self._finished(request, output, now)
            request.mailbox.put(request.index, output)
        self.metrics.counters["generation_tokens"] += counted

    def _first(self, request: _Open, output: m.TokenOutput, now: float) -> None:
        self.metrics.ttft.observe(now - request.arrived)
        self.metrics.counters["prompt_tokens"] += request.num_prompt
        self.metrics.counters["prompt_tokens_cached"] += output.num_cached_tokens
        self.metrics.computed.observe(request.num_prompt - output.num_cached_tokens)

    def _finished(self, request: _Open, output: m.TokenOutput, now: float) -> None:
        metrics = self.metrics
        metrics.finished[output.finish_reason or "error"] += 1
        metrics.e2e.observe(now - request.arrived)
        if output.prefill_s:
            metrics.queue.observe(output.queue_s)
            metrics.prefill.observe(output.prefill_s)
            metrics.inference.observe(now - request.arrived - output.queue_s)
        metrics.prompt_tokens.observe(request.num_prompt)
        metrics.generation_tokens.observe(request.num_tokens)
        if request.first:
            metrics.decode.observe(now - request.first)
            if request.num_tokens > 1:
                metrics.per_token.observe((now - request.first) / (request.num_tokens - 1))

    def _take(self, message: object) -> None:
        match message:
            case m.Heartbeat():
                self._beat = time.monotonic()
                if message.num_steps != self._steps or not message.has_work:
                    self._steps, self._moved = message.num_steps, self._beat
                for request_id in list(self._unsent):
                    self._send_abort(request_id)
            case m.StatsMessage():
                self.metrics.stats = message.stats
            case m.Rejected():
                if (request := self._open.pop(message.request_id, None)) is not None:
                    error = RequestError(message.message, field=message.field, code=message.code)
                    request.mailbox.fail(error)
            case m.Loading():
                self.loading = message
            case m.Ready():
                self.ready = message
                pages, size = str(message.num_pages), str(message.page_size)
                self.metrics.cache = {"num_gpu_blocks": pages, "block_size": size}
                self._beat = self._moved = time.monotonic()
            case m.Fatal():
                log.error("engine: %s", message.message)

    async def _watch(self) -> None:
        """Waits for the end of the engine process; then nothing that is open stays open."""
        status = await self._process.wait()
        self._receive()
        self.dead.set()
        if not self._closing:
            log.error("the engine process ended with status %s", status)
        self._open.clear()
        self.fail_open(EngineDeadError("the engine stopped before the answer was whole"))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            silent_s = time.monotonic() - min(self._beat, self._moved)
            hung = silent_s > self._options.watchdog_timeout_s
            if hung != self._hung:
                log.error("the engine %s", "does not make progress" if hung else "moves again")
            self._hung = hung
            for mailbox in self._mailboxes:
                if not mailbox.tick(self._options.keepalive_s) and mailbox.task is not None:
                    log.warning("a client that does not read was dropped")
                    mailbox.task.cancel()
