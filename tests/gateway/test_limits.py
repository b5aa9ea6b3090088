# SPDX-License-Identifier: MIT
"""Rates and concurrency of one tenant, by a clock that the test moves."""

import asyncio
import random

import pytest

from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.limits import MAX_WAITING, Bucket, Limiter, Limits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def use(limiter: Limiter, num_tokens: int = 0) -> None:
    async with limiter.slot():
        limiter.charge(num_tokens)


async def refused(limiter: Limiter) -> int:
    """Seconds to wait, of a request that must be refused."""
    with pytest.raises(ApiError) as caught:
        await use(limiter)
    error = caught.value
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert str(error).endswith(f"Please try again in {error.headers['retry-after']}s.")
    return int(error.headers["retry-after"])


async def test_requests_per_minute():
    clock = Clock()
    limiter = Limiter(Limits(requests_per_minute=3), clock)
    for _ in range(3):
        await use(limiter)
    assert await refused(limiter) == 20
    clock.now += 19.9
    assert await refused(limiter) == 1
    clock.now += 0.1
    await use(limiter)
    assert await refused(limiter) == 20
    clock.now += 3600  # a bucket never holds more than one minute's worth
    for _ in range(3):
        await use(limiter)
    assert await refused(limiter) == 20


async def test_tokens_are_charged_afterwards_and_debts_are_waited_for():
    clock = Clock()
    limiter = Limiter(Limits(tokens_per_minute=600), clock)
    await use(limiter, 599)
    await use(limiter, 1201)  # one token is left, so this one is taken
    assert await refused(limiter) == 121
    clock.now += 120
    assert await refused(limiter) == 1
    clock.now += 0.2
    await use(limiter)


async def test_a_refusal_costs_nothing():
    clock = Clock()
    limiter = Limiter(Limits(requests_per_minute=60), clock)
    for _ in range(60):
        await use(limiter)
    for _ in range(1000):
        assert await refused(limiter) == 1
    clock.now += 1.0
    await use(limiter)


async def test_concurrency_waits_its_turn():
    limiter = Limiter(Limits(max_concurrency=2))
    order, gates = [], [asyncio.Event() for _ in range(5)]

    async def work(i: int) -> None:
        async with limiter.slot():
            order.append(i)
            await gates[i].wait()

    tasks = [asyncio.create_task(work(i)) for i in range(5)]
    await asyncio.sleep(0)
    assert order == [0, 1]
    assert (limiter.num_running, limiter.num_waiting) == (2, 3)
    tasks[2].cancel()  # its client has gone
    gates[1].set()
    await asyncio.sleep(0.01)
    assert order == [0, 1, 3]
    for gate in gates:
        gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 1, 3, 4]
    assert (limiter.num_running, limiter.num_waiting) == (0, 0)


async def test_patience_ends():
    limiter = Limiter(Limits(max_concurrency=1), patience_s=0.01)
    async with limiter.slot():
        assert await refused(limiter) == 1
        assert (limiter.num_running, limiter.num_waiting) == (1, 0)
    await use(limiter)


async def test_a_queue_has_an_end():
    limiter = Limiter(Limits(max_concurrency=1))
    async with limiter.slot():
        tasks = [asyncio.create_task(use(limiter)) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        assert limiter.num_waiting == MAX_WAITING
        assert await refused(limiter) == 1
        for task in tasks:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (limiter.num_running, limiter.num_waiting) == (0, 0)


async def test_other_limits_hold_from_then_on():
    clock = Clock()
    limiter = Limiter(Limits(1, 1, 60), clock)
    await use(limiter)
    assert await refused(limiter) == 60
    limiter.set(Limits(1, 2, 60))
    await use(limiter)
    limiter.set(Limits(1, 2, 60))  # the same again gives nothing
    await use(limiter)
    assert await refused(limiter) == 30
    limiter.set(Limits())
    async with limiter.slot(), limiter.slot(), limiter.slot():
        assert limiter.num_running == 3


async def test_more_room_lets_in_who_waits():
    limiter = Limiter(Limits(max_concurrency=1))
    async with limiter.slot():
        task = asyncio.create_task(use(limiter))
        await asyncio.sleep(0)
        limiter.set(Limits(max_concurrency=2))
        await asyncio.wait_for(task, 1.0)


@pytest.mark.parametrize("seed", range(20))
async def test_counts_hold_whoever_leaves(seed):
    rng = random.Random(seed)
    limiter = Limiter(Limits(max_concurrency=rng.randint(1, 4)))
    most = 0

    async def work() -> None:
        nonlocal most
        async with limiter.slot():
            most = max(most, limiter.num_running)
            for _ in range(rng.randint(0, 3)):
                await asyncio.sleep(0)

    tasks = []
    for _ in range(60):
        tasks.append(asyncio.create_task(work()))
        if rng.random() < 0.4:
            rng.choice(tasks).cancel()
        if rng.random() < 0.5:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most <= (limiter.limits.max_concurrency or 0)
    assert (limiter.num_running, limiter.num_waiting) == (0, 0)


def test_a_bucket_is_exact():
    bucket = Bucket(60, 0.0)
    bucket.take(60, 0.0)
    assert bucket.wait_s(1, 0.0) == 1.0
    assert bucket.wait_s(1, 0.5) == 0.5
    assert bucket.wait_s(1, 1.0) == 0.0
