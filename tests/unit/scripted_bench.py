# SPDX-License-Identifier: MIT
"""Endpoints that are a script, for the commands of `tokenspeed bench`, and a run that is over."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tokenspeed.bench import compare
from tokenspeed.bench.load import run_load
from tokenspeed.bench.records import RequestRecord, Run

SMALL = ["--workload", "published", "--scale", "64", "--tokens-per-word", "1"]


class Stream(httpx.AsyncByteStream):
    def __init__(self, events: list[dict[str, Any]], pause_s: float) -> None:
        self._events, self._pause_s = events, pause_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for event in self._events:
            await asyncio.sleep(self._pause_s)
            yield f"data: {json.dumps(event)}\n\n".encode()
        yield b"data: [DONE]\n\n"


class Server:
    """Answers each request with as many tokens as it asks for; keeps what it was sent.

    `slow_above`: so many streams at once are fast, more are slow. `dead`: host names whose
    connections break.
    """

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[httpx.Headers] = []
        self.open = self.most_open = self.requests = 0
        self.slow_above = 1000
        self.dead: set[str] = set()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        if request.url.host in self.dead:
            raise httpx.ConnectError("nobody listens")
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "scripted"}]})
        if request.method == "GET":
            return httpx.Response(200)
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": [1] * len(body["prompt"].split())})
        self.bodies.append((request.url.path, body))
        self.headers.append(request.headers)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        pause_s = 0.05 if self.open > self.slow_above else 0.002
        await asyncio.sleep(0.002)
        self.open -= 1
        return httpx.Response(200, stream=Stream(self._events(request.url.path, body), pause_s))

    def _events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        count = body["max_tokens"]
        said = {"text": "w"} if path == "/v1/completions" else {"delta": {"content": "w"}}
        usage = {"prompt_tokens": 100, "completion_tokens": count}
        cached = {"prompt_tokens_details": {"cached_tokens": 60}}
        return [
            *({"choices": [said]} for _ in range(count)),
            {"choices": [{"finish_reason": "length"}], "usage": usage | cached},
        ]


def scripted(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server in the place of the network that the benchmark's commands reach."""
    served = Server()
    transport = httpx.MockTransport(served)
    monkeypatch.setattr(compare, "run_load", functools.partial(run_load, transport=transport))
    calibrate = functools.partial(compare.calibrate, transport=transport)
    monkeypatch.setattr(compare, "calibrate", calibrate)
    return served


def ended(**given: Any) -> Run:
    """A run that is over: one stream of 2 tokens per second."""
    times = [1.0 + 0.5 * i for i in range(5)]
    record = RequestRecord(
        "s", 0, "ours", "chat", "user", 5, 0.5, 1.0, 3.0, "ok", 200, None, 100, 60, 5, None, times,
        [1] * 5,
    )  # fmt: skip
    values = {
        "endpoint": "ours", "base_url": "http://h", "model": "m", "started_at": "2026-01-02",
        "duration_s": 10.0, "workload": "w", "seed": 0, "scale": 1.0, "dialect": "chat",
        "concurrency": 2,
    }  # fmt: skip
    return Run(**(values | given), records=[record])
