# SPDX-License-Identifier: MIT
"""`LiveStreams`: the requests under way as a person sees them, and how many seconds streams were at
their floor. Knows records, no engine and no HTTP.

A stream's rate is the tokens that came between two looks, about a second apart: nothing is counted
for it on the way of a token. Every second from a stream's first token to its last is counted once,
whenever somebody looks, and what is left of it when it ends.
"""

from dataclasses import dataclass, fields
from typing import Any

from tokenspeed.gateway.request_log import RequestRecord

_SHORT_S = 0.25  # of a stream that began so shortly ago no rate is told

Rows = list[dict[str, Any]]


@dataclass(slots=True)
class _Seen:
    """A request under way, as it was at the last look."""

    record: RequestRecord
    at: float
    num_come: int = 0

    def since(self, until: float) -> tuple[float, float]:
        """(seconds of the stream since then, tokens that came in them) of each of its answers."""
        r = self.record
        new = r.num_come - self.num_come
        if self.at < r.first:
            new -= r.num_first  # they came when the time that is looked at began
        return until - max(self.at, r.first), new / max(1, r.num_choices)


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


_NAMES = tuple(field.name for field in fields(Stream))


class LiveStreams:
    """An observer of requests. Adds to `seconds` of streams: `held`, `missed`, `none`."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.default_floor: float | None = None  # of streams that do not say
        self._seconds = seconds
        self._live: dict[int, _Seen] = {}

    def begin(self, record: RequestRecord) -> None:
        self._live[id(record)] = _Seen(record, record.arrived)

    def finish(self, record: RequestRecord) -> None:
        """Counts what no look has seen of it: until its last token, or until it was given up."""
        seen = self._live.pop(id(record), None)
        if seen is None or not record.first:
            return
        given_up = "abort" in record.finish
        passed, new = seen.since(record.finished if given_up else record.last)
        if passed > 0:
            self._count(self._floor(record), passed, new)

    def look(self, now: float, waiting: bool) -> Rows:
        """Those under way. `waiting`: whether some engine lets a request wait."""
        return [_plain(self._stream(seen, now, waiting)) for seen in self._live.values()]

    def held(self) -> dict[tuple[str, str | None], int]:
        """Tokens in the cache that requests hold now, by tenant and session."""
        found: dict[tuple[str, str | None], int] = {}
        for seen in self._live.values():
            r = seen.record
            if r.first:
                key = r.tenant, r.session
                found[key] = found.get(key, 0) + r.num_prompt + r.num_come
        return found

    def _stream(self, seen: _Seen, now: float, waiting: bool) -> Stream:
        r, floor = seen.record, self._floor(seen.record)
        passed, new = seen.since(now)
        told = bool(r.first) and passed >= _SHORT_S
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
            max(1, r.num_choices),
            round(new / passed, 2) if told else None,
            floor,
            told and self._count(floor, passed, new),
        )

    def _floor(self, record: RequestRecord) -> float | None:
        return self.default_floor if record.tps_floor is None else record.tps_floor or None

    def _count(self, floor: float | None, passed: float, new: float) -> bool:
        """Counts these seconds of a stream; whether it was below its floor in them."""
        # A token more or less in a second is how they fall, not how fast they come.
        below = floor is not None and floor * passed - new >= 1
        self._seconds["none" if floor is None else "missed" if below else "held"] += passed
        return below


def _plain(stream: Stream) -> dict[str, Any]:
    """`asdict` would copy every value: too slow for hundreds of streams."""
    return {name: getattr(stream, name) for name in _NAMES}


def _state(record: RequestRecord, waiting: bool) -> str:
    """Which of those without a token wait for their first step only the engine knows: none do if
    nothing waits there."""
    if record.first:
        return "streaming"
    if not record.submitted:
        return "prompt"
    return "queued" if waiting else "prefill"
