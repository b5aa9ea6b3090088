# SPDX-License-Identifier: MIT
"""`IdleCache`: a cache that forgets a session's prompts a while after its last turn ended.

No engine here does that; it answers how long idle keys and values should live. Knows no steps.
"""

from collections import deque
from collections.abc import Callable

import numpy as np

from tokenspeed.simulation.clients import ANSWER_ID, Ids, Sending


class IdleCache:
    """Drops, `idle_s` after a session's turn ended and unless another was sent meanwhile, all that
    its turns have computed and no other session uses."""

    def __init__(self, idle_s: float, release: Callable[[Ids], int]) -> None:
        self._idle_s, self._release = idle_s, release
        # Prompts and answers of a session: ids, and how often each stands in a row.
        self._branches: dict[int, list[tuple[Ids, Ids]]] = {}
        self._turns: dict[int, int] = {}  # the turn that each session sent last
        self._ends: deque[tuple[float, int, int]] = deque()  # when, session, turn

    def used(self, sending: Sending) -> None:
        """A session has sent a turn."""
        self._turns[sending.session] = sending.number

    def left(self, sending: Sending, answer: int, now_s: float) -> None:
        """The turn is over, with an answer of so many tokens."""
        said = sending.answer
        ids = np.full(answer, ANSWER_ID, np.int32) if said is None else said[:answer]
        branch = _runs(np.concatenate((sending.prompt, ids)))
        self._branches.setdefault(sending.session, []).append(branch)
        self._ends.append((now_s + self._idle_s, sending.session, sending.number))

    def expire(self, now_s: float) -> None:
        """Drops what has been idle for so long by now."""
        while self._ends and self._ends[0][0] <= now_s:
            _, session, turn = self._ends.popleft()
            if self._turns[session] == turn:
                for ids, counts in reversed(self._branches.pop(session)):
                    self._release(np.repeat(ids, counts))


def _runs(ids: Ids) -> tuple[Ids, Ids]:
    begins = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    return ids[begins], np.diff(begins, append=len(ids)).astype(np.int32)
