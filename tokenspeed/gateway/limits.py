# SPDX-License-Identifier: MIT
"""`Limiter`: how much one tenant may ask for. Knows a clock and counts, no keys and no requests.

Rates are token buckets that hold one minute's worth; over them the answer is 429 with Retry-After.
What an answer costs is known only when it is there, so tokens are charged afterwards: a bucket may
go into debt, and nothing further is taken until the debt is paid. Requests over the concurrency
limit wait their turn for a while, because some agents give up at a 429.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tokenspeed.gateway.api_error import ApiError

PATIENCE_S = 30.0  # that a request waits for others of its tenant to finish
MAX_WAITING = 256  # requests of one tenant that wait at once


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no limit. Tokens are prompt tokens that no cache held, and output tokens."""

    max_concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Bucket:
    """A token bucket of `per_minute`, full at first. The level may be below zero."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level, self._at = float(per_minute), now

    def wait_s(self, needed: float, now: float) -> float:
        """Seconds until the level is at least `needed`; 0 if it is."""
        self._refill(now)
        return max(0.0, (needed - self._level) * 60.0 / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        self._refill(now)
        self._level -= amount

    def _refill(self, now: float) -> None:
        gained = (now - self._at) * self.per_minute / 60.0
        self._level, self._at = min(self._level + gained, float(self.per_minute)), now


class Limiter:
    """One tenant's state. It outlives a change of its limits: running requests stay counted."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._clock, self._patience_s = clock, patience_s
        self.num_running = 0
        self._turns: deque[asyncio.Future[None]] = deque()
        self.set(limits)

    @property
    def num_waiting(self) -> int:
        return len(self._turns)

    def set(self, limits: Limits) -> None:
        """Other limits from now on; buckets whose rate has not changed keep their level."""
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        self._requests = self._bucket(getattr(self, "_requests", None), requests)
        self._tokens = self._bucket(getattr(self, "_tokens", None), tokens)
        self.limits = limits
        self._hand_over()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Room for one request. Raises 429 if a rate is used up or none comes in time."""
        self._check_rates()
        await self._wait()
        try:
            yield
        finally:
            self.num_running -= 1
            self._hand_over()

    def charge(self, num_tokens: int) -> None:
        """What a request has cost in the end."""
        if self._tokens is not None:
            self._tokens.take(num_tokens, self._clock())

    def _bucket(self, old: Bucket | None, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        kept = old is not None and old.per_minute == per_minute
        return old if kept else Bucket(per_minute, self._clock())

    def _check_rates(self) -> None:
        now = self._clock()
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket is not None and (wait_s := bucket.wait_s(1.0, now)) > 0:
                raise _refusal(f"at most {bucket.per_minute} {what} per minute", wait_s)
        if self._requests is not None:
            self._requests.take(1.0, now)

    @property
    def _has_room(self) -> bool:
        most = self.limits.max_concurrency
        return most is None or self.num_running < most

    async def _wait(self) -> None:
        """Returns with this request counted as running."""
        if self._has_room and not self._turns:
            self.num_running += 1
            return
        what = f"at most {self.limits.max_concurrency} requests at once"
        if len(self._turns) >= MAX_WAITING:
            raise _refusal(what, 1.0)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            async with asyncio.timeout(self._patience_s):
                await turn
        except BaseException as error:
            self._leave(turn)
            if isinstance(error, TimeoutError):
                raise _refusal(what, 1.0) from None
            raise

    def _leave(self, turn: "asyncio.Future[None]") -> None:
        """Gives up a place in the queue, or the room that came in the same moment."""
        if turn.done() and not turn.cancelled():
            self.num_running -= 1
            self._hand_over()
        elif turn in self._turns:
            self._turns.remove(turn)

    def _hand_over(self) -> None:
        while self._turns and self._has_room:
            turn = self._turns.popleft()
            if not turn.done():
                self.num_running += 1
                turn.set_result(None)


def _refusal(what: str, wait_s: float) -> ApiError:
    """429. The words are those in which clients look for how long to wait."""
    seconds = max(1, math.ceil(wait_s))
    return ApiError(
        429,
        f"Rate limit reached: {what}. Please try again in {seconds}s.",
        code="rate_limit_exceeded",
        headers={"retry-after": str(seconds)},
    )
