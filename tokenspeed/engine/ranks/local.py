# SPDX-License-Identifier: MIT
"""`LocalRanks`: rank 0 starts the others as its children. Knows processes, no tensors.

A child learns where to go on its standard input, so that the token stands in no command line. It
ends when rank 0 does, because its connection does.
"""

import contextlib
import json
import subprocess
import sys
import time

from tokenspeed.engine.ranks.meeting import Meeting
from tokenspeed.engine.ranks.starter import LOOPBACK, machine_name
from tokenspeed.errors import RankDiedError

COMMAND = (sys.executable, "-m", "tokenspeed.engine.ranks.worker")


class LocalRanks:
    """Ranks 1 to num_ranks - 1 on this machine."""

    machine = machine_name()

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def prepare(self) -> str:
        return LOOPBACK

    def start(self, meeting: Meeting) -> None:
        for rank in range(1, self._num_ranks):
            child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE)
            self._children[rank] = child
            settings = {
                "host": meeting.host,
                "port": meeting.port,
                "token": meeting.token,
                "rank": rank,
            }
            if child.stdin is not None:
                # One that has ended already is found by `check`.
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(json.dumps(settings).encode() + b"\n")

    def check(self) -> None:
        """`RankDiedError` if one has ended."""
        for rank, child in self._children.items():
            status = child.poll()
            if status is not None:
                raise RankDiedError(f"rank {rank} (pid {child.pid}) ended with status {status}")

    def wait(self, timeout_s: float) -> None:
        """Until all have ended; kills those that have not in time."""
        end = time.monotonic() + timeout_s
        for child in self._children.values():
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def kill(self) -> None:
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            child.wait()
