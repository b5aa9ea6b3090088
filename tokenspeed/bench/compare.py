# SPDX-License-Identifier: MIT
"""A workload at one load after another, on endpoints that take turns. Prints and draws nothing.

A load's prompts are of its own words: shape and lengths repeat, but no cache holds them from the
load before.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import httpx

from tokenspeed.bench.client import Endpoint, StreamClient
from tokenspeed.bench.load import LoadOptions, Observe, run_load
from tokenspeed.bench.measure import Price, Summary, summary
from tokenspeed.bench.prompts import Prompts, calibrated, calibration_text
from tokenspeed.bench.records import Run
from tokenspeed.bench.session import Workload

FRESH = 1000  # from the seed of one load's words to the next one's


@dataclass(frozen=True)
class Judge:
    """What runs are measured by."""

    floors: tuple[float, ...] = ()
    price: Price | None = None
    devices: int = 1

    def of(self, run: Run) -> Summary:
        return summary(run, self.floors, self.price, self.devices)


@dataclass(frozen=True)
class Bench:
    """What is asked of whom. `stop` ends the load that runs, and with it all others."""

    endpoints: tuple[Endpoint, ...]
    workload: Workload
    options: LoadOptions
    words: float  # tokens that the endpoints make of a word
    sessions_per_stream: int = 1  # of the workload, where a load is so many streams at once
    observe: Observe | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> list[Run]:
        """A run of each endpoint with the whole workload, as the options say."""
        return await self._run(self.workload, self.options)

    async def at(self, streams: int, place: int = 0) -> list[Run]:
        """A run of each endpoint with `streams` at once.

        Runs of another `place` say the same in other words. Raises ValueError where the workload
        has fewer sessions.
        """
        workload = replace(self.part(streams), seed=self.workload.seed + FRESH * place)
        return await self._run(workload, replace(self.options, concurrency=streams))

    async def sweep(self, loads: Sequence[int]) -> list[Run]:
        """The runs at each number of streams at once; those of one load are neighbours."""
        runs: list[Run] = []
        for place, streams in enumerate(loads):
            if self.stop.is_set():
                break
            runs += await self.at(streams, place)
        return runs

    def part(self, streams: int) -> Workload:
        """What of the workload is for so many streams."""
        sessions = self.workload.sessions[: streams * self.sessions_per_stream]
        if len(sessions) < streams:
            raise ValueError(f"{streams} streams at once, but the workload has {len(sessions)}")
        return replace(self.workload, sessions=sessions)

    async def _run(self, workload: Workload, options: LoadOptions) -> list[Run]:
        texts = Prompts(workload.seed, self.words)
        return await run_load(
            self.endpoints, workload, texts, options, observe=self.observe, stop=self.stop
        )


@dataclass(frozen=True)
class Trial:
    """Whether so many streams held a floor, for `find_capacity`."""

    run: Run
    found: Summary
    held: bool


async def try_floor(bench: Bench, judge: Judge, share: float, streams: int, place: int) -> Trial:
    """Held: `share` of all stream-seconds at or above the judge's first floor, and no turn without
    an answer. What hangs up amid its tokens has its seconds and is no answer: there must be one."""
    run = (await bench.at(streams, place))[0]
    found = judge.of(run)
    whole = run.died is None and found.turns.answered > 0 and not found.turns.unanswered
    return Trial(run, found, whole and found.floors[0].attainment >= share)


async def calibrate(
    endpoints: Sequence[Endpoint], transport: httpx.AsyncBaseTransport | None = None
) -> tuple[float, str | None]:
    """Tokens of a word by the first endpoint that tokenizes; 1.0 and the reason where none does.

    `transport` takes the place of the network.
    """
    reasons = []
    async with httpx.AsyncClient(transport=transport, trust_env=False) as http:
        for endpoint in endpoints:
            client = StreamClient(endpoint, http, time.monotonic)
            try:
                ids = await client.tokenize(calibration_text(), endpoint.model)
                return calibrated(len(ids)), None
            except (httpx.HTTPError, ValueError) as error:
                reasons.append(f"{endpoint.name}: {type(error).__name__}: {error}")
    return 1.0, "; ".join(reasons)
