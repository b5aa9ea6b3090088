# SPDX-License-Identifier: MIT
"""Who sends what when: sessions whose turns follow one another, in an open or a closed loop.

Is told the time, by whatever clock; knows no scheduler and no steps.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenspeed.simulation.sessions import MOST_BLOCK_ID, Blocks, Session, Turn

ANSWER_ID = MOST_BLOCK_ID  # what answers consist of when no later prompt says it
TAIL_ID = MOST_BLOCK_ID + 1  # ... and the tail of a prompt

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Sending:
    """One turn at the moment of its sending. `answer` is None where its ids do not matter."""

    session: int
    number: int
    sent_s: float
    prompt: Ids
    answer: Ids | None


@dataclass(slots=True)
class _Progress:
    turn: int
    blocks: Blocks  # of the prompt before
    retries: int = 0  # that are left for this turn


class Clients:
    """All sessions. `concurrency` None: an open loop, each session begins at its `start_s`, from
    the first one's on; otherwise so many are under way at once, and another begins when one ends.

    `time_scale` multiplies starts and gaps. No turn is sent at `duration_s` or later. What is sent
    arrives `request_s` later. A turn that is refused is sent again `retries` times, each after the
    wait that it is told. `forced`: an answer is what the session's next prompt goes on with, as if
    it were dictated. `most_tokens`: of a prompt and its answer that are made; who takes no more
    refuses such a prompt by its length, and what it would say beyond matters to nobody.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        *,
        concurrency: int | None = None,
        time_scale: float = 1.0,
        duration_s: float = float("inf"),
        request_s: float = 0.0,
        retries: int = 0,
        forced: bool = False,
        most_tokens: int = 2**31,
    ) -> None:
        self._sessions, self._time_scale = sessions, time_scale
        self._duration_s, self._request_s = duration_s, request_s
        self._retries, self._forced, self._most_tokens = retries, forced, most_tokens
        self._events: list[tuple[float, int, float]] = []  # arrival, session, sending
        self._under_way: dict[int, _Progress] = {}
        self._later: deque[int] = deque()  # of a closed loop
        if concurrency is None:
            first = min((session.start_s for session in sessions), default=0.0)
            for index, session in enumerate(sessions):
                self._begin(index, (session.start_s - first) * time_scale)
        else:
            self._later.extend(range(len(sessions)))
            for _ in range(min(concurrency, len(sessions))):
                self._begin(self._later.popleft(), 0.0)

    @property
    def next_s(self) -> float | None:
        """When something arrives next; None: nothing, until somebody is answered."""
        return self._events[0][0] if self._events else None

    def due(self, now_s: float) -> list[Sending]:
        """Everything that has arrived by now, in order."""
        found = []
        while self._events and self._events[0][0] <= now_s:
            _, index, sent_s = heapq.heappop(self._events)
            found.append(self._send(index, sent_s))
        return found

    def over(self, index: int, now_s: float, *, answered: bool = True) -> None:
        """The turn that this session sent last is over. Without an answer the session is, too."""
        turns, progress = self._sessions[index].turns, self._under_way[index]
        progress.turn += 1
        if answered and progress.turn < len(turns):
            self._plan(index, now_s, turns[progress.turn])
            return
        del self._under_way[index]
        if self._later:
            self._begin(self._later.popleft(), now_s)

    def refused(self, index: int, now_s: float, wait_s: float) -> None:
        """The turn that this session sent last was refused; it may come again after `wait_s`."""
        progress = self._under_way[index]
        if not progress.retries:
            self.over(index, now_s, answered=False)
            return
        progress.retries -= 1
        self._push(index, now_s + wait_s)

    def _begin(self, index: int, now_s: float) -> None:
        self._under_way[index] = _Progress(0, np.empty(0, np.int64))
        self._plan(index, now_s, self._sessions[index].turns[0])

    def _plan(self, index: int, now_s: float, turn: Turn) -> None:
        self._under_way[index].retries = self._retries
        self._push(index, now_s + turn.gap_s * self._time_scale)

    def _push(self, index: int, sent_s: float) -> None:
        if sent_s < self._duration_s:
            heapq.heappush(self._events, (sent_s + self._request_s, index, sent_s))

    def _send(self, index: int, sent_s: float) -> Sending:
        session, progress = self._sessions[index], self._under_way[index]
        turn = session.turns[progress.turn]
        blocks = np.concatenate((progress.blocks[: turn.keep], turn.added))
        progress.blocks = blocks
        size, most = session.block_size, self._most_tokens
        given = min(turn.input_tokens, most)
        asked = min(turn.output_tokens, most - given) if self._forced else 0
        # Whole blocks, and behind them how the next prompt goes on.
        whole = _ids(blocks, size, given)
        later = self._continuation(session, progress.turn, len(blocks))
        told = np.concatenate((whole, _ids(later, size, given + asked - len(whole))))
        prompt = _filled(told[:given], given, TAIL_ID)
        answer = _filled(told[given:], asked, ANSWER_ID) if self._forced else None
        return Sending(index, progress.turn, sent_s, prompt, answer)

    def _continuation(self, session: Session, number: int, num_blocks: int) -> Blocks:
        """What stands behind this prompt's whole blocks in the next one; nothing if that is no
        continuation of this."""
        if number + 1 == len(session.turns) or session.turns[number + 1].keep < num_blocks:
            return np.empty(0, np.int64)
        return session.turns[number + 1].added


def _ids(blocks: Blocks, size: int, most: int) -> Ids:
    """A block's ids are its number, again and again; the first `most` of all."""
    return np.repeat(blocks[: -(-most // size)].astype(np.int32), min(size, most))[:most]


def _filled(ids: Ids, length: int, filler: int) -> Ids:
    filled = np.full(length, filler, np.int32)
    filled[: len(ids)] = ids
    return filled
