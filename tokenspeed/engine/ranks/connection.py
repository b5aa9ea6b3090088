# SPDX-License-Identifier: MIT
"""`Connection`: whole messages between two ranks over TCP. Knows kinds and bytes, no meaning.

    | kind, 1 byte | length, 8 bytes little-endian | body |

The connection is also the sign of life: when a process ends, however it ends, its peer reads the
end of the stream. A machine that is cut off sends no end; then the system gives up by `SILENCE`.
"""

import contextlib
import json
import socket
import struct
import threading
from enum import IntEnum
from typing import Any

from tokenspeed.errors import RankDiedError

_HEAD = struct.Struct("<BQ")
MAX_BODY = 1 << 31
# Linux's names; where the system lacks one, its own patience holds.
SILENCE = {
    "TCP_KEEPIDLE": 3,  # seconds of silence until the peer's system is asked whether it is there
    "TCP_KEEPINTVL": 1,  # seconds between two such questions
    "TCP_KEEPCNT": 4,  # of them without an answer
    "TCP_USER_TIMEOUT": 7000,  # milliseconds that what was sent may stay unacknowledged
}


class Kind(IntEnum):
    """What a message is. To rank 0: HELLO, SIZED, READY, RESULT, FAILED; from it: the others."""

    HELLO = 1  # JSON: who I am
    WELCOME = 2  # JSON: the configuration, and where ranks meet
    REFUSED = 3  # text: why not
    SIZED = 4  # JSON: pages that fit here
    PAGES = 5  # JSON: pages that fit everywhere
    READY = 6
    STEP = 7  # execution/step_message.py
    RESULT = 8  # dp index, 4 bytes, then a step's output
    FAILED = 9  # text: why I leave
    BYE = 10


class Connection:
    """One end. `send` may be called from several threads, `receive` from one."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer  # for messages
        self._socket = sock
        self._lock = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in SILENCE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @classmethod
    def open(cls, host: str, port: int, timeout_s: float) -> "Connection":
        """To a rank that listens. `RankDiedError`: nobody does."""
        try:
            made = socket.create_connection((host, port), timeout=timeout_s)
        except OSError as error:
            raise RankDiedError(f"rank 0 does not answer at {host}:{port}: {error}") from None
        made.settimeout(None)
        return cls(made, "rank 0")

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """`RankDiedError`: the peer is gone."""
        try:
            with self._lock:
                self._socket.sendall(_HEAD.pack(kind, len(body)) + body)
        except OSError as error:
            raise RankDiedError(f"{self.peer} is gone: {error}") from None

    def send_json(self, kind: Kind, **facts: Any) -> None:
        self.send(kind, json.dumps(facts).encode())

    def receive(
        self, timeout_s: float | None = None, max_body: int = MAX_BODY
    ) -> tuple[Kind, bytes]:
        """The next message. `RankDiedError`: the peer ended, or said nothing for `timeout_s`."""
        self._socket.settimeout(timeout_s)
        try:
            kind, length = _HEAD.unpack(self._exactly(_HEAD.size))
            if kind not in Kind.__members__.values() or length > max_body:
                raise RankDiedError(f"{self.peer} does not speak this protocol")
            return Kind(kind), self._exactly(length)
        except TimeoutError as error:
            if timeout_s is None or error.errno is not None:  # the system gave up (see SILENCE)
                raise RankDiedError(f"{self.peer} cannot be reached any more: {error}") from None
            raise RankDiedError(f"{self.peer} said nothing for {timeout_s:g} s") from None
        except OSError as error:
            raise RankDiedError(f"{self.peer} is gone: {error}") from None

    def _exactly(self, length: int) -> bytes:
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        while done < length:
            count = self._socket.recv_into(view[done:])
            if count == 0:
                raise RankDiedError(f"{self.peer} ended")
            done += count
        return bytes(buffer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def facts_of(body: bytes) -> dict[str, Any]:
    """A JSON body. `RankDiedError` if it is none: the peer cannot be understood."""
    facts = None
    with contextlib.suppress(ValueError, RecursionError):
        facts = json.loads(body)
    if not isinstance(facts, dict):
        raise RankDiedError("a rank sent a message that is no JSON object")
    return facts
