# SPDX-License-Identifier: MIT
"""The engine process: inbox -> engine -> outbox. Knows sockets and the engine, no text, no HTTP.

    gateway  PUSH --> [inbox:  PULL bound here]     Down: requests, aborts, flush, shutdown
    gateway  PULL <-- [outbox: PUSH connected]      Up: loading, ready, outputs, stats, heartbeats

When nothing is to do it blocks on the inbox. It ignores SIGTERM and SIGINT: the gateway drains and
then sends `Shutdown`; if the gateway dies, the heartbeat thread ends this process.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from tokenspeed.config import EngineConfig
from tokenspeed.engine import messages as m
from tokenspeed.engine.outbox import LINGER_MS, Outbox
from tokenspeed.engine.wire import Decoder, decode_config
from tokenspeed.errors import ModelLoadError, RankDiedError, RequestError
from tokenspeed.execution.cpu_share import take_cpu_share

if TYPE_CHECKING:
    from tokenspeed.engine.engine import Engine

HEARTBEAT_S = 0.25
STATS_S = 0.25
MAX_MESSAGE_BYTES = 64 << 20
MAX_MESSAGES_PER_STEP = 256  # so that a flood of requests cannot starve the running ones
RANK_DEATH_GRACE_S = 0.5


class Inbox:
    """The way down. Malformed messages are dropped and counted (`decoder.num_dropped`)."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.maxmsgsize = MAX_MESSAGE_BYTES
        self._socket.bind(address)
        self.decoder = Decoder(m.Down)

    def receive(self, *, block: bool) -> Iterator[m.Down]:
        """What has arrived; with `block`, waits until something has."""
        if block:
            self._socket.poll()
        for _ in range(MAX_MESSAGES_PER_STEP):
            try:
                message = self.decoder.decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if message is not None:
                yield message


class Heart(threading.Thread):
    """Tells gateways that this process lives and how far the engine is; dies with its parent."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", addresses: Sequence[str]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.engine: Engine | None = None
        self._context, self._addresses = context, addresses
        self._parent = os.getppid()
        self._stop_event = threading.Event()

    def run(self) -> None:
        outbox = Outbox(self._context, self._addresses)
        while not self._stop_event.wait(HEARTBEAT_S):
            if os.getppid() != self._parent:
                self._remove_folder()  # nobody else is left to do it
                os._exit(1)
            steps = self.engine.num_steps if self.engine else 0
            work = self.engine.has_work() if self.engine else False
            outbox.offer(m.Heartbeat(steps, work))  # must reach getppid again
        outbox.close()

    def stop(self) -> None:
        self._stop_event.set()
        self.join()

    def _remove_folder(self) -> None:
        """Removes the gateways' sockets and their folder if that holds nothing else."""
        folder = Path(self._addresses[0].removeprefix("ipc://")).parent
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if path.is_socket():
                    path.unlink(missing_ok=True)
            folder.rmdir()


class Loop:
    """Carries messages between the boxes and the engine until `Shutdown`."""

    def __init__(self, engine: "Engine", inbox: Inbox, outbox: Outbox) -> None:
        self._engine, self._inbox, self._outbox = engine, inbox, outbox
        self._stats_sent_s = 0.0
        self._sent = m.EngineStats()

    def run(self) -> None:
        while True:
            idle = not self._engine.has_work()
            self._send_stats(now=idle)
            for message in self._inbox.receive(block=idle):
                if isinstance(message, m.Shutdown):
                    return
                self._take(message)
            if outputs := self._engine.step():
                self._outbox.deliver(outputs)

    def _take(self, message: m.Down) -> None:
        match message:
            case m.GenerateRequest():
                try:
                    self._engine.add_request(message)
                except RequestError as error:
                    request_id = message.request_id
                    refusal = m.Rejected(request_id, str(error), error.field, error.code)
                    self._outbox.answer(request_id, refusal)
            case m.AbortRequest():
                self._engine.abort(message.request_id)
            case m.AddGrammar():
                self._engine.add_grammar(message.key, message.data)
            case m.DropGrammar():
                self._engine.drop_grammar(message.key)
            case m.RetainPrefix() | m.ReleasePrefix():
                num_pages = self._engine.order_prefix(message)
                self._outbox.answer(message.call_id, m.PrefixPages(message.call_id, num_pages))
            case m.FlushCache():
                self._engine.flush_cache()
            case m.GatewayGone():
                self._outbox.drop(message.number)
                self._engine.abort_of(message.number)

    def _send_stats(self, *, now: bool) -> None:
        if not now and time.monotonic() < self._stats_sent_s + STATS_S:
            return
        self._stats_sent_s = time.monotonic()
        stats = self._engine.stats()
        if stats != self._sent:
            self._outbox.send(m.StatsMessage(stats))
            self._sent = stats


def main(
    config_json: str, inbox_addr: str, outbox_addrs: Sequence[str], num_sharers: int = 1
) -> int:
    """Runs the engine process; returns its exit status. Every failure is also sent as `Fatal`."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("tokenspeed.engine.drafting").setLevel(logging.INFO)  # what auto has chosen
    context = zmq.Context()
    outbox, inbox = Outbox(context, outbox_addrs), Inbox(context, inbox_addr)
    heart = Heart(context, outbox_addrs)
    heart.start()
    try:
        engine = _load(decode_config(config_json), outbox, outbox_addrs, context, num_sharers)
        heart.engine = engine
        Loop(engine, inbox, outbox).run()
        engine.close()
        return 0
    except (ModelLoadError, RankDiedError, ValueError) as error:  # no bug of ours: no traceback
        outbox.send(m.Fatal(str(error)))
        return 1
    except Exception as error:
        outbox.send(m.Fatal(f"{type(error).__name__}: {error}"))
        raise
    finally:
        heart.stop()
        outbox.close()
        context.destroy(linger=LINGER_MS)


def _load(
    config: EngineConfig,
    outbox: Outbox,
    addresses: Sequence[str],
    context: "zmq.Context[zmq.Socket[bytes]]",
    num_sharers: int,
) -> "Engine":
    outbox.send(m.Loading(0.0, "starting"))

    def on_death(error: RankDiedError) -> None:
        """The loop may wait on its inbox, or on that very rank: it gets a moment to say so itself
        and leave, and then no more."""
        time.sleep(RANK_DEATH_GRACE_S)
        with contextlib.suppress(zmq.ZMQError):  # it is leaving
            own = Outbox(context, addresses)  # this is another thread
            own.send(m.Fatal(str(error)))
            own.close()
        time.sleep(RANK_DEATH_GRACE_S)
        clear_away(name_prefix())
        os._exit(1)

    # Only now, because it takes seconds and the heart should beat from the first moment on.
    import torch

    from tokenspeed.engine.build import build_engine
    from tokenspeed.engine.ranks.wires import clear_away, name_prefix

    torch.set_num_threads(1)  # the kernels have threads of their own

    engine = build_engine(
        config,
        progress=lambda fraction, what: outbox.send(m.Loading(fraction, what)),
        num_sharers=num_sharers,
        on_death=on_death,
    )
    outbox.send(engine.ready)
    return engine


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tokenspeed.engine.server")
    parser.add_argument("--config", required=True)
    parser.add_argument("--inbox", required=True)
    parser.add_argument("--outbox", required=True, nargs="+", help="of each gateway")
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), metavar=("I", "N"))
    arguments = parser.parse_args()
    take_cpu_share(*arguments.share)
    addresses = (arguments.inbox, arguments.outbox)
    status = 1
    try:
        status = main(arguments.config, *addresses, arguments.share[1])
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the interpreter's own end would complain of what threads still hold
