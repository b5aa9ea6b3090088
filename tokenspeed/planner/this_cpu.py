# SPDX-License-Identifier: MIT
"""This machine as a device of the planner, measured in about a second. Knows no models.

Ranks are processes that divide the cores and the memory between them.
"""

import time
from collections.abc import Callable

import torch

from tokenspeed.planner.devices import Device
from tokenspeed.spmd.cost import Interconnect

COPY_BYTES = 128 << 20  # well beyond the caches
MATRIX = 1024
REPEATS = 3


def measure(count: int = 1) -> Device:
    """This machine divided by `count`: what a copy and a matrix product reach right now."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    bandwidth = 2 * COPY_BYTES / _best_s(lambda: target.copy_(source))
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return Device(
        name="this CPU" if count == 1 else f"1/{count} of this CPU",
        memory_bytes=_available_bytes() / count,
        bandwidth=bandwidth / count,
        peaks={name: _flops_per_s(dtype) / count for name, dtype in kinds.items()},
        link_bandwidth=bandwidth / 4 / count,  # written by one process and read by another
        link_latency_s=20e-6,
        network=Interconnect(50e-6, 1e9),
        bandwidth_share=1.0,
        compute_share=1.0,
        link_share=1.0,
        launch_s=4e-6,  # a call through Python; from decoding with the demo model
        node_size=count,
        runtime_bytes=0.5 * 2**30,
        source="measured; links and call times are estimates",
    )


def _flops_per_s(dtype: torch.dtype) -> float:
    a = torch.ones(MATRIX, MATRIX, dtype=dtype)
    return 2.0 * MATRIX**3 / _best_s(lambda: a @ a)


def _best_s(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvail"))
