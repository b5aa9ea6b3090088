# SPDX-License-Identifier: MIT
"""Retention, receipts and prefixes kept or dropped by hand, through the binding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.unit.fake_device import FakeDevice, expected_output
from tokenspeed import _scheduler

PAGE = 4
Prompt = NDArray[np.int32]


class Machine:
    """A scheduler and its device; requests run one at a time."""

    def __init__(self, **options: float) -> None:
        defaults = {"num_pages": 16, "page_size": PAGE, "max_num_seqs": 4}
        defaults |= {"max_num_batched_tokens": 64, "max_model_len": 80}
        self.scheduler = _scheduler.Scheduler(**(defaults | options))  # type: ignore[arg-type]
        self.device = FakeDevice(self.scheduler, 0)
        self.num_requests = 0

    def ask(self, prompt: Prompt, max_tokens: int = 1, **options: object) -> int:
        """Runs one request to its end; returns its id."""
        self.num_requests += 1
        options = {"max_tokens": max_tokens} | options
        self.scheduler.submit(self.num_requests, prompt, **options)  # type: ignore[arg-type]
        self.device.run()
        assert self.device.outputs[self.num_requests] == expected_output(prompt, max_tokens)
        return self.num_requests

    def cached(self, prompt: Prompt, salt: bytes = b"") -> int:
        """How many of the prompt's full pages are cached."""
        return self.scheduler.match_prefix(np.append(prompt, np.int32(0)), salt) // PAGE

    def fill(self, num_pages: int, seed: int = 99) -> None:
        """Something else takes that many pages."""
        self.ask(tokens(num_pages, seed))


def tokens(num_pages: int, seed: int = 0) -> Prompt:
    return np.random.default_rng(seed).integers(0, 1000, num_pages * PAGE, dtype=np.int32)


def test_what_is_retained_outlives_what_was_used_later() -> None:
    for retention_s, kept in ((0.0, 0), (60.0, 4)):
        machine = Machine()
        machine.ask(tokens(4, 1), retention_s=retention_s)
        machine.ask(tokens(4, 2))
        machine.fill(12)
        assert machine.cached(tokens(4, 1)) == kept


def test_retention_counts_from_the_end_of_the_request() -> None:
    machine = Machine()
    machine.scheduler.submit(1, tokens(4, 1), max_tokens=3, retention_s=10.0)
    machine.device.step()
    machine.scheduler.advance(100.0)
    machine.device.run()
    machine.scheduler.advance(109.0)
    assert machine.scheduler.stats().num_retained_pages == 4
    machine.scheduler.advance(110.0)
    assert machine.scheduler.stats().num_retained_pages == 0


def test_the_earliest_deadline_goes_first_and_pins_last() -> None:
    machine = Machine(retention_share=1.0)
    for seed, seconds, pinned in ((1, 0.0, True), (2, 20.0, False), (3, 10.0, False)):
        machine.ask(tokens(4, seed), retention_s=seconds, pinned=pinned)
    machine.fill(8, 98)
    assert [machine.cached(tokens(4, seed)) for seed in (1, 2, 3)] == [4, 4, 0]
    machine.fill(12, 97)
    assert [machine.cached(tokens(4, seed)) for seed in (1, 2)] == [4, 0]
    machine.fill(16, 96)
    assert machine.cached(tokens(4, 1)) == 0


def test_what_expired_still_goes_after_what_nobody_retained() -> None:
    machine = Machine()
    machine.ask(tokens(4, 1), retention_s=5.0)
    machine.scheduler.advance(50.0)
    machine.ask(tokens(4, 2))
    machine.fill(10)
    assert (machine.cached(tokens(4, 1)), machine.cached(tokens(4, 2))) == (4, 2)


def test_what_was_generated_is_retained_too() -> None:
    machine = Machine()
    request = machine.ask(tokens(2, 1), max_tokens=9, retention_s=60.0)
    whole = np.append(tokens(2, 1), machine.device.outputs[request]).astype(np.int32)
    machine.fill(12)
    assert machine.cached(whole[: 4 * PAGE]) == 4


def test_a_turn_renews_what_the_one_before_retained() -> None:
    machine = Machine()
    machine.ask(tokens(3, 1), retention_s=10.0)
    machine.scheduler.advance(9.0)
    machine.ask(np.append(tokens(3, 1), tokens(1, 2)), retention_s=10.0)
    machine.scheduler.advance(18.0)
    assert machine.scheduler.stats().num_retained_pages == 4
    machine.fill(12)
    assert machine.cached(tokens(3, 1)) == 3


def test_beyond_the_share_the_oldest_retention_is_lost_deepest_page_first() -> None:
    machine = Machine(retention_share=0.5)
    machine.ask(tokens(5, 1), retention_s=1000.0)
    machine.ask(tokens(5, 2), retention_s=10.0)
    assert machine.scheduler.stats().num_retained_pages == 8
    machine.fill(8)
    assert machine.cached(tokens(5, 1)) == 3
    assert machine.cached(tokens(5, 2)) == 5


