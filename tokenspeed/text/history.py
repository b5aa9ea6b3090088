# SPDX-License-Identifier: MIT
"""`History`: token ids of turns that were sampled here, so that none is tokenised again.

A tape is the ids of one session; every finished turn is a length of it. A turn that goes on from
the end of a tape makes it longer; one that goes on from elsewhere gets a tape of its own. Bounded
by bytes: the tape that was used longest ago goes first. Knows keys and ids, no text.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_ID_BYTES = 8  # of a list; the integers themselves are shared by all tapes
_KEY_BYTES = 400  # of a key, its turn and their places in dicts
_MAX_SESSIONS = 1 << 14


class Tape:
    """Ids of one session from its first token on. Only ever grows."""

    __slots__ = ("__weakref__", "gone", "ids", "keys")

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.keys: list[bytes] = []
        self.gone = False

    @property
    def num_bytes(self) -> int:
        return _ID_BYTES * len(self.ids) + _KEY_BYTES * len(self.keys)


@dataclass(frozen=True, slots=True)
class Known:
    """A finished turn: `length` ids of prompt and answer, then `stop` if a token ended it."""

    tape: Tape
    length: int
    stop: int | None
    thought: bytes | None  # digest of its reasoning

    def ids(self) -> list[int]:
        """Prompt and answer without the token that ended it."""
        return self.tape.ids[: self.length]


class History:
    """Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0  # conversations that went on from a known turn
        self._known: dict[bytes, Known] = {}
        self._tapes: OrderedDict[Tape, None] = OrderedDict()
        self._sessions: OrderedDict[bytes, tuple[weakref.ref[Tape], int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, turns: Sequence[tuple[int, bytes, bytes | None]]) -> tuple[int, Known] | None:
        """The last known one of turns given as (index, key, digest of reasoning or None).

        Reasoning that a client sends must be what was sampled; then the turns before count.
        """
        best: tuple[int, Known] | None = None
        with self._lock:
            for index, key, thought in turns:
                known = self._known.get(key)
                if known is None:
                    continue
                if thought is not None and thought != known.thought:
                    break
                best = index, known
            if best is not None:
                self._tapes.move_to_end(best[1].tape)
            self.num_hits += best is not None
        return best

    def record(
        self,
        keys: Iterable[bytes],
        ids: list[int],
        came_from: Known | None,
        stop: int | None,
        thought: bytes | None,
        session: bytes | None = None,
    ) -> None:
        """Remembers `ids` of prompt and answer, without the token that ended it.

        `came_from` is the turn whose ids they begin with.
        """
        with self._lock:
            tape = self._tape(ids, came_from)
            known = Known(tape, len(ids), stop, thought)
            for key in keys:
                before = self._known.get(key)
                self._known[key] = known
                if before is None or before.tape is not tape:
                    tape.keys.append(key)
                    self.num_bytes += _KEY_BYTES
            self._tapes.move_to_end(tape)
            if session is not None:
                self._sessions[session] = weakref.ref(tape), len(ids)
                self._sessions.move_to_end(session)
                if len(self._sessions) > _MAX_SESSIONS:
                    self._sessions.popitem(last=False)
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._tapes)))

    def last(self, session: bytes) -> list[int] | None:
        """All ids of the session's last turn, but for the token that ended it."""
        with self._lock:
            found = self._sessions.get(session)
            tape = found[0]() if found is not None else None
            return tape.ids[: found[1]] if found is not None and tape is not None else None

    def _tape(self, ids: list[int], came_from: Known | None) -> Tape:
        if came_from is not None:
            tape = came_from.tape
            if not tape.gone and len(tape.ids) == came_from.length:
                new = ids[len(tape.ids) :]
                tape.ids += new
                self.num_bytes += _ID_BYTES * len(new)
                return tape
        tape = Tape(ids[:])
        self._tapes[tape] = None
        self.num_bytes += tape.num_bytes
        return tape

    def _drop(self, tape: Tape) -> None:
        tape.gone = True
        del self._tapes[tape]
        self.num_bytes -= tape.num_bytes
        for key in tape.keys:
            known = self._known.get(key)
            if known is not None and known.tape is tape:
                del self._known[key]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading ids that both have."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
