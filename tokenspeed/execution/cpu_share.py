# SPDX-License-Identifier: MIT
"""`take_cpu_share`: engines and ranks that share a machine keep off each other's cores.

Knows cores and affinity masks, nothing of who the processes are. A thread pool that starts later
sees the smaller mask and starts as many threads as it has cores. Children inherit the mask: a
process that starts others, which take shares of the same whole, starts them before it takes its
own.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def take_cpu_share(index: int, count: int) -> frozenset[int]:
    """Binds this process to the `index`-th of `count` shares of its CPUs; returns the CPUs it has.

    A share is whole cores, neighbours. With more processes than cores, or where the system binds no
    process, nothing changes: all share all. Call it before torch is imported or a kernel runs.
    `ValueError` unless 0 <= index < count.
    """
    if not hasattr(os, "sched_setaffinity"):
        _check(index, count)
        return frozenset(range(os.cpu_count() or 1))
    share = cpu_share(cores_of(os.sched_getaffinity(0)), index, count)
    os.sched_setaffinity(0, share)
    return share


def allowed_cpus() -> frozenset[int]:
    """The CPUs that this thread may use; none where the system binds nobody."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def allow_cpus(cpus: frozenset[int]) -> None:
    """Undoes a share for this thread and those that it starts: `cpus` are what it had before."""
    if cpus:
        os.sched_setaffinity(0, cpus)


def cpu_share(cores: Sequence[frozenset[int]], index: int, count: int) -> frozenset[int]:
    """CPUs of the `index`-th of `count` even runs of `cores`; all if there are fewer cores."""
    _check(index, count)
    if count > len(cores):
        return frozenset().union(*cores)
    begin, end = (len(cores) * i // count for i in (index, index + 1))
    return frozenset().union(*cores[begin:end])


def cores_of(cpus: Iterable[int]) -> list[frozenset[int]]:
    """The allowed CPUs by core, in order of their lowest CPU."""
    by_core: dict[str, set[int]] = {}
    for cpu in sorted(cpus):
        try:
            core = Path(_TOPOLOGY.format(cpu)).read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        by_core.setdefault(core, set()).add(cpu)
    return [frozenset(core) for core in by_core.values()]


def _check(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(f"share {index} of {count}: the index must be in [0, {count})")