def test_pins_do_not_give_way_to_retention() -> None:
    machine = Machine(retention_share=0.5)
    machine.ask(tokens(6, 1), pinned=True)
    machine.ask(tokens(6, 2), retention_s=1000.0)
    stats = machine.scheduler.stats()
    assert (stats.num_pinned_pages, stats.num_retained_pages) == (6, 2)


def test_retention_never_blocks_admission() -> None:
    machine = Machine(retention_share=1.0)
    for seed in range(4):
        machine.ask(tokens(4, seed), pinned=True)
    assert machine.scheduler.stats().num_pinned_pages == 16
    assert machine.scheduler.stats().num_free_pages == 0
    machine.scheduler.submit(50, tokens(15, 60), max_tokens=4)
    machine.device.step()  # at once
    assert machine.scheduler.stats().num_running == 1
    machine.device.run()
    assert machine.device.outputs[50] == expected_output(tokens(15, 60), 4)


def test_a_branch_that_was_superseded_goes_first_although_retained() -> None:
    machine = Machine()
    machine.ask(tokens(2, 1), max_tokens=13, retention_s=1000.0)  # its thinking, say
    machine.ask(tokens(2, 3))
    machine.ask(np.append(tokens(2, 1), tokens(1, 2)), retention_s=1000.0)
    assert machine.scheduler.stats().num_retained_pages == 3
    machine.fill(10)
    assert machine.cached(np.append(tokens(2, 1), tokens(1, 2))) == 3
    assert machine.cached(tokens(2, 3)) == 2


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_time_is_never_negative(seconds: float) -> None:
    machine = Machine()
    with pytest.raises(ValueError, match="retention_s"):
        machine.scheduler.submit(1, tokens(1), max_tokens=1, retention_s=seconds)
    with pytest.raises(ValueError, match="retention_s"):
        machine.scheduler.retain(tokens(1), retention_s=seconds)
    with pytest.raises(ValueError, match="now_s"):
        machine.scheduler.advance(seconds)
    assert not machine.scheduler.has_work()


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match="retention_share"):
        Machine(retention_share=share)


def miss(machine: Machine, request: int) -> int:
    return machine.device.receipts[request][0]


def test_receipts_say_why_not_more_was_found() -> None:
    machine = Machine()
    first = machine.ask(tokens(3, 1))
    assert miss(machine, first) == _scheduler.MISS_NEVER_CACHED
    again = machine.ask(tokens(3, 1))
    assert machine.device.num_cached[again] == 2 * PAGE  # the last token is computed again
    assert miss(machine, again) == _scheduler.MISS_NONE
    other = machine.ask(np.append(tokens(1, 1), tokens(2, 2)))
    assert machine.device.num_cached[other] == PAGE
    assert miss(machine, other) == _scheduler.MISS_DIVERGED
    longer = machine.ask(np.append(tokens(3, 1), tokens(2, 3)))
    assert miss(machine, longer) == _scheduler.MISS_NEVER_CACHED
    assert machine.device.num_cached[longer] == 3 * PAGE
    machine.fill(16)
    assert miss(machine, machine.ask(tokens(3, 1))) == _scheduler.MISS_EVICTED
    tenant = machine.ask(tokens(3, 1), salt=b"tenant")
    assert miss(machine, tenant) == _scheduler.MISS_NEVER_CACHED
    short = machine.ask(tokens(1, 4)[:3])
    assert miss(machine, short) == _scheduler.MISS_NONE
    for options in ({"read_cache": False}, {"prompt_logprobs": True}):
        request = machine.ask(tokens(3, 1), **options)
        assert miss(machine, request) == _scheduler.MISS_DISABLED
    off = Machine(enable_prefix_caching=False)
    assert miss(off, off.ask(tokens(3, 1), retention_s=5.0)) == _scheduler.MISS_DISABLED
    assert off.device.receipts[1][1] == 0


def test_receipts_say_for_how_long() -> None:
    machine = Machine(retention_share=0.25)
    week_us = 7 * 24 * 3600 * 10**6
    for options, kept_us in (
        ({}, 0),
        ({"retention_s": 1.5}, 1_500_000),
        ({"retention_s": 1e300}, week_us),
        ({"pinned": True}, week_us),
    ):
        request = machine.ask(tokens(4, 1), **options)
        assert machine.device.receipts[request][1] == kept_us
    request = machine.ask(tokens(5, 1), retention_s=60.0)
    assert machine.device.receipts[request][1] == 0  # five pages, and the share is four


