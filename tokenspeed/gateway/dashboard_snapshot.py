# SPDX-License-Identifier: MIT
"""`Watch`: what the server does, second by second, for a person who looks at it. Knows records,
sessions and engines' counts; no HTTP, no prompt and no answer.

A stream's rate is the tokens that came between two looks, which are a second apart: nothing is
counted for it on the way of a token. One look serves all who watch, and `HISTORY` of them are kept
for whoever comes later.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from statistics import median
from typing import Any

from tokenspeed.engine.messages import EngineStats
from tokenspeed.gateway.engine_pool import EnginePool
from tokenspeed.gateway.metrics import Metrics
from tokenspeed.gateway.request_log import RequestRecord
from tokenspeed.gateway.sessions import Sessions

HISTORY = 600  # seconds
MAX_STREAMS = 256  # shown, those that are worst off
MAX_SESSIONS = 48  # shown, those with the longest contexts
_SHORT_S = 0.25  # of a stream that began so shortly ago no rate is told

_GAUGES = ("num_running", "num_waiting", "num_cached_pages")
_COUNTS = (
    *("num_steps", "busy_s", "num_prefill_tokens", "num_decode_tokens", "num_draft_tokens"),
    *("prefix_queries", "prefix_hits", "num_preemptions"),
)


@dataclass(slots=True)
class _Seen:
    """A request under way, as it was at the last look."""

    record: RequestRecord
    at: float = 0.0
    num_come: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """A request as it is now. `tps` is None before there is a rate to tell; of several answers to
    one prompt it is the mean."""

    id: str
    tenant: str
    session: str | None
    client: str
    route: str
    state: str  # "prompt": not yet sent to the engine | "queued" | "prefill" | "streaming"
    age_s: float
    first_s: float | None  # from arrival to the first token
    prompt: int
    expected: int  # prompt tokens that the session had before
    cached: int | None  # None before the first token
    output: int
    choices: int
    tps: float | None
    floor: float | None
    below: bool


@dataclass(frozen=True, slots=True)
class Second:
    """The time between two looks. Numbers of tokens, steps and requests are those of this time."""

    at: float  # seconds of the epoch
    seconds: float
    prefill: int
    decode: int
    drafted: int
    accepted: int
    steps: int
    busy_s: float
    foretold: int  # steps whose time had been predicted
    predicted_s: float  # of these
    measured_s: float
    running: int
    waiting: int
    held: float  # share of the pages that requests hold
    idle: float  # share that waits for a hit
    queries: int  # prompt tokens looked up
    hits: int  # and found
    refused: int
    retracted: int
    streams: int  # with a rate
    floored: int  # of these, with a floor
    below: int  # of these, below it
    lowest: float | None
    middle: float | None
    floor: float | None  # the highest of these


COLUMNS = tuple(field.name for field in fields(Second))
_STREAM = tuple(field.name for field in fields(Stream))
Rows = list[dict[str, Any]]


class Watch:
    """One per gateway. An observer of requests; only the first gateway's `look` is called."""

    def __init__(self, pool: EnginePool, metrics: Metrics, sessions: Sessions) -> None:
        self.default_floor: float | None = None  # of streams that do not say
        self.history: deque[Second] = deque(maxlen=HISTORY)
        self._pool, self._metrics, self._sessions = pool, metrics, sessions
        self._live: dict[int, _Seen] = {}
        self._before: dict[str, float] = {}
        self._looked = time.monotonic()

    def begin(self, record: RequestRecord) -> None:
        self._live[id(record)] = _Seen(record, time.monotonic())

    def finish(self, record: RequestRecord) -> None:
        self._live.pop(id(record), None)

    def own(self, now: float) -> dict[str, Any]:
        """What this gateway alone knows: its streams, its sessions, and what it has refused."""
        waiting = any(engine.stats.num_waiting for engine in self._metrics.engines)
        return {
            "streams": [_plain(self._stream(seen, now, waiting)) for seen in self._live.values()],
            "sessions": self._known_sessions(),
            "refused": dict(self._metrics.rejections),
        }

    def look(self, others: Iterable[dict[str, Any]] = (), now: float | None = None) -> Any:
        """A snapshot, and one more second of history. `others`: the other gateways' `own`.

        To be called about once a second.
        """
        now = time.monotonic() if now is None else now
        every = [self.own(now), *others]
        streams = sorted((s for own in every for s in own["streams"]), key=_order)
        sessions = sorted((s for own in every for s in own["sessions"]), key=_length)
        refused: Counter[str] = Counter()
        for own in every:
            refused.update(own["refused"])
        second = self._second(streams, refused.total(), now)
        self._metrics.streams.update(
            seconds=second.streams, floored=second.floored, below=second.below
        )
        self.history.append(second)
        return {
            "state": self._pool.state,
            "loading": None if self._pool.ready else asdict(self._pool.loading),
            "model": self._metrics.model_name,
            "floor": self.default_floor,
            "engines": self._engines(),
            "drafters": self._drafters(),
            "refused": dict(refused),
            "num_streams": len(streams),
            "streams": sorted(streams[:MAX_STREAMS], key=lambda s: -float(s["age_s"])),
            "num_sessions": len(sessions),
            "sessions": sessions[:MAX_SESSIONS],
            "second": astuple(second),
        }

    def past(self) -> dict[str, Any]:
        """The seconds so far, in columns."""
        return {"columns": COLUMNS, "rows": [astuple(second) for second in self.history]}

    def _stream(self, seen: _Seen, now: float, waiting: bool) -> Stream:
        r, choices = seen.record, max(1, seen.record.num_choices)
        since = max(seen.at, r.first)
        new, passed = r.num_come - seen.num_come, now - since
        if seen.at < r.first:
            new -= r.num_first  # they came when the time that is looked at began
        told = bool(r.first) and passed >= _SHORT_S
        tps = new / passed / choices if told else None
        floor = self.default_floor if r.tps_floor is None else r.tps_floor or None
        if told or not r.first:
            seen.at, seen.num_come = now, r.num_come
        return Stream(
            r.id,
            r.tenant,
            r.session,
            r.client,
            r.route,
            _state(r, waiting),
            round(now - r.arrived, 2),
            round(r.first - r.arrived, 3) if r.first else None,
            r.num_prompt,
            r.num_expected,
            r.num_cached if r.first else None,
            r.num_come,
            choices,
            None if tps is None else round(tps, 2),
            floor,
            # A token more or less in a second is how they fall, not how fast they come.
            tps is not None and floor is not None and (tps - floor) * passed <= -1,
        )

    def _second(self, streams: Rows, refused: int, now: float) -> Second:
        stats = [engine.stats for engine in self._metrics.engines]
        counts = {name: float(sum(getattr(s, name) for s in stats)) for name in _COUNTS}
        counts |= _foretold(stats) | {"refused": float(refused)}
        new = {n: max(0.0, value - self._before.get(n, value)) for n, value in counts.items()}
        self._before = counts
        gauges = {name: sum(getattr(s, name) for s in stats) for name in _GAUGES}
        rates = [s["tps"] for s in streams if s["tps"] is not None]
        ready = self._pool.ready
        passed, self._looked = now - self._looked, now
        return Second(
            at=round(time.time(), 2),
            seconds=round(passed, 3),
            prefill=int(new["num_prefill_tokens"]),
            decode=int(new["num_decode_tokens"]),
            drafted=int(new["num_draft_tokens"]),
            accepted=int(new["accepted"]),
            steps=int(new["num_steps"]),
            busy_s=round(new["busy_s"], 4),
            foretold=int(new["foretold"]),
            predicted_s=round(new["predicted_s"], 5),
            measured_s=round(new["measured_s"], 5),
            running=gauges["num_running"],
            waiting=gauges["num_waiting"],
            held=round(sum(s.kv_cache_usage for s in stats) / len(stats), 4),
            idle=round(gauges["num_cached_pages"] / ready.num_pages, 4) if ready else 0.0,
            queries=int(new["prefix_queries"]),
            hits=int(new["prefix_hits"]),
            refused=int(new["refused"]),
            retracted=int(new["num_preemptions"]),
            streams=len(rates),
            floored=sum(s["tps"] is not None and s["floor"] is not None for s in streams),
            below=sum(s["below"] for s in streams),
            lowest=min(rates, default=None),
            middle=round(median(rates), 2) if rates else None,
            floor=max((s["floor"] for s in streams if s["floor"] is not None), default=None),
        )

    def _engines(self) -> Rows:
        return [
            {
                "pages": client.ready.num_pages if client.ready else 0,
                "page_size": client.ready.page_size if client.ready else 0,
                "state": client.state,
                "held": round(engine.stats.kv_cache_usage, 4),
                "idle_pages": engine.stats.num_cached_pages,
                "retained_pages": engine.stats.num_retained_pages,
                "pinned_pages": engine.stats.num_pinned_pages,
                "running": engine.stats.num_running,
                "waiting": engine.stats.num_waiting,
            }
            for client, engine in zip(self._pool.clients, self._metrics.engines, strict=True)
        ]

    def _drafters(self) -> Rows:
        """Since the start, over all engines."""
        total: dict[str, Counter[str]] = {}
        for engine in self._metrics.engines:
            told = engine.stats.speculation
            for one in () if told is None else told.drafters:
                counts = total.setdefault(one.name, Counter())
                counts.update(drafted=one.num_draft_tokens, accepted=one.num_accepted_tokens)
        return [{"name": name, **counts} for name, counts in total.items()]

    def _known_sessions(self) -> Rows:
        found = sorted(self._sessions.of(None), key=lambda one: -one.num_context)[:MAX_SESSIONS]
        return [
            {
                "session": one.name,
                "tenant": one.tenant,
                "client": one.client,
                "running": one.num_running,
                "turns": one.num_turns,
                "context": one.num_context,
                "hit_rate": one.hit_rate,
                "tps": round(one.tps_last, 2),
                "pinned": one.pinned,
                "last_seen": round(one.last_seen, 1),
            }
            for one in found
        ]


