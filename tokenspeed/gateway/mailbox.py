# SPDX-License-Identifier: MIT
"""`Mailbox`: where the outputs of one HTTP request arrive. Knows no socket and no text.

It also keeps the time: of silence, after which the client gets a sign of life, and of a client that
does not read, which is dropped.
"""

import asyncio
from typing import Protocol

from tokenspeed.engine.messages import TokenOutput

TICK_S = 0.25
STALL_S = 60.0  # a client that takes nothing for so long is dropped
MAX_UNREAD = 16384  # outputs that may wait for one slow client


class Home(Protocol):
    """Who answers a request: one engine's client."""

    def abort(self, request_id: int) -> None:
        """Ends a request that is no longer wanted. Finished and unknown ones are ignored."""
        ...

    def stop_early(self, request_id: int) -> None:
        """Ends a request that is complete for its client, but not for the engine."""
        ...


class Mailbox:
    """What has arrived as (choice index, output), in order, and which engines it comes from."""

    def __init__(self) -> None:
        self.task = asyncio.current_task()
        self.sending = 0  # counts up before and after each write; odd while the client is slow
        self.idle_s = 0.0
        self.stalled_s = 0.0
        self._seen_sending = 0
        self._homes: dict[int, Home] = {}
        self._items: list[tuple[int, TokenOutput]] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def expect(self, request_id: int, home: Home) -> None:
        """From now on `home` answers `request_id` here."""
        self._homes[request_id] = home

    def stop_early(self, request_id: int) -> None:
        """Nothing more is wanted of a request that is complete for its client."""
        self._homes[request_id].stop_early(request_id)

    def abort(self) -> None:
        """Nothing more is wanted of any request. Finished ones are not touched."""
        for request_id, home in self._homes.items():
            home.abort(request_id)

    def put(self, index: int, output: TokenOutput) -> None:
        self._items.append((index, output))
        self.wake()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[tuple[int, TokenOutput]]:
        """All that has arrived, at least one output; or nothing when it is time for a sign of life.

        Raises what the engine answered instead: `RequestError`, `EngineDeadError`.
        """
        if not self._items:
            if self._failure is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
                self._waiter = None
            if self._failure is not None and not self._items:
                raise self._failure
        self.idle_s = 0.0
        items, self._items = self._items, []
        return items

    def tick(self, keepalive_s: float) -> bool:
        """Called at every tick; False once the client has taken nothing for too long."""
        self.idle_s += TICK_S
        if self.idle_s >= keepalive_s and self._waiter is not None:
            self.idle_s = 0.0
            self.wake()
        moved = self.sending != self._seen_sending or self.sending % 2 == 0
        self.stalled_s = 0.0 if moved else self.stalled_s + TICK_S
        self._seen_sending = self.sending
        return self.stalled_s < STALL_S and len(self._items) < MAX_UNREAD
