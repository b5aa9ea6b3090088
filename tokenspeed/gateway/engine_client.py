# SPDX-License-Identifier: MIT
"""`EngineClient`: the gateway's end of one engine's wire and that process's keeper. Knows no text.

All outputs of a step arrive in one message and are handed to their mailboxes in one callback. When
the engine process ends, every request that is open here fails at once; when it stands still, it is
`hung`. It is never restarted silently. Which engine gets a request is not decided here. Of several
gateways the first keeps the process; the others join its wire.
"""

import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from tokenspeed.config import EngineConfig
from tokenspeed.engine import messages as m
from tokenspeed.engine.routing import Load
from tokenspeed.engine.wire import Decoder, encode, encode_config
from tokenspeed.errors import EngineDeadError, RequestError
from tokenspeed.gateway.api_error import overloaded
from tokenspeed.gateway.mailbox import Mailbox
from tokenspeed.gateway.metrics import EngineMetrics
from tokenspeed.text.grammar import GrammarMirror

ENGINE_COMMAND = (sys.executable, "-m", "tokenspeed.engine.server")
_SEND_LIMIT = 4096  # messages that may wait for the engine
_MESSAGES_AT_ONCE = 64  # before the event loop serves others

log = logging.getLogger("tokenspeed.gateway")


@dataclass(slots=True)
class _Open:
    """A request that the engine has not finished."""

    mailbox: Mailbox
    index: int
    num_prompt: int
    uncached: int  # prompt tokens that the engine probably has to compute, until it has
    arrived: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0


