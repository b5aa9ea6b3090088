# SPDX-License-Identifier: MIT
"""Puts a workload on endpoints and returns a run of each: who sends what when.

Closed loop: so many sessions at once, the next begins when one ends. Open loop: sessions begin when
the workload says. Knows no JSON of any dialect and judges nothing: a missed floor, a refused
request and an endpoint that dies are results.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise

import httpx
import numpy as np

from tokenspeed.bench.client import Answer, Endpoint, StreamClient
from tokenspeed.bench.dialects import Ask
from tokenspeed.bench.records import RequestRecord, Run
from tokenspeed.bench.replay import HISTORIES, Replay, Texts
from tokenspeed.bench.session import Session, Turn, Workload

Clock = Callable[[], float]
Observe = Callable[[RequestRecord], None]
_PATIENCE_S = 1.0  # before a retry that nobody named a time for
# Servers close idle connections after 5 s or more: a request must not meet that.
_KEEPALIVE_S = 2.0


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a workload is sent.

    `concurrency`: sessions at once; None: each at its `start_s`. `time_scale` multiplies starts
    and gaps: 0 sends as soon as it can. `history`: see `bench.replay`. `forced`: the recorded
    answers are dictated. `retries`: how often a refused turn is sent again, after its Retry-After;
    a turn that gets no answer ends its session. `duration_s`: when an endpoint's run is cut off.
    `rounds`: parts of the workload that each endpoint gets in turn, so that what drifts on the
    machine hits all of them. `stall_s`: silence that is an error.
    """

    concurrency: int | None = None
    time_scale: float = 1.0
    history: str = "blocks"
    forced: bool = False
    ignore_eos: bool = True
    retries: int = 0
    duration_s: float | None = None
    rounds: int = 1
    stall_s: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.stall_s < float("inf"):
            raise ValueError(f"stall_s: must be finite and positive, got {self.stall_s}")
        for name in ("concurrency", "rounds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if not 0 <= self.time_scale < float("inf"):
            raise ValueError(f"time_scale: must be finite and not negative, got {self.time_scale}")
        if self.duration_s is not None and not 0 < self.duration_s < float("inf"):
            raise ValueError(f"duration_s: must be finite and positive, got {self.duration_s}")
        if self.retries < 0:
            raise ValueError(f"retries: must not be negative, got {self.retries}")
        if self.history not in HISTORIES:
            raise ValueError(f"history: must be one of {', '.join(HISTORIES)}")


def with_arrivals(workload: Workload, rate: float, seed: int | None = None) -> Workload:
    """The workload with sessions that begin at random, `rate` a second on average (Poisson).

    A session that another one started begins as long after that one as before.
    """
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate: must be finite and positive, got {rate}")
    random = np.random.default_rng(workload.seed if seed is None else seed)
    first = workload.top_level
    starts: list[float] = np.cumsum(random.exponential(1 / rate, len(first))).tolist()
    drawn = {one.session_id: at - one.start_s for one, at in zip(first, starts, strict=True)}
    parents = {one.session_id: one.parent or "" for one in workload.sessions}

    def later(name: str) -> float:
        while name not in drawn:
            name = parents[name]
        return drawn[name]

    moved = (replace(one, start_s=one.start_s + later(one.session_id)) for one in workload.sessions)
    return replace(workload, sessions=tuple(sorted(moved, key=lambda one: one.start_s)))


async def run_load(
    endpoints: Sequence[Endpoint],
    workload: Workload,
    texts: Texts,
    options: LoadOptions,
    *,
    observe: Observe | None = None,
    stop: asyncio.Event | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    clock: Clock = time.monotonic,
) -> list[Run]:
    """Sends the workload to every endpoint and returns their runs, in their order.

    `observe` sees each record when it is done; `stop` ends the runs early, with what they have;
    `transport` takes the place of the network. Raises `ValueError` for two endpoints of one name,
    for an empty workload, and for two sessions of one id.
    """
    if len({one.name for one in endpoints}) < len(endpoints) or not endpoints:
        raise ValueError("endpoints: each needs a name of its own, and there must be one")
    if not workload.sessions:
        raise ValueError("workload: has no sessions")
    if len({one.session_id for one in workload.sessions}) < len(workload.sessions):
        raise ValueError("workload: each session needs an id of its own")
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEPALIVE_S
    )
    stop = stop or asyncio.Event()
    async with httpx.AsyncClient(transport=transport, limits=limits, trust_env=False) as http:
        lanes = [_Lane(one, workload, texts, options, http, clock, observe) for one in endpoints]
        for number, sessions in enumerate(_parts(workload.sessions, options.rounds)):
            for lane in lanes if number % 2 == 0 else lanes[::-1]:
                if not stop.is_set():
                    await lane.round(sessions, stop)
    return [lane.run for lane in lanes]


