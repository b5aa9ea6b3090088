# SPDX-License-Identifier: MIT
"""Times backends beside each other on the sizes that a layer asks for. Knows ops by their cases.

Backends run in turn, so that a busy machine slows all of them; what counts is the first quintile.
Weights and caches rotate through more memory than the processor's caches hold, as in a whole model.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from tokenspeed.kernels.backend import Ask, Backend
from tokenspeed.kernels.cases.case import Arguments, Inputs, OpCases, Work, moved
from tokenspeed.kernels.cases.check import packed
from tokenspeed.kernels.quant import QuantWeight

COLD_BYTES = 128 << 20  # that calls rotate through
MOST_BYTES = 512 << 20  # of all copies
MOST_COPIES = 32
LARGE_BYTES = 1 << 16  # tensors above this are copied, smaller ones stay where they are
FEWEST_RUNS = 4

Run = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call by backend, and what a call must move and compute."""

    ask: Ask
    tokens: int
    us: Mapping[str, float]
    work: Work | None

    def rate(self, backend: str) -> tuple[float, float]:
        """(GB/s, GFLOP/s) of a backend; zeros where the work is not known."""
        if self.work is None:
            return 0.0, 0.0
        return self.work.bytes / self.us[backend] / 1e3, self.work.flops / self.us[backend] / 1e3


def measure(
    cases: OpCases,
    ask: Ask,
    tokens: int,
    backends: Sequence[Backend],
    *,
    seconds: float = 0.3,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Times each backend for about `seconds` divided among them. `ValueError`: nothing to build."""
    if cases.sized is None:
        raise ValueError(f"op {ask.op}: its cases say nothing of sizes, it cannot be measured")
    plain = cases.sized(Inputs(ask.dtype), tokens, ask.shapes)
    plain = tuple(moved(argument, torch.device(ask.device)) for argument in plain)
    work = None if cases.work is None else cases.work(plain)
    touched = math.inf if work is None else work.bytes
    runs = {b.name: _runs(cases, b, plain, touched) for b in backends}
    times: dict[str, list[float]] = {name: [] for name in runs}
    timed = _cuda_time if ask.device == "cuda" else _host_time
    order, turn = list(runs), 0
    end = time.perf_counter() + seconds
    with torch.no_grad():
        while turn < FEWEST_RUNS or time.perf_counter() < end:
            for name in order if turn % 2 else reversed(order):
                each = runs[name]
                times[name].append(timed(each[turn % len(each)], clock))
            turn += 1
    return Timing(ask, tokens, {name: _first_quintile(t) for name, t in times.items()}, work)


def _runs(cases: OpCases, backend: Backend, arguments: Arguments, touched: float) -> list[Run]:
    """The call with copies of its large tensors: what calls touch of them fills `COLD_BYTES`."""
    size = sum(_large(argument) for argument in arguments)
    cold = int(COLD_BYTES / max(min(size, touched), 1)) if size else 1
    count = max(1, min(MOST_COPIES, cold, MOST_BYTES // max(size, 1)))
    lists = [arguments, *(tuple(map(_copy, arguments)) for _ in range(count - 1))]
    return [partial(backend.kernel, *packed(cases, backend.pack, each)) for each in lists]


def _large(argument: Any) -> int:
    """Bytes that are worth a copy."""
    if isinstance(argument, QuantWeight):
        return argument.codes.nbytes + argument.scales.nbytes
    if not isinstance(argument, Tensor):
        return 0
    size = argument.numel() * argument.element_size()
    return size if size >= LARGE_BYTES and argument.is_contiguous() else 0


def _copy(argument: Any) -> Any:
    if isinstance(argument, QuantWeight):
        return replace(argument, codes=argument.codes.clone(), scales=argument.scales.clone())
    return argument.clone() if _large(argument) else argument


def _host_time(run: Run, clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def _cuda_time(run: Run, clock: Clock) -> float:
    """On the device; its own clock."""
    event = cast(Any, torch.cuda.Event)
    start, stop = event(enable_timing=True), event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _first_quintile(times: Sequence[float]) -> float:
    """In microseconds; the first run warms up."""
    kept = sorted(times[1:])
    return kept[len(kept) // 5] * 1e6
