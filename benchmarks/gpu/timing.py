# SPDX-License-Identifier: MIT
"""Times of work on a GPU: with a cold cache, and as one of many calls of a captured graph.

Both are replays of graphs, so that the host's launches cost nothing. Cold: a graph that overwrites
a buffer four times the L2 cache's size and then calls, less one that only overwrites. Warm: a graph
of several calls on operands that rotate, divided by their number. Knows no kernel.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu.shapes import Roofs

FLUSH_BYTES = 256 << 20
REPEATS = 30


def capture(work: Callable[[], object]) -> Any:
    """A graph of the work, warmed up first."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replay_s(graph: Any, repeats: int = REPEATS) -> float:
    """The median time of a replay, in seconds."""
    times = []
    for _ in range(repeats):
        event: Any = torch.cuda.Event
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(times)


def cold_s(work: Callable[[], object]) -> float:
    """One call's time when nothing of its operands is in the cache."""
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def flushed() -> None:
        buffer.fill_(1)
        work()

    both, flush = capture(flushed), capture(lambda: buffer.fill_(1))
    return max(replay_s(both) - replay_s(flush), 0.0)


def rotating_s(works: list[Callable[[], object]]) -> float:
    """A call's share of a graph that makes all of them in turn."""

    def all_of_them() -> None:
        for work in works:
            work()

    return replay_s(capture(all_of_them)) / len(works)


def stream_rate(size: int = 4 << 30) -> float:
    """Bytes per second: the better of a read and of a copy, read and written counted."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    read = replay_s(capture(source.view(torch.int32).amax))
    copied = replay_s(capture(partial(target.copy_, source)))
    return max(size / read, 2 * size / copied)


def matrix_rate(size: int = 8192) -> float:
    """Operations per second of a bfloat16 product, on random numbers."""
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    return 2.0 * size**3 / replay_s(capture(partial(torch.matmul, a, b)))


def measure_roofs() -> Roofs:
    """What this device does at most."""
    return Roofs(stream_rate(), matrix_rate())