def _parts(sessions: Sequence[Session], number: int) -> Iterator[Sequence[Session]]:
    """Neighbours stay together: so the rate of arrivals does."""
    edges = [len(sessions) * i // number for i in range(number + 1)]
    return (sessions[a:b] for a, b in pairwise(edges) if a < b)


class _Lane:
    """One endpoint's run. Its clock stands still while another endpoint's round runs."""

    def __init__(
        self,
        endpoint: Endpoint,
        workload: Workload,
        texts: Texts,
        options: LoadOptions,
        http: httpx.AsyncClient,
        clock: Clock,
        observe: Observe | None,
    ) -> None:
        self.endpoint, self._texts, self._options, self._clock = endpoint, texts, options, clock
        self._observe = observe
        self._client = StreamClient(endpoint, http, self._now, options.stall_s)
        self._begun = 0.0  # what the clock showed when time 0 of the run was, had it never stopped
        self._dead = asyncio.Event()
        starts = [session.start_s for session in workload.top_level]
        span = (max(starts) - min(starts)) * options.time_scale
        self.run = Run(
            endpoint=endpoint.name,
            base_url=endpoint.base_url,
            model=endpoint.model or "",
            started_at="",
            duration_s=0.0,
            workload=workload.name,
            seed=workload.seed,
            scale=workload.scale,
            dialect=endpoint.dialect,
            concurrency=options.concurrency,
            rate=None if options.concurrency or not span else (len(starts) - 1) / span,
            time_scale=options.time_scale,
            history=options.history,
            forced=options.forced,
            num_turns=workload.num_turns,
        )

    def _now(self) -> float:
        return self._clock() - self._begun

    async def round(self, sessions: Sequence[Session], stop: asyncio.Event) -> None:
        """Sends these sessions; returns when all have ended, or are cut off."""
        if self._dead.is_set() or not await self._know_model():
            return
        self.run.started_at = self.run.started_at or datetime.now(UTC).isoformat()
        limit = self._options.duration_s
        self._begun = self._clock() - self.run.duration_s
        work = asyncio.create_task(self._send_all(sessions))
        ends = [asyncio.create_task(event.wait()) for event in (stop, self._dead)]
        try:
            await asyncio.wait(
                [work, *ends],
                timeout=None if limit is None else limit / self._options.rounds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for task in (work, *ends):
                task.cancel()
            await asyncio.wait([work, *ends])
            self.run.duration_s = self._now()
        if not work.cancelled():
            work.result()

    async def _know_model(self) -> bool:
        if not self.run.model:
            try:
                self.run.model = await self._client.first_model()
            except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
                self._die(f"/v1/models: {type(error).__name__}: {error}")
        return not self._dead.is_set()

    def _die(self, cause: str) -> None:
        if self.run.died is None:
            self.run.died = cause
            self._dead.set()

    async def _send_all(self, sessions: Sequence[Session]) -> None:
        waiting = iter(sessions)

        async def work() -> None:
            for session in waiting:
                await self._session(session)

        async with asyncio.TaskGroup() as group:
            if self._options.concurrency is not None:
                for _ in range(min(self._options.concurrency, len(sessions))):
                    group.create_task(work())
                return
            first, origin = min(session.start_s for session in sessions), self._now()
            for session in sessions:
                at = origin + (session.start_s - first) * self._options.time_scale
                group.create_task(self._session(session, at))

    async def _session(self, session: Session, at: float | None = None) -> None:
        """From its first turn to its last, or to one without an answer."""
        due = self._now() if at is None else at
        replay = Replay(session, self._texts, self._options.history)
        for index, turn in enumerate(session.turns):
            due += turn.gap_s * self._options.time_scale
            await self._sleep_until(due)
            answer = await self._turn(replay, index, turn)
            if answer is None:
                return
            replay.answered(index, answer.text)
            due = self._now()

    async def _sleep_until(self, due: float) -> None:
        if (left := due - self._now()) > 0:
            await asyncio.sleep(left)

    async def _turn(self, replay: Replay, index: int, turn: Turn) -> Answer | None:
        """The answer; None if there was none, however often it was asked for."""
        ask = Ask(
            messages=replay.messages(index),
            max_tokens=turn.output_tokens,
            model=self.run.model,
            user=replay.session.user,
            session=replay.session.session_id,
            parent=replay.session.parent,
            ignore_eos=self._options.ignore_eos,
            token_counts=self.endpoint.token_counts,
            cancel_after=turn.cancel_after,
        )
        dictated = replay.dictated(index) if self._options.forced else None
        for left in range(self._options.retries, -1, -1):
            if self._dead.is_set():
                return None
            record = RequestRecord(
                session_id=replay.session.session_id,
                turn=index,
                endpoint=self.endpoint.name,
                dialect=self.endpoint.dialect,
                kind=turn.kind,
                asked_output_tokens=turn.output_tokens,
                sent_s=0.0,
                input_tokens=turn.input_tokens,
            )
            answer = await self._attempt(ask, record, dictated)
            if record.status != "refused":
                return None if record.status == "error" else answer
            if left:
                wait_s = record.retry_after_s
                await asyncio.sleep(_PATIENCE_S if wait_s is None else wait_s)
        return None

    async def _attempt(self, ask: Ask, record: RequestRecord, dictated: str | None) -> Answer:
        self.run.records.append(record)
        try:
            answer = await self._client.send(ask, record, dictated)
            if answer.broken and not await self._client.is_alive():
                self._die(record.error or "")
            return answer
        finally:
            # Those that were open when the endpoint was found dead failed of what killed it.
            if record.status == "cancelled" and self.run.died is not None:
                record.status, record.error = "error", f"the endpoint died: {self.run.died}"
            if self._observe is not None:
                self._observe(record)
