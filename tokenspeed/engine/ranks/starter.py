# SPDX-License-Identifier: MIT
"""`Starter`: who brings ranks 1 and up to life. Knows their lives, nothing that they do.

Each launcher is one: this process (`local.py`), torchrun, Ray. A rank that is up comes to the
meeting by itself and from then on lives and dies with its connection.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tokenspeed.config import EngineConfig

if TYPE_CHECKING:  # the gateway reads this file and does without torch
    from tokenspeed.engine.ranks.meeting import Meeting

LOOPBACK = "127.0.0.1"
PARENT_POLL_S = 0.5


class Starter(Protocol):
    """Used in this order; `kill` at any time, also twice."""

    def prepare(self) -> str:
        """Makes room. The address at which rank 0 is to listen for the others."""

    @property
    def machine(self) -> str:
        """This machine's name among the machines of the ranks; after `prepare`."""

    def start(self, meeting: "Meeting") -> None:
        """Ranks 1 and up begin, or learn where to go."""

    def check(self) -> None:
        """`RankDiedError` if one is known to have ended."""

    def wait(self, timeout_s: float) -> None:
        """Until all have ended; ends those that have not in time."""

    def kill(self) -> None:
        """Ends whatever was begun."""


def make_starter(config: EngineConfig, num_ranks: int) -> Starter:
    """As `launcher` says. Begins nothing. `ValueError`: that launcher cannot be used here."""
    match config.parallel.launcher:
        case "torchrun":
            from tokenspeed.engine.ranks.torchrun import TorchrunRanks

            return TorchrunRanks(num_ranks)
        case "ray":
            from tokenspeed.engine.ranks.ray_cluster import RayRanks

            return RayRanks(num_ranks, config.model.device)
    from tokenspeed.engine.ranks.local import LocalRanks

    return LocalRanks(num_ranks)


def machine_name(part: str = "") -> str:
    """This machine's, or of a part of it that has ranks of its own."""
    return f"{socket.gethostname()}/{part}" if part else socket.gethostname()


def leave_with_parent(leave: Callable[[], None]) -> None:
    """Calls `leave`, from another thread, when the process that started this one is no more."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        leave()

    threading.Thread(target=watch, name="parent", daemon=True).start()
