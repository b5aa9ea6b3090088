# SPDX-License-Identifier: MIT
"""Micro-steps: what the stages of a pipeline have in flight at once. And `match_prefix`, which
routing between schedulers asks. Knows plans and counts; tokens are checked elsewhere."""

from collections import deque

import numpy as np
import pytest

from tests.unit.fake_device import FakeDevice, Row, expected_output
from tokenspeed import _scheduler

SAMPLE, PREFILL = 1, 4


def make(num_micro_steps: int, **options: int | bool) -> _scheduler.Scheduler:
    defaults = {
        "num_pages": 256,
        "page_size": 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 32,
        "max_model_len": 200,
        "hash_key": bytes(16),
    }
    return _scheduler.Scheduler(**(defaults | options), num_micro_steps=num_micro_steps)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, length, dtype=np.int32)


class Pipeline(FakeDevice):
    """Keeps `num_micro_steps` steps in flight and checks that they share no token to come."""

    def __init__(self, scheduler: _scheduler.Scheduler, num_micro_steps: int) -> None:
        super().__init__(scheduler, num_micro_steps - 1)
        self.flights: deque[list[tuple[int, Row]]] = deque()  # of each step: request, row

    def compute(self, plan: np.ndarray) -> np.ndarray:
        before = len(self.rows)
        result = super().compute(plan)
        rows = [(self.bound[row.slot], row) for row in self.rows[before:]]
        assert -1 not in plan[16 + 7 * len(rows) :][: plan[6]], "a token that nobody knows"
        for request, row in rows:
            for earlier, other in (pair for flight in self.flights for pair in flight):
                if earlier == request:
                    assert not other.flags & SAMPLE
                    assert row.flags & PREFILL
        self.flights.append(rows)
        return result

    def commit_oldest(self) -> None:
        self.flights.popleft()
        super().commit_oldest()


