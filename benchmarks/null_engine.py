# SPDX-License-Identifier: MIT
"""An engine process without a model: every answer repeats its prompt's ids, or is given.

Speaks the engine's wire (see `tokenspeed/engine/server.py`) at a given pace. `serve` starts the
real gateway in front of it. Knows no text and computes nothing.

    python -m benchmarks.null_engine serve --port 8000 --step-s 0.01
"""

import argparse
import json
import os
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import zmq

from tokenspeed.engine import messages as m
from tokenspeed.engine.outbox import Outbox
from tokenspeed.engine.wire import Decoder, decode_config
from tokenspeed.execution.cpu_share import take_cpu_share
from tokenspeed.execution.sampling_params import TokenLogprobs

MAX_MODEL_LEN = 4096
VOCAB_SIZE = 1 << 20
PAGE_SIZE = 64


@dataclass
class _Running:
    request: m.GenerateRequest
    num_cached: int
    max_tokens: int
    num_out: int = 0
    answer: list[int] | None = None  # None: the prompt, again and again


class Echo:
    """Requests in, outputs out, one token a step; no clock, no sockets."""

    def __init__(
        self,
        max_num_seqs: int = 1 << 30,
        max_model_len: int = MAX_MODEL_LEN,
        said: dict[str, list[int]] | None = None,
    ) -> None:
        """`said`: every answer ends with the ids `answer`; before them come `words`, again and
        again, as many as `max_tokens` has room for."""
        self.num_steps = 0
        self.running: dict[int, _Running] = {}
        self.waiting: dict[int, _Running] = {}
        self.num_aborted = 0
        self._max_num_seqs, self._max_model_len, self._said = max_num_seqs, max_model_len, said
        self._seen: set[tuple[bytes, tuple[int, ...]]] = set()

    def add(self, request: m.GenerateRequest) -> None:
        prompt = request.prompt_ids
        key = (request.salt, tuple(prompt))
        cached = (len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE if key in self._seen else 0
        self._seen.add(key)
        room = self._max_model_len - len(prompt)
        max_tokens = min(request.params.max_tokens or room, room)
        answer = request.params.forced_output_ids
        if answer is None and self._said is not None:
            answer = self._answer(max_tokens, **self._said)
        self.waiting[request.request_id] = _Running(request, cached, max_tokens, answer=answer)

    def _answer(self, max_tokens: int, answer: list[int], words: list[int]) -> list[int]:
        room = max(0, max_tokens - len(answer))
        return [*(words * (room // len(words) + 1))[:room], *answer]

    def abort(self, request_id: int) -> None:
        found = self.running.pop(request_id, None) or self.waiting.pop(request_id, None)
        self.num_aborted += found is not None

    def abort_of(self, gateway: int) -> None:
        for request_id in [*self.running, *self.waiting]:
            if m.gateway_of(request_id) == gateway:
                self.abort(request_id)

    def order(self, order: m.PrefixOrder) -> m.PrefixPages:
        """What is dropped is what was asked for, or the beginning of it."""
        ids, found = order.token_ids, 0
        for salt, prompt in list(self._seen):
            if salt == order.salt and ids[: len(prompt)] == list(prompt):
                found = max(found, len(prompt) // PAGE_SIZE)
                if isinstance(order, m.ReleasePrefix):
                    self._seen.discard((salt, prompt))
        return m.PrefixPages(order.call_id, found)

    def admit(self) -> None:
        for request_id in list(self.waiting):
            if len(self.running) >= self._max_num_seqs:
                break
            self.running[request_id] = self.waiting.pop(request_id)

    def step(self) -> list[m.TokenOutput]:
        self.num_steps += 1
        self.admit()
        outputs = [self._advance(request_id, r) for request_id, r in self.running.items()]
        for output in outputs:
            if output.finish_reason is not None:
                del self.running[output.request_id]
        return outputs

    def stats(self) -> m.EngineStats:
        return m.EngineStats(num_running=len(self.running), num_waiting=len(self.waiting))

    def _advance(self, request_id: int, r: _Running) -> m.TokenOutput:
        said, params = r.answer or r.request.prompt_ids, r.request.params
        token = said[r.num_out % len(said)]
        r.num_out += 1
        stopped = token in r.request.stop_ids and r.num_out > params.min_tokens
        over = stopped or r.num_out >= r.max_tokens
        logprobs = None
        if params.logprobs is not None:
            top = list(range(params.logprobs))
            values = [-0.5, *(-1.0 - i for i in top)]
            logprobs = [TokenLogprobs([token, *top], values, [1, *(i + 1 for i in top)])]
        return m.TokenOutput(
            request_id,
            [token],
            finish_reason=("stop" if stopped else "length") if over else None,
            stop_token_id=token if stopped else None,
            num_cached_tokens=r.num_cached,
            logprobs=logprobs,
        )


class _Heart(threading.Thread):
    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", addresses: list[str], echo: Echo
    ) -> None:
        super().__init__(daemon=True)
        self._context, self._addresses, self._echo = context, addresses, echo
        self._parent = os.getppid()

    def run(self) -> None:
        outbox = Outbox(self._context, self._addresses)
        while True:
            time.sleep(0.1)
            if os.getppid() != self._parent:
                os._exit(1)
            work = bool(self._echo.running or self._echo.waiting)
            outbox.offer(m.Heartbeat(self._echo.num_steps, work))


def run(args: argparse.Namespace) -> int:
    """The engine process: one step every `step_s` seconds while there is work."""
    take_cpu_share(*args.share)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), Outbox(context, args.outbox)
    inbox.bind(args.inbox)
    said = json.loads(Path(args.answer).read_text()) if args.answer else None
    max_num_seqs = decode_config(args.config).scheduler.max_num_seqs
    echo = Echo(max_num_seqs, args.max_model_len, said)
    _Heart(context, args.outbox, echo).start()
    outbox.send(m.Loading(0.5, "pretending"))
    time.sleep(args.load_s)
    outbox.send(m.Ready(args.max_model_len, VOCAB_SIZE, 1 << 16, PAGE_SIZE))
    decoder = Decoder(m.Down)
    stamps: dict[int, list[float]] = defaultdict(list)  # by seed, which a benchmark sets
    due = time.monotonic()
    while True:
        busy = bool(echo.running or echo.waiting)
        timeout = None if not busy else max(0, round((due - time.monotonic()) * 1000))
        while inbox.poll(timeout):
            timeout = 0
            match decoder.decode(inbox.recv()):
                case m.GenerateRequest() as request:
                    echo.add(request)
                case m.AbortRequest() as abort:
                    echo.abort(abort.request_id)
                case m.RetainPrefix() | m.ReleasePrefix() as order:
                    outbox.answer(order.call_id, echo.order(order))
                case m.GatewayGone() as gone:
                    outbox.drop(gone.number)
                    echo.abort_of(gone.number)
                case m.Shutdown():
                    if args.stamps:
                        Path(f"{args.stamps}.{args.share[0]}").write_text(json.dumps(stamps))
                    os._exit(0)
        if not echo.running and not echo.waiting:
            outbox.send(m.StatsMessage(echo.stats()))
            continue
        if time.monotonic() < due:
            continue
        echo.admit()
        seeds = [r.request.params.seed for r in echo.running.values()] if args.stamps else []
        outputs = echo.step()
        now = time.monotonic()
        for seed in seeds:
            stamps[seed or 0].append(now)
        if outputs:
            outbox.deliver(outputs)
        if echo.num_steps % 32 == 0 or not echo.running:
            outbox.send(m.StatsMessage(echo.stats()))
        due = max(due + args.step_s, time.monotonic() - args.step_s)


def serve(args: argparse.Namespace) -> int:
    """The real gateway with this engine behind it."""
    from tokenspeed.config import EngineConfig, ServerOptions
    from tokenspeed.gateway.server import serve as serve_gateway

    command = (sys.executable, "-m", "benchmarks.null_engine", "run")
    pace: tuple[str, ...] = ("--step-s", str(args.step_s), "--load-s", str(args.load_s))
    pace += ("--stamps", args.stamps)
    pace += ("--max-model-len", str(args.max_model_len), "--answer", args.answer)
    config = EngineConfig.of(
        served_model_name=("null",),
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_seqs,
        max_queue_len=args.max_queue_len,
        data_parallel_size=args.data_parallel_size,
    )
    options = ServerOptions(
        host=args.host,
        port=args.port,
        api_key=tuple(args.api_key),
        drain_timeout_s=args.drain_timeout_s,
        watchdog_timeout_s=args.watchdog_timeout_s,
        keepalive_s=args.keepalive_s,
        num_gateways=args.num_gateways,
        tenants=args.tenants,
    )
    return serve_gateway(config, options, command + pace)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    engine = commands.add_parser("run")
    gateway = commands.add_parser("serve")
    for one in (engine, gateway):
        one.add_argument("--step-s", type=float, default=0.005)
        one.add_argument("--load-s", type=float, default=0.0)
        one.add_argument("--stamps", default="", help="FILE.n: the time of every token of engine n")
        one.add_argument("--max-model-len", type=int, default=MAX_MODEL_LEN)
        one.add_argument("--answer", default="", help="JSON file: `answer` and `words`, see `Echo`")
    for name in ("--config", "--inbox"):
        engine.add_argument(name, required=True)
    engine.add_argument("--outbox", required=True, nargs="+")
    engine.add_argument("--share", nargs=2, type=int, default=(0, 1))
    gateway.add_argument("--host", default="127.0.0.1")
    gateway.add_argument("--port", type=int, default=8000)
    gateway.add_argument("--api-key", nargs="*", default=[])
    gateway.add_argument("--tenants")
    gateway.add_argument("--data-parallel-size", type=int, default=1)
    gateway.add_argument("--num-gateways", type=int, default=1)
    gateway.add_argument("--max-num-seqs", type=int, default=512)
    gateway.add_argument("--max-queue-len", type=int, default=512)
    gateway.add_argument("--drain-timeout-s", type=float, default=30.0)
    gateway.add_argument("--watchdog-timeout-s", type=float, default=60.0)
    gateway.add_argument("--keepalive-s", type=float, default=5.0)
    engine.set_defaults(main=run)
    gateway.set_defaults(main=serve)
    args = parser.parse_args()
    return int(args.main(args))


if __name__ == "__main__":
    raise SystemExit(main())
