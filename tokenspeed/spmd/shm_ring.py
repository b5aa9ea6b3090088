# SPDX-License-Identifier: MIT
"""A broadcast of messages inside one machine: one writer, some readers, in shared memory (Linux).

Knows bytes only. Who waits spins for at most 50 us and then sleeps; a peer that died is found
within a fraction of a second. csrc/shm/ring.h and channel.h say how it works.
"""

from tokenspeed import _shm

CAPACITY = 1 << 20  # bytes in flight; a larger message passes through in pieces


class RingWriter:
    """Makes the ring `name`, which nobody else may use at the time.

    `timeout_s`: how long `connect` waits for readers, and `send` for one that takes nothing.
    """

    def __init__(
        self, name: str, num_readers: int, timeout_s: float = 300.0, capacity: int = CAPACITY
    ) -> None:
        self._ring = _shm.Ring.write(name, num_readers, capacity, timeout_s)

    def connect(self) -> None:
        """Waits for all readers; the name is gone then. `RankDiedError`: one did not come."""
        self._ring.connect()

    def send(self, message: bytes | bytearray | memoryview) -> None:
        """Returns when the message is in the ring; every reader gets every message, in order.

        Waits while a reader is behind by the ring's size. `RankDiedError`: a reader ended (which
        the writer notices where it waits); readers are ranks 1, 2... in the message.
        """
        self._ring.send(message)

    def close(self) -> None:
        """Readers get what was sent, then `RankDiedError`."""
        self._ring.leave()


class RingReader:
    """Opens the ring `name` for the `reader`-th reader, and waits `timeout_s` for it to appear."""

    def __init__(
        self,
        name: str,
        num_readers: int,
        reader: int,
        timeout_s: float = 300.0,
        capacity: int = CAPACITY,
    ) -> None:
        self._ring = _shm.Ring.read(name, num_readers, reader, capacity, timeout_s)

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message; None if none begins within `timeout_s` (0: no wait, a short spin).

        `RankDiedError`: the writer ended and everything is read, or another reader died.
        """
        return self._ring.receive(timeout_s)

    def close(self) -> None:
        self._ring.leave()
