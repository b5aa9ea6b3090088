# SPDX-License-Identifier: MIT
"""`Crew`: the other ranks, as rank 0 sees them. Knows connections and bytes, no plans.

A thread reads each connection. When a rank ends, every wait on any of them is a `RankDiedError`
that says which one it was and, if it could say so itself, why; the others are told to leave.
"""

import contextlib
import struct
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from tokenspeed.engine.ranks.connection import Connection, Kind, facts_of
from tokenspeed.errors import RankDiedError
from tokenspeed.execution.step import StepOutput
from tokenspeed.execution.step_message import decode_output
from tokenspeed.spmd.shm_ring import RingWriter

GRACE_S = (
    1.5  # for the others to leave after a goodbye; less than the gateway waits for this process
)
REASON_S = 0.5  # from a failed collective until its cause is known here
_DP = struct.Struct("<i")

Ended = Callable[[], None]


class Crew:
    """`neighbours` read steps from the ring, the others from their connections.

    `ended` is called at the close: it waits for whatever was started on this machine.
    """

    def __init__(
        self,
        connections: Mapping[int, Connection],
        ring: RingWriter | None,
        neighbours: frozenset[int],
        ended: Ended,
    ) -> None:
        self._connections, self._ring, self._neighbours = dict(connections), ring, neighbours
        self._ended = ended
        self._failure: RankDiedError | None = None
        self._failed = threading.Event()
        self._closing = False
        self._lock = threading.Lock()
        self._on_death: Callable[[RankDiedError], None] | None = None
        self._answers: dict[int, SimpleQueue[Any]] = {r: SimpleQueue() for r in connections}
        self._outputs: dict[int, SimpleQueue[Any]] = {}
        for rank, connection in connections.items():
            name = f"rank-{rank}"
            threading.Thread(
                target=self._read, args=(rank, connection), name=name, daemon=True
            ).start()

    def on_death(self, tell: Callable[[RankDiedError], None]) -> None:
        """`tell` is called once, from another thread, when a rank has died; perhaps at once."""
        with self._lock:
            self._on_death = tell
            failure = self._failure
        if failure is not None:
            tell(failure)

    def tell(self, kind: Kind, **facts: Any) -> None:
        """To all other ranks."""
        self.check()
        for connection in self._connections.values():
            connection.send_json(kind, **facts)

    def answers(self, kind: Kind) -> dict[int, dict[str, Any]]:
        """Every rank's next message, which must be of this kind. `RankDiedError`: one ended."""
        return {rank: self._take(queue, kind) for rank, queue in self._answers.items()}

    def wait_for(self, kind: Kind) -> None:
        """Until every rank has said so. `RankDiedError`: one ended."""
        for queue in self._answers.values():
            got, _ = self._get(queue)
            if got is not kind:
                raise RankDiedError(f"a rank said {got.name} where {kind.name} was due")

    def send_step(self, message: bytes) -> None:
        self.check()
        if self._ring is not None:
            self._ring.send(message)
        for rank, connection in self._connections.items():
            if rank not in self._neighbours:
                connection.send(Kind.STEP, message)

    def results(self, wanted: list[int]) -> dict[int, StepOutput]:
        found = {}
        for dp in wanted:
            body = self._get(self._queue_of(dp))
            found[dp] = decode_output(body)
        return found

    def check(self) -> None:
        """`RankDiedError` if a rank has died."""
        if self._failure is not None:
            raise RankDiedError(str(self._failure))

    def find_cause(self) -> None:
        """After a collective failed: `RankDiedError` of the rank that died first, if one did."""
        self._failed.wait(REASON_S)
        self.check()

    def close_after(self, error: BaseException) -> None:
        """Closes; `RankDiedError` if `error` is only the consequence of another rank's death."""
        try:
            if isinstance(error, RankDiedError):
                self.find_cause()
        finally:
            self.close()

    def close(self) -> None:
        """Tells all to leave, and waits a little. May be called again."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._dismiss()
        if self._ring is not None:
            self._ring.close()
        self._ended()
        for connection in self._connections.values():
            connection.close()

    def _read(self, rank: int, connection: Connection) -> None:
        try:
            while True:
                kind, body = connection.receive()
                if kind is Kind.FAILED:
                    raise RankDiedError(f"rank {rank}: {body.decode(errors='replace')}")
                if kind is Kind.RESULT:
                    (dp,) = _DP.unpack_from(body)
                    self._queue_of(dp).put(body[_DP.size :])
                else:
                    self._answers[rank].put((kind, body))
        except Exception as error:
            if not self._closing:
                self._die(error if isinstance(error, RankDiedError) else RankDiedError(str(error)))

    def _queue_of(self, dp: int) -> "SimpleQueue[Any]":
        with self._lock:
            return self._outputs.setdefault(dp, SimpleQueue())

    def _die(self, error: RankDiedError) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            self._failed.set()
            tell, waiting = self._on_death, [*self._answers.values(), *self._outputs.values()]
        for queue in waiting:
            queue.put(error)
        self._dismiss()
        if tell is not None:
            tell(error)

    def _dismiss(self) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(RankDiedError):
                connection.send(Kind.BYE)

    def _take(self, queue: "SimpleQueue[Any]", kind: Kind) -> dict[str, Any]:
        got, body = self._get(queue)
        if got is not kind:
            raise RankDiedError(f"a rank said {got.name} where {kind.name} was due")
        return facts_of(body)

    def _get(self, queue: "SimpleQueue[Any]") -> Any:
        self.check()
        item = queue.get()
        if isinstance(item, RankDiedError):
            queue.put(item)  # for whoever else waits
            raise RankDiedError(str(item))
        return item


def result_body(dp: int, output: bytes) -> bytes:
    """The body of a RESULT."""
    return _DP.pack(dp) + output
