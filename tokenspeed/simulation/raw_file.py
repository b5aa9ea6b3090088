# SPDX-License-Identifier: MIT
"""A run as the benchmark's raw file holds it: JSON lines, a header, then a record a request.

Reads nothing: what the benchmark measures of real runs it measures of these.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenspeed.simulation.simulate import Outcome, Simulation

ENDPOINT = "simulation"
DIALECT = "none"
DIGITS = 6  # microseconds
DURATION_ROOM = 32  # for the digits of a duration


def header(simulation: Simulation, duration_s: float) -> dict[str, Any]:
    """Of a run that took so long in virtual time."""
    workload, options = simulation.workload, simulation.options
    return {
        "endpoint": ENDPOINT,
        "base_url": "",
        "model": simulation.profile.name,
        "started_at": "1970-01-01T00:00:00+00:00",  # virtual time knows no date
        "duration_s": round(duration_s, DIGITS),
        "workload": workload.name,
        "seed": workload.seed,
        "scale": workload.scale,
        "dialect": DIALECT,
        "concurrency": options.concurrency,
        "rate": None if options.concurrency else _rate(simulation),
        "time_scale": options.time_scale,
        "history": "blocks",
        "forced": options.forced,
        "died": None,
        "num_turns": sum(len(session.turns) for session in workload.sessions),
    }


def _rate(simulation: Simulation) -> float | None:
    """Sessions a second in an open loop, without those that others started."""
    sessions = simulation.workload.sessions
    names = {session.session_id for session in sessions}
    starts = [session.start_s for session in sessions if session.parent not in names]
    span = (max(starts) - min(starts)) * simulation.options.time_scale if starts else 0.0
    return (len(starts) - 1) / span if span else None


def record(outcome: Outcome, event_s: float = 0.0) -> dict[str, Any]:
    """Of one request. Tokens that come within `event_s` of an event's first are one event, which
    arrives with its last; 0: each is one."""
    turn = outcome.session.turns[outcome.number]
    times, counts = _events(outcome.token_times_s, event_s)
    return {
        "session_id": outcome.session.session_id,
        "turn": outcome.number,
        "endpoint": ENDPOINT,
        "dialect": DIALECT,
        "kind": turn.kind,
        "asked_output_tokens": turn.output_tokens,
        "sent_s": round(outcome.sent_s, DIGITS),
        "first_token_s": round(outcome.token_times_s[0], DIGITS) if outcome.token_times_s else None,
        "end_s": round(outcome.end_s, DIGITS),
        "status": outcome.status,
        "http_status": outcome.http_status,
        "error": outcome.error,
        "input_tokens": turn.input_tokens,
        "cached_tokens": outcome.cached_tokens,
        "output_tokens": len(outcome.token_times_s),
        "retry_after_s": outcome.retry_after_s,
        "token_times": times,
        "token_counts": counts,
    }


def _events(times_s: Iterable[float], event_s: float) -> tuple[list[float], list[int]]:
    times: list[float] = []
    counts: list[int] = []
    first = float("-inf")
    for time_s in times_s:
        if counts and event_s > 0 and time_s - first < event_s:
            times[-1] = round(time_s, DIGITS)
            counts[-1] += 1
        else:
            first = time_s
            times.append(round(time_s, DIGITS))
            counts.append(1)
    return times, counts


class RawFile:
    """Writes outcomes as they come; `close` puts the header in place, which is known last.

    `event_s` as in `record`.
    """

    def __init__(self, path: Path, simulation: Simulation, event_s: float = 0.0) -> None:
        self._simulation, self._event_s = simulation, event_s
        self._file = path.open("w", encoding="utf-8")
        self._room = len(_line(header(simulation, 0.0))) + DURATION_ROOM
        self._file.write(" " * self._room + "\n")

    def write(self, outcome: Outcome) -> None:
        self._file.write(_line(record(outcome, self._event_s)) + "\n")

    def close(self) -> None:
        self._file.seek(0)
        line = _line(header(self._simulation, self._simulation.machine.now_s))
        self._file.write(line.ljust(self._room))
        self._file.close()


def _line(fields: dict[str, Any]) -> str:
    """In ASCII: as many bytes as characters."""
    return json.dumps(fields, separators=(",", ":"), allow_nan=False)