class Show:
    """The latest look, for all who watch. Who is slow misses some, and holds nobody up."""

    def __init__(self) -> None:
        self.num_viewers = 0
        self._latest = b""
        self._news = asyncio.Event()

    def put(self, latest: bytes) -> None:
        self._latest = latest
        self._news.set()
        self._news = asyncio.Event()

    async def next(self) -> bytes:
        """The next one that is put."""
        await self._news.wait()
        return self._latest


def _plain(stream: Stream) -> dict[str, Any]:
    """`asdict` would copy every value: too slow for hundreds of streams."""
    return {name: getattr(stream, name) for name in _STREAM}


def _state(record: RequestRecord, waiting: bool) -> str:
    """Which of those without a token wait for their first step only the engine knows: none do if
    nothing waits there."""
    if record.first:
        return "streaming"
    if not record.submitted:
        return "prompt"
    return "queued" if waiting else "prefill"


def _foretold(stats: list[EngineStats]) -> dict[str, float]:
    drafts = [s.speculation for s in stats if s.speculation is not None]
    told = [one for s in stats if (one := s.pacing or s.speculation) is not None]
    return {
        "foretold": float(sum(one.num_steps for one in told)),
        "predicted_s": sum(one.predicted_s for one in told),
        "measured_s": sum(one.measured_s for one in told),
        "accepted": float(sum(d.num_accepted_tokens for one in drafts for d in one.drafters)),
    }


def _order(stream: dict[str, Any]) -> tuple[bool, float]:
    """Those below their floor, the slowest of them first; then those that wait, longest first."""
    if stream["tps"] is None:
        return True, -float(stream["age_s"])
    return not stream["below"], float(stream["tps"]) - float(stream["floor"] or 0.0)


def _length(session: dict[str, Any]) -> int:
    return -int(session["context"])
