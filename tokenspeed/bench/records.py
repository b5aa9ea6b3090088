# SPDX-License-Identifier: MIT
"""What a run leaves behind: a record for each request, and their raw file. Measures nothing.

The file is JSON lines: a run's header, then its records; further runs may follow. Times are seconds
from the run's start by a clock that never jumps; the header alone knows what day it was.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

STATUSES = ("ok", "refused", "error", "cancelled")


@dataclass(slots=True)
class RequestRecord:
    """One request. It grows while its answer comes, so that what broke keeps what it had.

    `sent_s`: its last byte was written. `first_token_s`: the first event that carried text,
    reasoning or a tool's arguments; None if none did. `input_tokens` is the whole prompt,
    `cached_tokens` the part of it that was not computed, None where the endpoint does not tell.
    Event i of the answer arrived at `token_times[i]` and brought `token_counts[i]` tokens, 1 where
    that was not told. `asked_output_tokens` is what the workload wanted.
    """

    session_id: str
    turn: int
    endpoint: str
    dialect: str
    kind: str
    asked_output_tokens: int
    sent_s: float
    first_token_s: float | None = None
    end_s: float = 0.0
    status: str = "ok"
    http_status: int | None = None
    error: str | None = None
    input_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0
    retry_after_s: float | None = None
    token_times: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the last byte sent to the first one of the answer's text."""
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def computed_tokens(self) -> int | None:
        """Tokens of the prompt that had to be computed: all of it where the endpoint has answered
        and does not tell; None where the stream ended before it could."""
        if self.cached_tokens is None and self.status != "ok":
            return None
        return self.input_tokens - (self.cached_tokens or 0)


@dataclass(slots=True)
class Run:
    """One endpoint under one load. `rate` is sessions per second, without those that others
    started; None in a closed loop, where `concurrency` sessions are under way at once.

    `died`: what ended the endpoint before the run was over. `num_turns`: of the workload, whether
    or not they were sent; None where nobody knows.
    """

    endpoint: str
    base_url: str
    model: str
    started_at: str
    duration_s: float
    workload: str
    seed: int
    scale: float
    dialect: str
    concurrency: int | None = None
    rate: float | None = None
    time_scale: float = 1.0
    history: str = "blocks"
    forced: bool = False
    died: str | None = None
    num_turns: int | None = None
    records: list[RequestRecord] = field(default_factory=list)

    def header(self) -> dict[str, Any]:
        """Everything but the records."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "records"}


def write_runs(path: Path, runs: Iterable[Run]) -> None:
    """Writes the raw file, in place of what was there."""
    with path.open("w") as file:
        file.writelines(line for run in runs for line in lines_of(run))


def lines_of(run: Run) -> Iterator[str]:
    """The raw file's lines."""
    for one in (run.header(), *map(asdict, run.records)):
        yield json.dumps(one, allow_nan=False, separators=(",", ":")) + "\n"


def read_runs(path: Path) -> list[Run]:
    """What `write_runs` wrote. Raises `ValueError` naming the line that is not of such a file."""
    runs: list[Run] = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                _add(runs, json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    return runs


def _add(runs: list[Run], given: Any) -> None:
    if not isinstance(given, dict):
        raise ValueError("must be a JSON object")
    if "session_id" not in given:
        runs.append(Run(**given))
        return
    record = RequestRecord(**given)
    if not runs:
        raise ValueError("a record comes before the header of its run")
    if record.status not in STATUSES:
        raise ValueError(f"status: must be one of {', '.join(STATUSES)}, got {record.status!r}")
    if len(record.token_times) != len(record.token_counts):
        raise ValueError("token_counts: must be as many as token_times")
    runs[-1].records.append(record)
