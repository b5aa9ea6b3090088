# SPDX-License-Identifier: MIT
"""Several engine processes behind one gateway: killed, drained, stormed, and the real model."""

import asyncio
import json
import os
import random
import time

import httpx
import pytest

from tests.gateway.processes import BODY, TEXT, limits, server, start_streams, storm
from tokenspeed.engine.routing import MIN_BLOCK
from tokenspeed.execution.cpu_share import cores_of, cpu_share

THREE = ("--data-parallel-size", "3")
PROMPTS = [
    "def quicksort(items):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\n\n\ndef main():\n",
    "# Reads a file and counts its words\n",
]


def by_engine(s, name: str) -> list[float]:
    """The values of a series, engine by engine."""
    text = httpx.get(f"{s.url}/metrics").text
    lines = sorted(line for line in text.splitlines() if line.startswith(name + "{"))
    return [float(line.rsplit(" ", 1)[1]) for line in lines]


def session(seed: int, turns: int) -> list[list[int]]:
    """Prompts of which each begins with the one before."""
    rng = random.Random(seed)
    prompt = rng.choices(range(1000, 50_000), k=3000)
    prompts = []
    for _ in range(turns):
        prompts.append(prompt)
        prompt = prompt + rng.choices(range(1000, 50_000), k=100)
    return prompts


@pytest.fixture(scope="module")
def shared():
    """One server for the tests that do it no harm."""
    with server("--step-s", "0.005", *THREE) as made:
        yield made


def test_three_processes_share_the_cores(shared):
    engines = shared.engines()
    assert len(engines) == 3
    cores = cores_of(os.sched_getaffinity(0))
    masks = {frozenset(engine.cpu_affinity()) for engine in engines}
    assert masks == {cpu_share(cores, i, 3) for i in range(3)}


async def test_sessions_side_by_side_each_stay_on_one_engine(shared):
    before = by_engine(shared, "tokenspeed:routing_matched_tokens_total")
    asked = by_engine(shared, "tokenspeed:routing_requests_total")
    async with httpx.AsyncClient(limits=limits(64), timeout=60) as client:

        async def ask(prompt: list[int]) -> None:
            reply = await client.post(shared.url + TEXT, json={"prompt": prompt, "max_tokens": 3})
            assert reply.status_code == 200

        for prompts in zip(*(session(seed, 4) for seed in range(6)), strict=True):
            await asyncio.gather(*(ask(prompt) for prompt in prompts))
    matched = by_engine(shared, "tokenspeed:routing_matched_tokens_total")
    requests = by_engine(shared, "tokenspeed:routing_requests_total")
    # Every later turn found all whole blocks of the turn before. They outweigh what the load of
    # two or three sessions can differ by.
    found = [new - old for new, old in zip(matched, before, strict=True)]
    assert sum(found) == 6 * (11 + 12 + 12) * MIN_BLOCK
    given = [new - old for new, old in zip(requests, asked, strict=True)]
    assert sum(given) == 24
    assert all(number in (4, 8, 12) for number in given)


async def test_kill_of_one_of_three_engines_under_24_streams():
    with server("--step-s", "0.02", *THREE) as s:
        async with httpx.AsyncClient(limits=limits(64), timeout=60) as client:
            tasks = await start_streams(client, s.url, 24, max_tokens=200)
            assert by_engine(s, "tokenspeed:routing_requests_total") == [8, 8, 8]
            s.engines()[1].kill()
            killed = time.monotonic()
            while s.ready() == 200:
                await asyncio.sleep(0.02)
            assert time.monotonic() - killed < 2.0
            late = await client.post(s.url + TEXT, json=BODY)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_dead")
            failed = whole = 0
            for text, ended, error in await asyncio.gather(*tasks):
                assert error is None
                assert text.endswith("data: [DONE]\n\n")
                if "engine_dead" in text:
                    assert ended - killed < 2.0
                    failed += 1
                else:
                    assert '"finish_reason":"length"' in text
                    whole += 1
            assert (failed, whole) == (8, 16)
        assert s.process.wait(10) == 1


async def test_a_dead_engine_ends_the_server_though_streams_never_end():
    with server("--step-s", "0.02", "--drain-timeout-s", "1", *THREE) as s:
        async with httpx.AsyncClient(limits=limits(64), timeout=60) as client:
            tasks = await start_streams(client, s.url, 6, max_tokens=4000)
            s.engines()[0].kill()
            killed = time.monotonic()
            for text, _, error in await asyncio.gather(*tasks):
                assert error is None
                assert json.loads(text.split("\n\n")[-3][6:])["error"]["code"] == "engine_dead"
        assert s.process.wait(10) == 1
        assert time.monotonic() - killed < 8.0


async def test_sigterm_under_32_streams_on_two_engines_loses_nothing():
    with server("--step-s", "0.02", "--data-parallel-size", "2") as s:
        async with httpx.AsyncClient(limits=limits(64), timeout=60) as client:
            tasks = await start_streams(client, s.url, 32, max_tokens=300)
            assert by_engine(s, "tokenspeed:routing_requests_total") == [16, 16]
            cores = cores_of(os.sched_getaffinity(0))
            masks = {frozenset(engine.cpu_affinity()) for engine in s.engines()}
            assert masks == {cpu_share(cores, i, 2) for i in range(2)}
            s.process.terminate()
            while (await client.get(f"{s.url}/ready")).status_code == 200:
                await asyncio.sleep(0.01)
            refused = await client.post(s.url + TEXT, json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            for text, _, error in await asyncio.gather(*tasks):
                assert error is None
                assert '"finish_reason":"length"' in text
        assert s.process.wait(10) == 0


async def test_300_disconnects_leave_nothing_on_any_of_three_engines(shared):
    await storm(shared, 300)
    assert by_engine(shared, "vllm:num_requests_running") == [0, 0, 0]
    assert min(by_engine(shared, "tokenspeed:routing_requests_total")) > 30


@pytest.mark.full
async def test_2000_disconnects_leave_nothing_on_any_of_three_engines(shared):
    await storm(shared, 2000)
    assert by_engine(shared, "vllm:num_requests_running") == [0, 0, 0]


@pytest.mark.full
async def test_2000_disconnects_leave_no_page_and_no_slot_of_two_real_engines():
    with server("--data-parallel-size", "2", real=True) as s:
        await storm(s, 2000)
        assert by_engine(s, "vllm:num_requests_running") == [0, 0]
        assert by_engine(s, "vllm:kv_cache_usage_perc") == [0, 0]


async def answers(s) -> list[str]:
    """Sixteen answers at once, some greedy and some sampled."""
    async with httpx.AsyncClient(limits=limits(64), timeout=120) as client:
        bodies = [
            {"prompt": prompt, "max_tokens": 24, "temperature": 0.8 * (i % 2), "seed": i}
            for i in range(4)
            for prompt in PROMPTS
        ]
        replies = await asyncio.gather(*(client.post(s.url + TEXT, json=b) for b in bodies))
    return [reply.json()["choices"][0]["text"] for reply in replies]


async def test_two_real_engines_answer_as_one_does():
    with server(real=True) as s:
        expected = await answers(s)
    with server("--data-parallel-size", "2", real=True) as s:
        assert await answers(s) == expected
        assert by_engine(s, "tokenspeed:routing_requests_total") == [8, 8]
        served = [int(n) for n in by_engine(s, "vllm:generation_tokens_total")]
        assert min(served) > 50
    assert len(set(expected)) >= 6
