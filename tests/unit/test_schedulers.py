# SPDX-License-Identifier: MIT
"""Requests divided among the schedulers of several attention data-parallel indices."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenspeed._scheduler import FINISH_NONE, Scheduler
from tokenspeed.engine.schedulers import Schedulers, user_key
from tokenspeed.execution.plan_view import ROW_SAMPLE, PlanView, Words

Prompt = NDArray[np.int32]


def make(count: int, **options: int) -> Schedulers:
    defaults = {"num_pages": 64, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    made = [Scheduler(**(defaults | {"max_model_len": 200} | options)) for _ in range(count)]
    return Schedulers(made)


def prompt(length: int, seed: int = 0) -> Prompt:
    return np.random.default_rng(seed).integers(0, 1000, length, dtype=np.int32)


def result(plan: PlanView) -> Words:
    """Token 1 for every row that samples."""
    counts = plan.flags & ROW_SAMPLE
    return plan.result(np.ones(counts.sum()), counts, np.zeros(plan.num_rows, np.bool_))


class Run:
    """Runs steps, and notes where each request was and what it got."""

    def __init__(self, schedulers: Schedulers) -> None:
        self.schedulers = schedulers
        self.where: dict[int, int] = {}
        self.got: dict[int, int] = {}
        self.cached: dict[int, int] = {}

    def step(self) -> bool:
        plans = self.schedulers.next_plans()
        if plans is None:
            return False
        for index, plan in enumerate(plans):
            if plan is None:
                continue
            updates = self.schedulers.commit(index, result(plan))
            for at, request_id in enumerate(updates.request_ids.tolist()):
                assert self.where.setdefault(request_id, index) == index
                if request_id not in self.got:
                    self.schedulers.started(request_id)
                    self.cached[request_id] = int(updates.num_cached[at])
                self.got[request_id] = self.got.get(request_id, 0) + int(updates.num_ids[at])
                if updates.finish[at] != FINISH_NONE:
                    self.schedulers.forget(request_id)
        return True

    def all(self) -> None:
        while self.step():
            pass
        assert not self.schedulers.has_work()
        self.schedulers.check_invariants()
        assert_nothing_counted(self.schedulers)


def assert_nothing_counted(schedulers: Schedulers) -> None:
    assert schedulers._places == {}
    assert set(schedulers._waiting) == set(schedulers._open) == {0}
    stats = schedulers.stats()
    assert (stats["num_running"], stats["num_waiting"], stats["kv_cache_usage"]) == (0, 0, 0.0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_requests_are_spread_evenly_and_all_end(count: int) -> None:
    run = Run(make(count))
    for i in range(12):
        run.schedulers.submit(i, prompt(20, i), b"", max_tokens=5)
    run.all()
    assert run.got == dict.fromkeys(range(12), 5)
    assert [list(run.where.values()).count(i) for i in range(count)] == [12 // count] * count


def test_a_prompt_goes_where_its_prefix_is() -> None:
    run = Run(make(2))
    for i in range(2):
        run.schedulers.submit(i, prompt(100, i), b"", max_tokens=2)
    run.all()
    for i in (3, 4, 5):
        longer = np.concatenate([prompt(100, i % 2), prompt(8, i)])
        run.schedulers.submit(i, longer, b"", max_tokens=2)
        run.all()
        assert run.where[i] == run.where[i % 2]
        assert run.cached[i] == 100
    other = np.concatenate([prompt(100, 0), prompt(8, 9)])
    run.schedulers.submit(9, other, b"another tenant", max_tokens=2)
    run.all()
    assert run.cached[9] == 0
    assert run.schedulers.stats()["prefix_hits"] == 300


def test_load_outweighs_a_prefix_that_saves_less() -> None:
    run = Run(make(2))
    run.schedulers.submit(0, prompt(40), b"", max_tokens=2)
    run.all()
    for i in range(1, 9):
        run.schedulers.submit(i, np.concatenate([prompt(40), prompt(100, i)]), b"", max_tokens=20)
    run.all()
    assert set(run.where.values()) == {0, 1}


def test_an_abort_in_any_state_leaves_nothing() -> None:
    run = Run(make(2, max_num_seqs=2))
    for i in range(8):
        run.schedulers.submit(i, prompt(30, i), b"", max_tokens=9)
    run.schedulers.abort(0)  # waiting
    run.step()
    in_flight = run.schedulers.next_plans()
    assert in_flight is not None
    run.schedulers.abort(1)  # in a step
    run.schedulers.abort(2)
    for index, plan in enumerate(in_flight):
        if plan is not None:
            updates = run.schedulers.commit(index, result(plan))
            assert not {1, 2} & set(updates.request_ids.tolist())
    for i in range(3, 8):
        run.schedulers.abort(i)
    run.all()


def test_an_id_is_taken_once_whichever_index_has_it() -> None:
    schedulers = make(2)
    for i in range(2):
        schedulers.submit(i, prompt(8, i), b"", max_tokens=2)
    for i in range(2):
        with pytest.raises(ValueError, match=f"request {i}"):
            schedulers.submit(i, prompt(8, 5), b"", max_tokens=2)
    Run(schedulers).all()


def test_a_request_that_is_refused_counts_nowhere() -> None:
    schedulers = make(2)
    with pytest.raises(ValueError, match="empty"):
        schedulers.submit(1, prompt(0), b"", max_tokens=2)
    with pytest.raises(ValueError, match="max_model_len"):
        schedulers.submit(1, prompt(300), b"", max_tokens=2)
    assert_nothing_counted(schedulers)
    assert schedulers.next_plans() is None


def test_prefixes_are_retained_and_released_everywhere() -> None:
    run = Run(make(2))
    run.schedulers.advance(5.0)
    for i in range(2):  # on each index, of the same salt
        run.schedulers.submit(i, prompt(40, i), b"salt", max_tokens=2, retention_s=60.0)
    run.all()
    assert run.schedulers.stats()["num_retained_pages"] == 20
    for i in range(2):
        assert run.schedulers.retain(prompt(40, i), b"salt", retention_s=0.0, pinned=True) == 10
    assert run.schedulers.stats()["num_pinned_pages"] == 20
    assert run.schedulers.release(prompt(40, 0), b"other") == 0
    assert [run.schedulers.release(prompt(40, i), b"salt") for i in range(2)] == [10, 10]
    assert run.schedulers.stats()["num_pinned_pages"] == 0


def test_users_have_keys_of_64_bits() -> None:
    keys = {user_key(user) for user in ("", "a", "b", "a:b", "\udc80", "ä" * 1000)}
    assert len(keys) == 6
    assert user_key("") == 0
    assert user_key("a") == user_key("a") < 2**64


def test_flushing_forgets_everywhere() -> None:
    run = Run(make(2))
    for i in range(2):
        run.schedulers.submit(i, prompt(40, i), b"", max_tokens=2)
    run.all()
    assert run.schedulers.flush_cache() >= 20
    assert [s.match_prefix(prompt(40, i)) for s in run.schedulers._all for i in range(2)] == [0] * 4


def test_equal_indices_take_turns_and_another_salt_finds_no_prefix() -> None:
    run = Run(make(3))
    for i in range(6):
        run.schedulers.submit(i, prompt(60, 0), b"salt %d" % i if i else b"", max_tokens=2)
        run.all()
    assert [run.where[i] for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_drafts_go_where_the_request_is() -> None:
    schedulers = make(2)
    for i in range(2):
        schedulers.submit(i, prompt(5, i), b"", max_tokens=9)
    for index, plan in enumerate(schedulers.next_plans() or []):
        assert plan is not None
        schedulers.commit(index, result(plan))
    assert [schedulers.speculate(i, np.array([1] * (1 + i), np.int32), 2) for i in range(3)] == [
        True,
        True,
        False,
    ]
    plans = [plan for plan in schedulers.next_plans() or [] if plan is not None]
    assert [plan.num_draft.tolist() for plan in plans] == [[1], [2]]
    assert [plan.num_propose.tolist() for plan in plans] == [[2], [2]]
