# SPDX-License-Identifier: MIT
"""`Watch`: what the server does, second by second, for a person who looks at it. Knows records,
sessions and engines' counts; no HTTP, no prompt and no answer.

One look serves all who watch, and `HISTORY` of them are kept for whoever comes later.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from statistics import median
from typing import Any

from tokenspeed.engine.messages import EngineStats, StepTimeStats
from tokenspeed.gateway.dashboard_streams import LiveStreams, Rows
from tokenspeed.gateway.engine_pool import EnginePool
from tokenspeed.gateway.metrics import Metrics
from tokenspeed.gateway.request_log import RequestRecord
from tokenspeed.gateway.sessions import Sessions

HISTORY = 600  # seconds
MAX_STREAMS = 256  # shown, those that are worst off
MAX_SESSIONS = 48  # shown, those with the longest contexts

_GAUGES = ("num_running", "num_waiting", "num_cached_pages")
_COUNTS = (
    *("num_steps", "busy_s", "num_prefill_tokens", "num_decode_tokens", "num_draft_tokens"),
    *("prefix_queries", "prefix_hits", "num_preemptions"),
)


@dataclass(frozen=True, slots=True)
class Second:
    """The time between two looks. Numbers of tokens, steps and requests are those of this time."""

    at: float  # seconds of the epoch
    seconds: float
    prefill: int
    decode: int
    drafted: int
    accepted: int
    output: int  # tokens that came of the engines, each answer's first one too
    steps: int
    busy_s: float
    foretold: int  # steps whose time had been predicted
    predicted_s: float  # of these
    measured_s: float
    error: float  # median relative error of the latest of these, of the engine that errs most
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
    held_s: float  # of streams, those that have ended too: seconds at their floor
    missed_s: float  # and below it
    lowest: float | None
    middle: float | None
    floor: float | None  # the highest of these


COLUMNS = tuple(field.name for field in fields(Second))


class Watch:
    """One per gateway. An observer of requests; only the first gateway's `look` is called."""

    def __init__(self, pool: EnginePool, metrics: Metrics, sessions: Sessions) -> None:
        self.history: deque[Second] = deque(maxlen=HISTORY)
        self.streams = LiveStreams(metrics.streams)
        self._pool, self._metrics, self._sessions = pool, metrics, sessions
        self._before: dict[str, float] = {}
        self._looked = time.monotonic()

    def begin(self, record: RequestRecord) -> None:
        self.streams.begin(record)

    def finish(self, record: RequestRecord) -> None:
        self.streams.finish(record)

    def own(self, now: float) -> dict[str, Any]:
        """What this gateway alone knows: its streams, its sessions, and what it has counted."""
        engines = self._metrics.engines
        waiting = any(engine.stats.num_waiting for engine in engines)
        return {
            "streams": self.streams.look(now, waiting),
            "sessions": self._known_sessions(),
            "refused": dict(self._metrics.rejections),
            "seconds": dict(self._metrics.streams),
            "output": sum(engine.counters["generation_tokens"] for engine in engines),
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
        counted = {
            "refused": float(refused.total()),
            "output": float(sum(own["output"] for own in every)),
            "held_s": sum(own["seconds"]["held"] for own in every),
            "missed_s": sum(own["seconds"]["missed"] for own in every),
        }
        second = self._second(streams, counted, now)
        self.history.append(second)
        return {
            "state": self._pool.state,
            "loading": None if self._pool.ready else asdict(self._pool.loading),
            "model": self._metrics.model_name,
            "floor": self.streams.default_floor,
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

    def _second(self, streams: Rows, counted: dict[str, float], now: float) -> Second:
        stats = [engine.stats for engine in self._metrics.engines]
        new = self._new(_counts(stats) | counted)
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
            output=int(new["output"]),
            steps=int(new["num_steps"]),
            busy_s=round(new["busy_s"], 4),
            foretold=int(new["foretold"]),
            predicted_s=round(new["predicted_s"], 5),
            measured_s=round(new["measured_s"], 5),
            error=round(max((one.error for one in _foretellers(stats)), default=0.0), 4),
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
            held_s=round(new["held_s"], 3),
            missed_s=round(new["missed_s"], 3),
            lowest=min(rates, default=None),
            middle=round(median(rates), 2) if rates else None,
            floor=max((s["floor"] for s in streams if s["floor"] is not None), default=None),
        )

    def _new(self, counts: dict[str, float]) -> dict[str, float]:
        """What was added to each since the last time. Another gateway's part may be missing once,
        and is there again the next time."""
        before = self._before
        self._before = {n: max(value, before.get(n, value)) for n, value in counts.items()}
        return {n: max(0.0, value - before.get(n, value)) for n, value in counts.items()}

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
                counts.update(drafts=one.num_drafts, drafted=one.num_draft_tokens)
                counts.update(accepted=one.num_accepted_tokens)
        return [{"name": name, **counts} for name, counts in total.items()]

    def _known_sessions(self) -> Rows:
        held = self.streams.held()
        ours = [(one, held.get((one.tenant, one.name), 0)) for one in self._sessions.of(None)]
        ours.sort(key=lambda pair: -max(pair[1], pair[0].num_context))
        return [
            {
                "session": one.name,
                "tenant": one.tenant,
                "client": one.client,
                "running": one.num_running,
                "turns": one.num_turns,
                "held": tokens,
                "context": one.num_context,
                "hit_rate": one.hit_rate,
                "tps": round(one.tps_last, 2),
                "pinned": one.pinned,
                "last_seen": round(one.last_seen, 1),
            }
            for one, tokens in ours[:MAX_SESSIONS]
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


def _foretellers(stats: list[EngineStats]) -> list[StepTimeStats]:
    """Of each engine that foretells step times."""
    return [s.step_times for s in stats if s.step_times is not None]


def _counts(stats: list[EngineStats]) -> dict[str, float]:
    """Of all engines, since the start."""
    counts = {name: float(sum(getattr(s, name) for s in stats)) for name in _COUNTS}
    drafts = [s.speculation for s in stats if s.speculation is not None]
    told = _foretellers(stats)
    return counts | {
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
    return -max(int(session["held"]), int(session["context"]))
