# SPDX-License-Identifier: MIT
"""`Running`: a response that is answered whether its client stays or not. Knows no requests.

Its events are kept as they come, so that any number of readers can follow from any of them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from tokenspeed.gateway.responses_output import Output

KEEP_ALIVE = b": keep-alive\n\n"


class Running:
    """`work` adds the events; `ended` is called once it is over, however it went.

    `given` is its input, as it is listed; with `streams` its events may be asked for.
    """

    def __init__(self, output: Output, given: list[dict[str, Any]], *, streams: bool) -> None:
        self.output, self.given, self.streams = output, given, streams
        self.events: list[bytes] = []
        self._over = False
        self._news = asyncio.Event()

    def start(self, work: Coroutine[Any, Any, None], ended: Callable[[], None]) -> None:
        """Begins to work, on its own."""

        def over(task: "asyncio.Task[None]") -> None:
            self._over = True
            ended()
            self.add([])

        self._task = asyncio.create_task(work)
        self._task.add_done_callback(over)

    def add(self, events: list[bytes]) -> None:
        """Events; none are a sign of life."""
        self.events += events
        self._news.set()
        self._news = asyncio.Event()

    def cancel(self) -> None:
        """Ends it; `wait` tells when it has ended."""
        self._task.cancel()

    async def wait(self) -> None:
        """Until it is over."""
        await asyncio.wait({self._task})

    async def follow(self, first: int) -> AsyncIterator[bytes]:
        """The events from number `first` on, as they come."""
        while True:
            news = self._news
            if first < len(self.events):
                yield b"".join(self.events[first:])
                first = len(self.events)
            elif self._over:
                return
            else:
                await news.wait()
                if first >= len(self.events) and not self._over:
                    yield KEEP_ALIVE
