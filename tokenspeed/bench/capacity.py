# SPDX-License-Identifier: MIT
"""The most streams at once that hold a floor, found by doubling and then halving.

Knows neither load nor floor: a trial says whether so many streams were held.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Outcome(Protocol):
    """What a trial brings."""

    @property
    def held(self) -> bool: ...


T = TypeVar("T", bound=Outcome)


@dataclass(frozen=True)
class Capacity(Generic[T]):
    """`streams` were held; 0: not even one. `capped`: as many as were allowed, maybe more."""

    streams: int
    capped: bool
    trials: tuple[tuple[int, T], ...]  # in the order in which they were run


async def find_capacity(
    trial: Callable[[int], Awaitable[T]], *, start: int = 1, most: int = 1024
) -> Capacity[T]:
    """At most `2 * log2(most) + 1` trials. Takes it that more streams are never held better.

    Raises ValueError unless 1 <= start <= most.
    """
    if not 1 <= start <= most:
        raise ValueError(f"start must be from 1 to {most}, not {start}")
    trials: list[tuple[int, T]] = []

    async def holds(streams: int) -> bool:
        outcome = await trial(streams)
        trials.append((streams, outcome))
        return outcome.held

    good, bad, tried = 0, most + 1, start
    while good + 1 < bad:
        if await holds(tried):
            good = tried
        else:
            bad = tried
        doubled = min(2 * tried, most)
        tried = doubled if bad > most else (good + bad) // 2
    return Capacity(good, good == most, tuple(trials))
