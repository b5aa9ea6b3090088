# SPDX-License-Identifier: MIT
"""Measured times of backends, and the choice that they decide. Knows names and times, no kernel.

A time holds for an op, a dtype, the fixed sizes that a layer gives, a bucket of tokens, and one
machine (`kernels/device.py`). n tokens fall into the smallest measured bucket that holds them, or
into the largest.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import log
from typing import Any

REFERENCE = "reference"
CLOSE = 1.05  # a backend that is faster by less than this does not displace a preferred one

Times = Mapping[int, Mapping[str, float]]  # bucket of tokens -> backend -> microseconds


class Dispatcher:
    """A kernel that hands each call to the fastest backend for its number of tokens.

    All of its kernels take weights in the same layout.
    """

    def __init__(
        self, kernels: Sequence[tuple[int, Callable[..., Any]]], pack: Callable[[Any], Any] | None
    ) -> None:
        self.pack = pack
        self._first = [first for first, _ in kernels[1:]]  # tokens from which the next one serves
        self._kernels = [kernel for _, kernel in kernels]

    def __call__(self, x: Any, *rest: Any, **named: Any) -> Any:
        return self._kernels[bisect_right(self._first, x.shape[0])](x, *rest, **named)


@dataclass(frozen=True)
class Pick:
    """`ranges`: (first number of tokens, backend), none if nobody serves. `note`: what decided."""

    ranges: tuple[tuple[int, str], ...]
    note: str = "serves the ask"
    times: Times = field(default_factory=dict)

    def backends(self) -> set[str]:
        return {name for _, name in self.ranges}

    def reason(self, name: str) -> str:
        """Why a backend that could serve does, or does not."""
        if name in self.backends():
            return self.note + self._range(name)
        behind = self._behind(name)
        return behind or f"{self.ranges[0][1]} comes first"

    def _range(self, name: str) -> str:
        if len(self.ranges) == 1:
            return ""
        ends = [first - 1 for first, _ in self.ranges[1:]]
        spans = zip(self.ranges, [*ends, None], strict=True)
        own = [f"{a} to {b}" if b is not None else f"{a} up" for (a, n), b in spans if n == name]
        return f", for {' and '.join(own)} tokens"

    def _behind(self, name: str) -> str:
        """The bucket in which it lies furthest behind the winner, if it was measured."""
        ratios = {
            bucket: (of[name] / min(of[n] for n in self.backends()), bucket)
            for bucket, of in self.times.items()
            if name in of and self.backends() <= of.keys()
        }
        if not ratios:
            return ""
        ratio, bucket = max(ratios.values())
        if ratio < 1:
            return ""  # it does not compete
        return f"{ratio:.2f} times the time of {self.ranges[0][1]} at {bucket} tokens"


def pick(layouts: Mapping[str, object], times: Times, *, by_tokens: bool = True) -> Pick:
    """The choice among backends that can serve, the preferred first, each with its weight layout.

    Times decide where every one of them was measured, among backends of the same layout also by the
    number of tokens. The reference is the law, no competitor: it serves where nothing that comes
    before it can.
    """
    rivals = list(takewhile(lambda name: name != REFERENCE, layouts)) or list(layouts)[:1]
    if not rivals:
        return Pick(())
    measured = [{n: of[n] for n in rivals if n in of} for _, of in sorted(times.items())]
    if len(rivals) == 1 or not times:
        return Pick(((0, rivals[0]),), times=times)
    missing = [n for n in rivals if any(n not in of for of in measured)]
    if missing:
        note = f"serves the ask; the table has no time of {', '.join(missing)}"
        return Pick(((0, rivals[0]),), note, times)
    group = _fastest_layout(rivals, layouts, measured)
    if by_tokens:
        winners = [_winner(group, of) for of in measured]
    else:
        whole = {n: sum(log(of[n]) for of in measured) for n in group}
        winners = [min(group, key=lambda n: whole[n])] * len(measured)
    firsts = [0, *(bucket + 1 for bucket in sorted(times)[:-1])]
    ranges: list[tuple[int, str]] = []
    for first, name in zip(firsts, winners, strict=True):
        if not ranges or ranges[-1][1] != name:
            ranges.append((first, name))
    return Pick(tuple(ranges), "fastest as measured", times)


def _fastest_layout(
    rivals: Sequence[str], layouts: Mapping[str, object], measured: Sequence[Mapping[str, float]]
) -> list[str]:
    """The backends of the layout whose best ones take the least time, buckets weighed equally."""
    groups = [[n for n in rivals if layouts[n] is layouts[first]] for first in rivals]

    def cost(group: Sequence[str]) -> float:
        return sum(log(min(of[n] for n in group)) for of in measured) / len(measured)

    best = groups[0]
    for group in groups[1:]:
        if cost(group) < cost(best) - log(CLOSE):
            best = group
    return best


def _winner(group: Sequence[str], of: Mapping[str, float]) -> str:
    best = group[0]
    for name in group[1:]:
        if of[name] * CLOSE < of[best]:
            best = name
    return best
