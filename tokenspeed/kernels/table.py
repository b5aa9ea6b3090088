# SPDX-License-Identifier: MIT
"""Measured times of backends, and the choice that they decide. Knows names and times, no kernel.

A time holds for an op, a dtype, the fixed sizes that a layer gives, a bucket of tokens, and one
machine (`kernels/device.py`). Buckets are powers of two; n tokens fall into the smallest measured
one that holds them, or into the largest.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CLOSE = 1.05  # a backend that is faster by less than this does not displace the preferred one

Times = Mapping[int, Mapping[str, float]]  # bucket of tokens -> backend -> microseconds


class Tables:
    """The tables of the machines that are asked about."""

    def times(self, ask: Any) -> Times:
        return {}


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
    """`ranges`: (first number of tokens, backend); empty if there is none."""

    ranges: tuple[tuple[int, str], ...]
    times: Times = field(default_factory=dict)

    def backends(self) -> set[str]:
        return {name for _, name in self.ranges}

    def reasons(self, able: Sequence[str]) -> dict[str, str]:
        """Why each backend that could serve does, or does not."""
        return {name: self._reason(name) for name in able}

    def _reason(self, name: str) -> str:
        if name not in self.backends():
            return f"{self.ranges[0][1]} comes first"
        return "serves the ask"


def pick(layouts: Mapping[str, object], times: Times) -> Pick:
    """The choice among backends that can serve, the preferred first, each with its layout."""
    if not layouts:
        return Pick(())
    first = next(iter(layouts))
    return Pick(((0, first),), times)
