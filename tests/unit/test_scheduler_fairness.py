# SPDX-License-Identifier: MIT
"""Whose request is next, through the binding: shares in tokens, order of arrival, no starvation."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.unit.fake_device import FakeDevice
from tokenspeed import _scheduler

Prompt = NDArray[np.int32]


def make(**options: int) -> tuple[_scheduler.Scheduler, FakeDevice]:
    defaults = {"num_pages": 64, "page_size": 4, "max_num_seqs": 1}
    defaults |= {"max_num_batched_tokens": 64, "max_model_len": 200}
    scheduler = _scheduler.Scheduler(**(defaults | options))  # type: ignore[arg-type]
    return scheduler, FakeDevice(scheduler, 0)


def prompt(length: int, seed: int) -> Prompt:
    return np.random.default_rng(seed).integers(0, 1000, length, dtype=np.int32)


def served(device: FakeDevice) -> list[int]:
    """Requests in the order in which they first ran."""
    return sorted(device.first_row, key=lambda request: device.first_row[request])


def test_a_user_with_many_requests_does_not_keep_another_waiting() -> None:
    scheduler, device = make()
    for i in range(20):
        scheduler.submit(i, prompt(20, i), max_tokens=3, user=1)
    for i in range(20, 23):
        scheduler.submit(i, prompt(20, i), max_tokens=3, user=2)
    device.run()
    assert served(device)[:7] == [0, 20, 1, 21, 2, 22, 3]
    assert served(device)[7:] == list(range(4, 20))


@pytest.mark.parametrize("user", [0, 1, 2**64 - 1])
def test_one_user_alone_is_served_in_order_of_arrival(user: int) -> None:
    scheduler, device = make(max_num_seqs=2, num_pages=20)
    for i in range(30):
        scheduler.submit(i, prompt(1 + i * 7 % 30, i), max_tokens=1 + i % 5, user=user)
        if i % 4 == 0:
            device.step()
    device.run()
    assert served(device) == list(range(30))


def test_what_is_cached_costs_nothing_and_output_counts() -> None:
    scheduler, device = make()
    shared = prompt(100, 1)
    scheduler.submit(0, shared, max_tokens=1)
    device.run()
    for i in range(1, 7):  # a page and a token to compute
        scheduler.submit(i, np.append(shared, prompt(1, i)), max_tokens=1, user=1)
    for i in range(7, 13):
        scheduler.submit(i, prompt(2, i), max_tokens=40, user=2)
    device.run()
    assert served(device)[1:4] == [1, 7, 2]
    assert served(device)[4:9] == [3, 4, 5, 6, 8]  # 42 tokens are more than six times 2


def test_who_comes_back_has_saved_nothing_up() -> None:
    scheduler, device = make()
    scheduler.submit(0, prompt(20, 0), max_tokens=2, user=1)
    device.run()
    for i in range(1, 30):
        scheduler.submit(i, prompt(20, i), max_tokens=2, user=2)
    for _ in range(20):
        device.step()
    behind = len(device.first_row)
    for i in range(30, 40):
        scheduler.submit(i, prompt(20, i), max_tokens=2, user=1)
    device.run()
    turns = [request >= 30 for request in served(device)[behind:]]
    assert 9 <= sum(turns[:20]) <= 11


def test_nobody_is_passed_for_ever() -> None:
    """New users keep coming, each with less to its name than the one who waits."""
    scheduler, device = make()
    scheduler.submit(0, prompt(150, 0), max_tokens=20, user=1)
    scheduler.submit(1, prompt(20, 1), max_tokens=1, user=1)
    for i in range(2, 300):
        scheduler.submit(i, prompt(2, i), max_tokens=1, user=i)
        device.step()
        if 1 in device.first_row:
            break
    assert 60 <= len(device.first_row) <= 67
    device.run()


def test_a_retracted_request_comes_before_other_users() -> None:
    scheduler, device = make(num_pages=8, max_num_seqs=2, enable_prefix_caching=False)
    for i, user in ((0, 1), (1, 2)):
        scheduler.submit(i, prompt(8, i), max_tokens=20, user=user)
    device.step()
    device.step()
    for i in range(2, 8):  # of users to whom nothing has been given yet
        scheduler.submit(i, prompt(4, i), max_tokens=2, user=10 + i)
    while 0 not in device.finish:
        assert served(device) == [0, 1]
        device.step()
    assert scheduler.stats().num_preemptions > 0
    device.step()
    assert device.bound[device.rows[-2].slot] == 1 or device.bound[device.rows[-1].slot] == 1
    device.run()


def test_a_prompt_that_waits_for_its_twin_lets_another_user_pass() -> None:
    scheduler, device = make(max_num_seqs=4, max_num_batched_tokens=8)
    scheduler.submit(0, prompt(60, 0), max_tokens=2, user=1)
    device.step()
    for i in range(1, 12):  # they all wait for the pages of request 0
        scheduler.submit(i, prompt(60, 0), max_tokens=2, user=1)
    scheduler.submit(12, prompt(4, 5), max_tokens=2, user=2)
    for _ in range(3):
        device.step()
    assert served(device) == [0, 12]
    device.run()
    assert sum(device.num_cached[i] == 56 for i in range(1, 12)) == 11


def test_aborting_a_waiting_request_forgets_its_user() -> None:
    scheduler, device = make()
    for i in range(10):
        scheduler.submit(i, prompt(20, i), max_tokens=2, user=i % 3)
    for i in range(0, 10, 2):
        assert scheduler.abort(i)
        scheduler.check_invariants()
    device.run()
    assert sorted(device.first_row) == [1, 3, 5, 7, 9]
