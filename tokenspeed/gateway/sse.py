# SPDX-License-Identifier: MIT
"""Server-sent events: a `Generation` to a stream of bytes. Knows framing, not what events say.

One write for each wake-up, whatever arrived in between. The answer begins with the first token (or
the first sign of life), so that an error before it is still an HTTP status.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from tokenspeed.gateway.api_error import of_exception
from tokenspeed.gateway.app import Call
from tokenspeed.gateway.generation import Choice, Generation

DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

encode_json: Callable[[object], bytes] = msgspec.json.Encoder().encode


class Dialect(Protocol):
    """What the events of one endpoint look like."""

    def chunk(self, choice: Choice) -> bytes:
        """The events for what `choice` has gained; the caller clears it afterwards."""
        ...

    def closing(self) -> bytes:
        """The events after the last chunk, before `[DONE]`."""
        ...


async def stream(call: Call, generation: Generation, dialect: Dialect) -> None:
    """Streams until every choice is finished. An error after the first byte is an event."""
    try:
        while generation.num_running:
            changed = await generation.next()
            parts = [dialect.chunk(choice) for choice in changed]
            for choice in changed:
                choice.clear()
            if not generation.num_running:
                parts += (dialect.closing(), DONE)
            await _write(call, generation, b"".join(parts) if changed else b": keep-alive\n\n")
    except Exception as error:
        if not call.started:
            raise
        await _write(call, generation, b"data: " + of_exception(error).body() + b"\n\n" + DONE)
    await call.send({"type": "http.response.body", "body": b""})


async def _write(call: Call, generation: Generation, data: bytes) -> None:
    if not data:
        return  # all of it is held back, for instance as the possible start of a stop string
    if not call.started:
        await call.start(200, "text/event-stream; charset=utf-8", _HEADERS)
    box = generation.mailbox
    box.sending += 1
    await call.send({"type": "http.response.body", "body": data, "more_body": True})
    box.sending += 1
