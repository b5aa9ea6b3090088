# SPDX-License-Identifier: MIT
"""The process of a further gateway: `python -m tokenspeed.gateway.further N`, by the first alone.

Serves like the first one, on the same socket and before the same engines, but keeps no process but
its text's. It does what the first says (see `family.py`) and ignores signals, which may reach a
whole group: SIGTERM means that the first drains. Without the first it leaves.
"""

import os
import signal
import socket
import sys

import msgspec
import uvloop

from tokenspeed.gateway.family import Hello, Stops
from tokenspeed.gateway.serving import Parts, prepare, run


def main() -> int:
    """Returns the exit status."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    with os.fdopen(0, "rb", buffering=0, closefd=False) as unbuffered:  # words may follow
        hello = msgspec.json.decode(unbuffered.readline(), type=Hello)
    parts = prepare(hello.config, hello.options, hello.secret)
    try:
        return uvloop.run(_run(hello, parts))
    finally:
        parts.close()


async def _run(hello: Hello, parts: Parts) -> int:
    public = [socket.socket(fileno=hello.public)]
    return await run(hello.config, hello.options, parts, public, Stops(), further=hello)


if __name__ == "__main__":
    sys.exit(main())
