# SPDX-License-Identifier: MIT
"""Processes that are ranks, and whether anything is left of them."""

import os
import time
from pathlib import Path

import psutil

MEMORY = Path("/dev/shm")


def workers_of(pid: int) -> list[psutil.Process]:
    """The ranks that a process started, in the order of their start."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "tokenspeed.engine.ranks.worker" in child.cmdline():
                found.append(child)
        except psutil.Error:  # it ended meanwhile
            continue
    return sorted(found, key=lambda p: p.pid)


def names_of(pid: int) -> list[str]:
    """What this process, as rank 0, has left in shared memory."""
    return [path.name for path in MEMORY.glob(f"tokenspeed-{pid}-*")]


def assert_gone(family: list[psutil.Process], rank_0: int, within_s: float = 10.0) -> None:
    """All processes have ended, and no name in shared memory is left; kills those that have not."""
    end = time.monotonic() + within_s
    _, alive = psutil.wait_procs(family, timeout=within_s)
    for process in alive:
        process.kill()
    while names_of(rank_0) and time.monotonic() < end:
        time.sleep(0.02)
    assert alive == []
    assert names_of(rank_0) == []


def assert_no_workers_here(within_s: float = 10.0) -> None:
    """This very process has no ranks any more."""
    assert_gone(workers_of(os.getpid()), os.getpid(), within_s)
