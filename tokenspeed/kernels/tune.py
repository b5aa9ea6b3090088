# SPDX-License-Identifier: MIT
"""Measures the backends that could serve what layers ask for, and makes a table of their times.

Knows asks, no model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile

import torch

from tokenspeed.kernels.backend import Ask
from tokenspeed.kernels.cases.catalog import all_cases
from tokenspeed.kernels.device import Machine
from tokenspeed.kernels.registry import REFERENCE, REGISTRY
from tokenspeed.kernels.table_files import TableFile, key_of
from tokenspeed.kernels.timing import Timing, measure

BUCKETS = (1, 8, 64, 512)  # tokens of one call


def example_asks(device: str, ops: Sequence[str] = ()) -> Iterator[Ask]:
    """The sizes of real models that the cases name, in the dtype that models run in."""
    for op, cases in sorted(all_cases().items()):
        if (ops and op not in ops) or op not in REGISTRY.ops or cases.sized is None:
            continue
        dtypes = tuple(cases.tolerance)
        dtype = torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0]
        for shapes in cases.examples:
            yield Ask(op, device, dtype, shapes)


def time_asks(
    asks: Iterable[Ask],
    buckets: Sequence[int],
    seconds: float,
    backends: Sequence[str] = (),
    *,
    rivals: bool = False,
) -> Iterator[Timing]:
    """Every ask in every bucket, on the backends named that serve it (none named: on all).

    `rivals`: only on those that come before the reference.
    """
    for ask in asks:
        able = [b for b in REGISTRY.of(ask.op) if b.refusal(ask) is None]
        if rivals:
            able = list(takewhile(lambda b: b.name != REFERENCE, able))
        able = [b for b in able if not backends or b.name in backends]
        cases = all_cases().get(ask.op)
        if not able or cases is None or cases.sized is None:
            continue
        for tokens in buckets:
            yield measure(cases, ask, tokens, able, seconds=seconds)


def tune(
    asks: Iterable[Ask],
    machine: Machine,
    *,
    buckets: Sequence[int] = BUCKETS,
    seconds: float = 0.3,
    tell: Callable[[Timing], None] = lambda timing: None,
) -> TableFile:
    """The table of these asks on this machine. The reference competes with nobody: no times."""
    table = TableFile(machine)
    for timing in time_asks(asks, buckets, seconds, rivals=True):
        tell(timing)
        ask = timing.ask
        times = {name: round(us, 2) for name, us in timing.us.items()}
        table.rows.setdefault(key_of(ask.op, ask.dtype, ask.shapes), {})[timing.tokens] = times
    return table