def test_ghosts_are_bounded_and_recent() -> None:
    machine = Machine()
    for seed in range(1000):
        machine.ask(tokens(8, seed))
    evicted = [machine.ask(tokens(8, seed)) for seed in (0, 996)]
    found = [miss(machine, request) for request in evicted]
    assert found == [_scheduler.MISS_NEVER_CACHED, _scheduler.MISS_EVICTED]


def test_prefixes_are_retained_by_hand() -> None:
    machine = Machine()
    prompt = tokens(4, 1)
    machine.ask(prompt)
    assert machine.scheduler.retain(prompt, pinned=True) == 4
    assert machine.scheduler.retain(prompt, b"other", pinned=True) == 0
    assert machine.scheduler.retain(np.append(prompt[:8], tokens(2, 2)), retention_s=5.0) == 2
    stats = machine.scheduler.stats()
    assert (stats.num_pinned_pages, stats.num_retained_pages) == (4, 0)
    assert machine.scheduler.retain(prompt) == 4  # unpinned
    assert machine.scheduler.stats().num_pinned_pages == 0
    machine.fill(16)
    assert machine.cached(prompt) == 0


def test_prefixes_in_use_are_retained_but_not_dropped() -> None:
    machine = Machine()
    machine.scheduler.submit(1, tokens(4, 1), max_tokens=6)
    machine.device.step()
    assert machine.scheduler.retain(tokens(4, 1), pinned=True) == 4
    assert machine.scheduler.release(tokens(4, 1)) == 0
    machine.device.run()
    assert machine.scheduler.stats().num_pinned_pages == 4
    assert machine.device.outputs[1] == expected_output(tokens(4, 1), 6)


def test_dropping_a_branch_leaves_the_others() -> None:
    machine = Machine()
    left, right = (np.append(tokens(2, 1), tokens(2, seed)) for seed in (2, 3))
    machine.ask(left, pinned=True)
    machine.ask(right)
    free = machine.scheduler.stats().num_free_pages
    assert machine.scheduler.release(left, b"other") == 0
    assert machine.scheduler.retain(right, pinned=True) == 4
    assert machine.scheduler.retain(right) == 2  # the pages that both build on stay pinned
    assert machine.scheduler.stats().num_pinned_pages == 4
    assert machine.scheduler.release(left) == 2
    stats = machine.scheduler.stats()
    assert (stats.num_free_pages, stats.num_pinned_pages) == (free + 2, 2)
    assert (machine.cached(left), machine.cached(right)) == (2, 4)
    assert machine.scheduler.release(right) == 4  # nobody else builds on them any more
    assert machine.scheduler.stats().num_cached_pages == 0
    assert miss(machine, machine.ask(left)) == _scheduler.MISS_EVICTED


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.booleans()), max_size=14))
def test_the_log_says_it_all(asked: list[tuple[int, int, bool]]) -> None:
    machine = Machine(record_events=True)
    now = 0.0
    for seed, seconds, pinned in asked:
        prompt = np.append(tokens(1, seed % 2), tokens(3, seed))
        user = {"user": seed % 3} if pinned else {}
        machine.ask(prompt, max_tokens=4, retention_s=seconds, pinned=pinned, **user)
        now += seconds / 2
        machine.scheduler.advance(now)
        if seed == 5:
            machine.scheduler.retain(prompt, retention_s=seconds, pinned=pinned)
        if seed == 4:
            machine.scheduler.release(prompt)
    plans = _scheduler.replay(machine.scheduler.events())
    assert len(plans) == len(machine.device.plans)
    for again, plan in zip(plans, machine.device.plans, strict=True):
        assert np.array_equal(again, plan)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.full)])
def test_two_tenants_share_no_page(count: int) -> None:
    """Equal prompts under different salts, side by side and one after the other."""
    machine = Machine(num_pages=64, max_num_seqs=2)
    scheduler, device = machine.scheduler, machine.device
    dice = np.random.default_rng(7)
    num_shared = 0
    for pair in range(count):
        length = int(dice.integers(1, 30))
        prompt = dice.integers(0, 3 if pair % 2 else 1000, length, dtype=np.int32)
        salts = (b"tenant %d" % pair, b"another %d" % pair)
        one, other = 2 * pair, 2 * pair + 1
        together = pair % 2 == 0
        scheduler.submit(one, prompt, max_tokens=2, salt=salts[0])
        if not together:
            device.run()
            assert scheduler.match_prefix(np.append(prompt, np.int32(0)), salts[0]) == (
                length // PAGE * PAGE
            )
        scheduler.submit(other, prompt, max_tokens=2, salt=salts[1])
        device.run()
        assert device.num_cached[other] == 0
        assert device.receipts[other][0] in (_scheduler.MISS_NEVER_CACHED, _scheduler.MISS_NONE)
        kept = device.pages_of[one][: None if together else length // PAGE]
        num_shared += len({*kept} & {*device.pages_of[other]})
        scheduler.flush_cache()
    assert num_shared == 0