class EngineClient:
    """Starts the engine process and carries requests to it and outputs back."""

    def __init__(
        self,
        config: EngineConfig,
        metrics: EngineMetrics,
        watchdog_timeout_s: float,
        command: tuple[str, ...] = ENGINE_COMMAND,
        name: str = "the engine",
        num_gateways: int = 1,
    ) -> None:
        self.metrics = metrics
        self.ready: m.Ready | None = None
        self.loading = m.Loading(0.0, "starting the engine")
        self.dead = asyncio.Event()  # set once the engine process has ended
        self._config, self._command, self._name = config, command, name
        self._watchdog_timeout_s, self._num_gateways = watchdog_timeout_s, num_gateways
        limit = config.scheduler.max_num_seqs + config.scheduler.max_queue_len
        self._limit = -(-limit // num_gateways)
        self._open: dict[int, _Open] = {}
        self._grammars = GrammarMirror(lambda message: self._send(message))
        self._waiting_tokens = 0  # the sum of `uncached` over what is open
        self._orders: dict[int, asyncio.Future[int]] = {}  # what the engine is to answer
        self._unsent: set[int] = set()  # aborts that did not fit into the engine's queue
        self._hung = False
        self._beat = self._moved = time.monotonic()
        self._steps = -1
        self._closing = False
        self._process: asyncio.subprocess.Process | None = None  # None: another gateway keeps it
        self.stuck: Callable[[int], None] = lambda number: None  # a gateway that does not read

    async def start(self) -> None:
        """Spawns the engine; returns at once. Progress shows in `loading` and `ready`."""
        self._own_folder = tempfile.TemporaryDirectory(prefix="tokenspeed-")
        inbox, *outboxes = self.join(self._own_folder.name, 0)
        config = encode_config(self._config)
        arguments = ("--config", config, "--inbox", inbox, "--outbox", *outboxes)
        self._process = await asyncio.create_subprocess_exec(*self._command, *arguments)
        self._watcher = asyncio.get_running_loop().create_task(self._watch(self._process))

    def join(self, folder: str, number: int) -> list[str]:
        """Opens the wire's end of gateway `number`; returns the addresses of inbox and outboxes."""
        self.folder = folder
        inbox = f"ipc://{folder}/inbox"
        outboxes = [f"ipc://{folder}/outbox{n or ''}" for n in range(self._num_gateways)]
        self._context = zmq.Context()
        self._push = self._context.socket(zmq.PUSH)
        self._push.sndhwm = _SEND_LIMIT
        self._push.linger = 200
        self._pull = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.bind(outboxes[number])
        self._push.connect(inbox)
        self._decoder = Decoder(m.Up)
        asyncio.get_running_loop().add_reader(self._pull.FD, self._receive)
        return [inbox, *outboxes]

    async def close(self) -> None:
        """Ends the engine process, by force if it does not leave within two seconds.

        A gateway that does not keep it only leaves.
        """
        self._closing = True
        if self._process is not None:
            self._send(m.Shutdown())
            try:
                async with asyncio.timeout(2.0):
                    await self.dead.wait()
            except TimeoutError:
                self._process.kill()
                await self.dead.wait()
        asyncio.get_running_loop().remove_reader(self._pull.FD)
        self._push.close()
        self._pull.close()
        if self._process is not None:
            self._context.destroy(linger=0)
            self._own_folder.cleanup()
        else:
            self._context.term()  # aborts may be on their way

    @property
    def state(self) -> str:
        """`loading`, `ready`, `hung` or `dead`: only `ready` takes requests."""
        if self.dead.is_set():
            return "dead"
        if self.ready is None:
            return "loading"
        return "hung" if self._hung else "ready"

    @property
    def room(self) -> int:
        """Requests that may be submitted now."""
        return self._limit - len(self._open)

    @property
    def load(self) -> Load:
        """What was submitted and is not over."""
        return Load(self._waiting_tokens, len(self._open))

    def submit(
        self, mailbox: Mailbox, index: int, request: m.GenerateRequest, uncached: int
    ) -> bool:
        """Sends one request; its outputs arrive in the mailbox as (index, output).

        `uncached`: prompt tokens that the engine will probably have to compute. False, and nothing
        is sent, if too many messages wait for the engine.
        """
        grammar = request.params.grammar
        if grammar is not None and not self._grammars.provide(grammar):
            return False
        if not self._send(request):
            return False
        length = len(request.prompt_ids)
        self._open[request.request_id] = _Open(mailbox, index, length, uncached)
        self._waiting_tokens += uncached
        mailbox.expect(request.request_id, self)
        return True

    def abort(self, request_id: int) -> None:
        """Ends a request that is no longer wanted. Finished and unknown ones are ignored."""
        if self._close_request(request_id) is not None:
            self.metrics.finished["abort"] += 1
            self._send_abort(request_id)

    def stop_early(self, request_id: int) -> None:
        """Ends a request that is complete for its client, by a stop string, but not the engine."""
        if (request := self._close_request(request_id)) is not None:
            self._finished(request, m.TokenOutput(request_id, [], "stop"), time.monotonic())
            self._send_abort(request_id)

    def flush_cache(self) -> bool:
        """Asks the engine to forget cached pages. False if too many messages wait for it."""
        return self._send(m.FlushCache())

    def gateway_gone(self, number: int) -> None:
        """Tells the engine that what this gateway asked for is not wanted any more."""
        self._send(m.GatewayGone(number))

    async def order(self, order: m.PrefixOrder) -> int:
        """On how many pages the engine acted. `EngineDeadError` if it ends before it answers."""
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._orders[order.call_id] = answer
        try:
            if not self._send(order):
                raise overloaded("too many messages are waiting", "overloaded", 1)
            return await answer
        finally:
            del self._orders[order.call_id]

    def check_pulse(self) -> None:
        """To be called several times a second: notices whether the engine makes progress."""
        self._grammars.sweep()
        silent_s = time.monotonic() - min(self._beat, self._moved)
        hung = silent_s > self._watchdog_timeout_s
        if hung != self._hung:
            what = "does not make progress" if hung else "moves again"
            log.error("%s %s", self._name, what)
        self._hung = hung

    def _send(self, message: m.Down) -> bool:
        try:
            self._push.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _send_abort(self, request_id: int) -> None:
        if self._send(m.AbortRequest(request_id)):
            self._unsent.discard(request_id)
        else:
            self._unsent.add(request_id)

    def _close_request(self, request_id: int) -> _Open | None:
        if (request := self._open.pop(request_id, None)) is not None:
            self._waiting_tokens -= request.uncached
        return request

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
                self._close_request(output.request_id)
                self._finished(request, output, now)
            request.mailbox.put(request.index, output)
        self.metrics.counters["generation_tokens"] += counted

    def _first(self, request: _Open, output: m.TokenOutput, now: float) -> None:
        self._waiting_tokens -= request.uncached
        request.uncached = 0
        self.metrics.ttft.observe(now - request.arrived)
        self.metrics.counters["prompt_tokens"] += request.num_prompt
        self.metrics.counters["prompt_tokens_cached"] += output.num_cached_tokens
        self.metrics.computed.observe(request.num_prompt - output.num_cached_tokens)

    def _finished(self, request: _Open, output: m.TokenOutput, now: float) -> None:
        metrics = self.metrics
        if output.code == "overloaded":
            return  # refused at the door: counted there, and nothing was computed
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
                if (request := self._close_request(message.request_id)) is not None:
                    error = RequestError(message.message, field=message.field, code=message.code)
                    request.mailbox.fail(error)
            case m.PrefixPages():
                answer = self._orders.get(message.call_id)
                if answer is not None and not answer.done():
                    answer.set_result(message.num_pages)
            case m.Loading():
                self.loading = message
            case m.Ready():
                self.ready = message
                pages, size = str(message.num_pages), str(message.page_size)
                self.metrics.cache = {"num_gpu_blocks": pages, "block_size": size}
                self._beat = self._moved = time.monotonic()
            case m.GatewayStuck():
                self.stuck(message.number)
            case m.Fatal() if self._process is not None:
                log.error("%s: %s", self._name, message.message)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Waits for the end of the engine process."""
        status = await process.wait()
        if not self._closing:
            log.error("%s: its process ended with status %s", self._name, status)
        self.lose()

    def lose(self) -> None:
        """The engine process has ended: nothing that is open stays open."""
        self._receive()
        self.dead.set()
        error = EngineDeadError("the engine stopped before the answer was whole")
        for answer in self._orders.values():
            if not answer.done():
                answer.set_exception(error)
        for request_id in list(self._open):
            if (request := self._close_request(request_id)) is not None:
                request.mailbox.fail(error)
