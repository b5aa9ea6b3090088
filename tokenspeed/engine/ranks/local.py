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
from typing import TYPE_CHECKING, Any

from tokenspeed.engine.ranks.starter import LOOPBACK, machine_name
from tokenspeed.errors import RankDiedError

if TYPE_CHECKING:  # what Ray runs reads this file and does without torch
    from tokenspeed.engine.ranks.meeting import Meeting

COMMAND = (sys.executable, "-m", "tokenspeed.engine.ranks.worker")


class LocalRanks:
    """Ranks 1 to num_ranks - 1 on this machine."""

    machine = machine_name()

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def prepare(self) -> str:
        return LOOPBACK

    def start(self, meeting: "Meeting") -> None:
        for rank in range(1, self._num_ranks):
            self._children[rank] = start_worker(
                host=meeting.host, port=meeting.port, token=meeting.token, rank=rank
            )

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


def start_worker(**settings: Any) -> subprocess.Popen[bytes]:
    """A child of this process that is a rank; `settings` are the arguments of `run_worker`."""
    child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE)
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError), child.stdin:  # its status will say why
            child.stdin.write(json.dumps(settings).encode() + b"\n")
    return child
