# SPDX-License-Identifier: MIT
"""A rank that is not 0: meets rank 0, loads its share, runs what it is sent, and ends with it.

    python -m tokenspeed.engine.ranks.worker     started by rank 0, settings as JSON on stdin

Holds no scheduler. Knows neither requests nor how it was started.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tokenspeed.config import EngineConfig
from tokenspeed.engine.ranks.connection import Connection, Kind
from tokenspeed.engine.ranks.hello import Hello
from tokenspeed.engine.ranks.meeting import introduce
from tokenspeed.engine.ranks.starter import leave_with_parent
from tokenspeed.engine.ranks.wires import clear_away
from tokenspeed.errors import RankDiedError, TokenSpeedError

_log = logging.getLogger(__name__)
JOIN_TIMEOUT_S = 30.0
LOST_GRACE_S = 1.0
GOODBYE_S = 10.0
RING_POLL_S = 3600.0


class Ears(threading.Thread):
    """Reads what rank 0 says; when rank 0 ends, so does this process, whatever it is doing."""

    def __init__(self, connection: Connection, welcome: dict[str, Any]) -> None:
        super().__init__(name="rank-0", daemon=True)
        self._connection, self._welcome = connection, welcome
        self._status = 0
        self.heard: SimpleQueue[tuple[Kind, bytes]] = SimpleQueue()

    def run(self) -> None:
        try:
            while True:
                kind, body = self._connection.receive()
                if kind is Kind.BYE:
                    os._exit(self._status)
                self.heard.put((kind, body))
        except RankDiedError:
            clear_away(*self._welcome["names"])  # rank 0 may have had no time to
            os._exit(1)

    def leave(self, why: str, *, lost: bool) -> None:
        """Tells rank 0 why this rank cannot go on, and ends with its goodbye.

        `lost`: because of another rank. Rank 0 will know that one's reason itself and not wait for
        this one's.
        """
        self._status = 1
        if lost:
            self.join(LOST_GRACE_S)
        with contextlib.suppress(RankDiedError):
            self._connection.send(Kind.FAILED, why.encode())
        self.join(GOODBYE_S)

    def expect(self, kind: Kind) -> dict[str, Any]:
        got, body = self.heard.get()
        if got is not kind:
            raise RankDiedError(f"rank 0 said {got.name} where {kind.name} was due")
        facts: dict[str, Any] = json.loads(body)
        return facts


def run_worker(
    host: str, port: int, token: str, rank: int, config: str = "", machine: str = ""
) -> int:
    """Runs rank `rank` to its end; returns the exit status.

    `config` is the digest of the options that this rank was started with, "" if it has none;
    `machine` what ranks of this machine call it, if not its name.
    """
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)  # rank 0 says when it is over
    logging.basicConfig(format=f"%(levelname)s %(name)s (rank {rank}): %(message)s")
    try:
        mine = Hello.of_this_process(rank, token, config, machine)
        connection, welcome = introduce(host, port, mine, JOIN_TIMEOUT_S)
    except RankDiedError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 1
    ears = Ears(connection, welcome)
    ears.start()
    try:
        _work(rank, welcome, connection, ears)
    except Exception as error:
        if not isinstance(error, (TokenSpeedError, ValueError)):
            _log.exception("rank %d failed", rank)
        ears.leave(str(error) or type(error).__name__, lost=isinstance(error, RankDiedError))
    return 1


def _work(rank: int, welcome: dict[str, Any], connection: Connection, ears: Ears) -> None:
    from tokenspeed.execution.cpu_share import take_cpu_share

    take_cpu_share(*welcome["cpu_share"])
    # Only now: kernels start as many threads as this process may use.
    import torch

    from tokenspeed.engine.part import Agreement, build_part
    from tokenspeed.engine.ranks.crew import result_body
    from tokenspeed.engine.ranks.wires import make_communicator
    from tokenspeed.execution.step import Seats, Step
    from tokenspeed.execution.step_message import decode_step, encode_output
    from tokenspeed.models.hub import resolve_model
    from tokenspeed.spmd.shm_ring import RingReader

    def agree(mine: Agreement) -> Agreement:
        connection.send_json(Kind.SIZED, **mine.facts())
        return Agreement(**ears.expect(Kind.PAGES))

    config = EngineConfig.from_json(welcome["config"])
    ring = None
    if welcome["ring"] is not None:
        ring = RingReader(*welcome["ring"])
    communicator = make_communicator(rank, welcome["wires"])
    folder = welcome["folder"]  # None: rank 0 stands on another machine
    torch.set_num_threads(1)  # the kernels have threads of their own
    part = build_part(
        config,
        Path(folder) if folder else resolve_model(config.model.model, config.model.revision),
        rank=rank,
        communicator=communicator,
        agree=agree,
        num_sharers=welcome["num_sharers"],
    )
    seats = Seats(config.scheduler.max_num_seqs)
    connection.send_json(Kind.READY)
    while True:
        message = ring.receive(RING_POLL_S) if ring is not None else ears.heard.get()[1]
        if message is None:
            continue
        plans, binds, grammars = decode_step(message)
        counts = [0 if plan is None else len(plan.tokens) for plan in plans]
        plan = plans[part.dp]
        step = Step(counts)
        if plan is not None:
            mine = binds.get(part.dp, [])
            step = seats.step(counts, plan, mine if part.samples else [])
        if grammars:
            step = replace(step, grammars=grammars)
        output = part.runner.run(step)
        if output is not None:
            connection.send(Kind.RESULT, result_body(part.dp, encode_output(output)))


if __name__ == "__main__":
    leave_with_parent(lambda: os._exit(1))
    line = sys.stdin.readline()
    raise SystemExit(run_worker(**json.loads(line)) if line else 1)  # 1: rank 0 is no more