@pytest.mark.parametrize("num_micro_steps", [2, 3, 4])
@pytest.mark.parametrize("num_requests", range(1, 13))
def test_steps_in_flight_share_the_decoding_requests(
    num_micro_steps: int, num_requests: int
) -> None:
    scheduler = make(num_micro_steps)
    pipeline = Pipeline(scheduler, num_micro_steps)
    for i in range(num_requests):
        scheduler.submit(i, prompt(3, i), max_tokens=60)
    for _ in range(40):
        pipeline.step()
    share = -(-num_requests // num_micro_steps)
    for _ in range(20):
        pipeline.step()
        sizes = [len(flight) for flight in pipeline.flights]
        seen = [request for flight in pipeline.flights for request, _ in flight]
        assert max(sizes, default=0) <= share
        assert len(seen) == len(set(seen))
        # One step has just committed: its requests, and no others, are not in flight.
        assert len(seen) >= num_requests - share
        assert len(sizes) >= -(-num_requests // share) - 1
    pipeline.run()
    for i in range(num_requests):
        assert pipeline.outputs[i] == expected_output(prompt(3, i), 60)


def test_streams_take_turns_even_if_steps_commit_at_once() -> None:
    """An engine that never fills the pipeline still serves the latest stream."""
    scheduler = make(4)
    device = FakeDevice(scheduler, 0)
    for i in range(10):
        scheduler.submit(i, prompt(3, i), max_tokens=50)
    while len(device.outputs) < 10:
        device.step()
    before = [len(device.outputs[i]) for i in range(10)]
    for _ in range(40):
        device.step()
    gained = {len(device.outputs[i]) - before[i] for i in range(10)}
    assert min(gained) > 0
    assert max(gained) - min(gained) <= 1


@pytest.mark.parametrize("num_micro_steps", [2, 4])
def test_a_stream_never_waits_longer_than_a_round(num_micro_steps: int) -> None:
    """Streams come and go; each that runs is in a step again within P + 1 steps."""
    scheduler = make(num_micro_steps, max_num_batched_tokens=64)
    pipeline = Pipeline(scheduler, num_micro_steps)
    dice = np.random.default_rng(3)
    quiet: dict[int, int] = {}  # request -> steps since it was last in one
    for i in range(300):
        if i % 5 == 0:
            tokens = int(dice.integers(1, 40))
            scheduler.submit(i, prompt(int(dice.integers(1, 9)), i), max_tokens=tokens)
        plans = len(pipeline.plans)
        pipeline.step()
        if len(pipeline.plans) == plans:
            continue
        planned = {request for request, _ in pipeline.flights[-1]}
        for request in list(quiet):
            quiet[request] = 0 if request in planned else quiet[request] + 1
            if request in pipeline.finish:
                del quiet[request]
        quiet |= dict.fromkeys(planned - pipeline.finish.keys(), 0)
        assert max(quiet.values(), default=0) <= num_micro_steps + 1


def test_chunks_of_one_prompt_follow_each_other() -> None:
    scheduler = make(3, max_num_batched_tokens=24)
    pipeline = Pipeline(scheduler, 3)
    scheduler.submit(1, prompt(40), max_tokens=2)
    for _ in range(3):
        plan = scheduler.next_plan()
        assert plan is not None
        pipeline.in_flight.append(pipeline.compute(plan))
    assert [(row.start, row.num_tokens) for row in pipeline.rows] == [(0, 8), (8, 8), (16, 8)]
    with pytest.raises(ValueError, match="num_micro_steps"):
        scheduler.next_plan()
    pipeline.commit_oldest()
    pipeline.run()
    assert [row.start for row in pipeline.rows] == [0, 8, 16, 24, 32, 40]
    assert [row.flags & SAMPLE for row in pipeline.rows] == [0, 0, 0, 0, 1, 1]


def test_one_stream_alone_has_one_step_in_flight() -> None:
    scheduler = make(4)
    pipeline = Pipeline(scheduler, 4)
    scheduler.submit(1, prompt(3), max_tokens=9)
    plans = 0
    while scheduler.has_work():
        pipeline.step()
        plans += len(pipeline.in_flight)
        assert len(pipeline.in_flight) <= 1
    assert plans == 9


@pytest.mark.parametrize(("budget", "share"), [(32, 8), (33, 9), (16, 4)])
def test_a_step_takes_its_share_of_the_token_budget(budget: int, share: int) -> None:
    scheduler = make(4, max_num_batched_tokens=budget)
    pipeline = Pipeline(scheduler, 4)
    for i in range(12):
        scheduler.submit(i, prompt(15, i), max_tokens=8)
    pipeline.run()
    tokens = [int(plan[6]) for plan in pipeline.plans]
    assert max(tokens) == share


def test_steps_commit_in_order() -> None:
    scheduler = make(3, max_num_batched_tokens=24)
    device = FakeDevice(scheduler, 2)
    scheduler.submit(1, prompt(40), max_tokens=2)
    results = []
    for _ in range(3):
        plan = scheduler.next_plan()
        assert plan is not None
        results.append(device.compute(plan))
    for late in results[1:]:  # chunks of one prompt: but for the step's number they look alike
        with pytest.raises(ValueError, match="not the oldest step"):
            scheduler.commit(late)
        scheduler.check_invariants()
    for result in results:
        scheduler.commit(result)


def test_a_failed_chunk_takes_those_behind_it_along() -> None:
    scheduler = make(3, max_num_batched_tokens=24)
    device = FakeDevice(scheduler, 2, fails=lambda request, start: start == 8)
    scheduler.submit(1, prompt(40), max_tokens=2)
    device.run()
    assert device.finish == {1: _scheduler.FINISH_ERROR}
    assert scheduler.stats().num_cached_pages == 0
    assert scheduler.stats().num_free_pages == 256


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 40, 41])
def test_match_prefix_foretells_what_a_request_finds(length: int) -> None:
    scheduler = make(1)
    device = FakeDevice(scheduler, 0)
    scheduler.submit(1, prompt(40), max_tokens=1, salt=b"a")
    device.run()
    tokens = np.concatenate([prompt(40), prompt(9, 9)])[:length]
    found = scheduler.match_prefix(tokens, b"a")
    assert found == min((length - 1) // 4, 10) * 4
    assert scheduler.match_prefix(tokens) == 0
    scheduler.submit(2, tokens, max_tokens=1, salt=b"a")
    device.run()
    assert device.num_cached[2] == found


def test_match_prefix_touches_nothing() -> None:
    """Neither the statistics nor the order of eviction: the oldest prompt still goes first."""
    scheduler = make(1, num_pages=12)
    device = FakeDevice(scheduler, 0)
    for i in range(2):
        scheduler.submit(i, prompt(17, i), max_tokens=1)
        device.run()
    before = scheduler.stats().prefix_queries
    assert scheduler.match_prefix(prompt(17, 0)) == 16
    assert scheduler.stats().prefix_queries == before
    scheduler.check_invariants()
    scheduler.submit(2, prompt(24, 2), max_tokens=1)
    device.run()
    assert scheduler.match_prefix(prompt(17, 0)) < 16
    assert scheduler.match_prefix(prompt(17, 1)) == 16


def test_match_prefix_of_nothing_and_without_a_cache() -> None:
    assert make(1).match_prefix(np.array([], np.int32)) == 0
    scheduler = make(1, enable_prefix_caching=False)
    device = FakeDevice(scheduler, 0)
    scheduler.submit(1, prompt(40), max_tokens=1)
    device.run()
    assert scheduler.match_prefix(prompt(40)) == 0
