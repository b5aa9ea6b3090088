# SPDX-License-Identifier: MIT
"""Drafts in plans: what fits, what is kept of them, and who waits. Exact plans, no fake model."""

import numpy as np
import pytest

from tokenspeed import _scheduler
from tokenspeed.execution.plan_view import ROW_PREFILL, ROW_SAMPLE, PlanView, Words

PROMPT = np.arange(5, dtype=np.int32)


def make(**options: int | bool | bytes) -> _scheduler.Scheduler:
    defaults = {
        "num_pages": 64,
        "page_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 200,
        "hash_key": bytes(16),
        "record_events": True,
    }
    return _scheduler.Scheduler(**(defaults | options))  # type: ignore[arg-type]


def ids(*tokens: int) -> Words:
    return np.array(tokens, np.int32)


def planned(scheduler: _scheduler.Scheduler) -> PlanView:
    words = scheduler.next_plan()
    assert words is not None
    scheduler.check_invariants()
    return PlanView(words)


def commit(
    scheduler: _scheduler.Scheduler, plan: PlanView, *accepted: list[int], failed: bool = False
) -> _scheduler.Updates:
    words = plan.result(
        ids(*(token for row in accepted for token in row)),
        np.array([len(row) for row in accepted]),
        np.full(plan.num_rows, failed),
    )
    updates = scheduler.commit(words)
    scheduler.check_invariants()
    return updates


def decoding(scheduler: _scheduler.Scheduler, **options: object) -> None:
    """Request 1 has the prompt 0..4 and has sampled 5."""
    scheduler.submit(1, PROMPT, **({"max_tokens": 20} | options))  # type: ignore[arg-type]
    commit(scheduler, planned(scheduler), [5])


def rows(plan: PlanView) -> list[tuple[int, int, int, int]]:
    """start, num_tokens, num_draft, num_propose of each row."""
    columns = (plan.starts, plan.num_tokens, plan.num_draft, plan.num_propose)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("mode", [{}, {"overlap_depth": 1}, {"num_micro_steps": 2}])
@pytest.mark.parametrize("accepted", [[9], [6, 9], [6, 7, 9], [6, 7, 8, 9]])
def test_the_next_row_goes_on_behind_what_was_accepted(
    accepted: list[int], mode: dict[str, int]
) -> None:
    scheduler = make(**mode)
    decoding(scheduler)
    assert scheduler.speculate(1, ids(6, 7, 8), 2)
    plan = planned(scheduler)
    assert (rows(plan), plan.tokens.tolist()) == ([(5, 4, 3, 2)], [5, 6, 7, 8])
    assert plan.flags.tolist() == [ROW_SAMPLE]
    if mode:
        assert scheduler.next_plan() is None  # in no other step until that commits
    updates = commit(scheduler, plan, accepted)
    assert (updates.ids.tolist(), updates.num_ids.tolist()) == (accepted, [len(accepted)])
    plan = planned(scheduler)  # planning has used up the draft
    assert (rows(plan), plan.tokens.tolist()) == ([(5 + len(accepted), 1, 0, 0)], [9])
    commit(scheduler, plan, [10])
    again = [PlanView(words) for words in _scheduler.replay(scheduler.events())]
    assert [rows(view) for view in again[1:]] == [[(5, 4, 3, 2)], rows(plan)]


def test_only_settled_pages_are_found() -> None:
    """Positions 5 to 8 are computed; the page of 4 to 7 ends with a rejected draft, 7 was not
    computed for the token that was sampled instead."""
    for accepted, cached in (([6, 7, 50], 8), ([6, 50], 4)):
        scheduler = make()
        decoding(scheduler)
        scheduler.speculate(1, ids(6, 7, 8))
        commit(scheduler, planned(scheduler), accepted)
        sequence = ids(*range(6), *accepted, 0, 0, 0, 0)
        assert scheduler.match_prefix(sequence) == cached
        assert scheduler.match_prefix(ids(*range(9), 0, 0)) == cached


@pytest.mark.parametrize(
    ("options", "accepted", "heard", "finish"),
    [
        ({"stop_ids": ids(7)}, [6, 7, 8, 9], [6, 7], _scheduler.FINISH_STOP),
        ({"stop_ids": ids(6), "min_tokens": 3}, [6, 7, 8, 9], [6, 7, 8, 9], 0),
        ({"stop_ids": ids(9)}, [6, 7, 8, 9], [6, 7, 8, 9], _scheduler.FINISH_STOP),
        ({"max_tokens": 5}, [6, 7, 8, 9], [6, 7, 8, 9], _scheduler.FINISH_LENGTH),
    ],
)
def test_ids_are_taken_one_by_one(
    options: dict[str, object], accepted: list[int], heard: list[int], finish: int
) -> None:
    scheduler = make()
    decoding(scheduler, **options)
    scheduler.speculate(1, ids(6, 7, 8))
    updates = commit(scheduler, planned(scheduler), accepted)
    assert (updates.ids.tolist(), updates.finish.tolist()) == (heard, [finish])
    assert scheduler.has_work() == (finish == 0)


@pytest.mark.parametrize(("max_tokens", "count", "propose"), [(2, 0, 0), (3, 1, 0), (4, 2, 1)])
def test_a_draft_ends_before_the_limit(max_tokens: int, count: int, propose: int) -> None:
    scheduler = make()
    decoding(scheduler, max_tokens=max_tokens)
    scheduler.speculate(1, ids(6, 7, 8), 3)
    assert rows(planned(scheduler)) == [(5, 1 + count, count, propose)]


def test_drafts_take_what_decoding_leaves_and_prompts_get_half() -> None:
    scheduler = make(max_num_batched_tokens=8)
    for request in (1, 2):
        scheduler.submit(request, ids(request), max_tokens=20)
    commit(scheduler, planned(scheduler), [5], [5])
    for request in (1, 2):
        scheduler.speculate(request, ids(6, 7, 8, 9, 10))
    plan = planned(scheduler)
    assert rows(plan) == [(1, 6, 5, 0), (1, 2, 1, 0)]
    commit(scheduler, plan, [9], [9])
    scheduler.submit(3, PROMPT, max_tokens=20)
    for request in (1, 2):
        scheduler.speculate(request, ids(6, 7, 8, 9, 10))
    plan = planned(scheduler)
    assert rows(plan) == [(2, 4, 3, 0), (2, 1, 0, 0), (0, 3, 0, 0)]
    assert plan.flags.tolist() == [ROW_SAMPLE, ROW_SAMPLE, ROW_PREFILL]


def test_drafts_leave_a_page_for_each_running_request() -> None:
    """Seven pages of 1: two requests hold two each, their next tokens may need two more."""
    scheduler = make(page_size=1, num_pages=7)
    for request in (1, 2):
        scheduler.submit(request, ids(request), max_tokens=5)
    commit(scheduler, planned(scheduler), [5], [5])
    for request in (1, 2):
        scheduler.speculate(request, ids(6, 7, 8))
    assert rows(planned(scheduler)) == [(1, 2, 1, 0), (1, 1, 0, 0)]


def test_pages_of_rejected_drafts_go_back_before_anybody_is_retracted() -> None:
    scheduler = make(page_size=1, num_pages=12)
    for request in (1, 2, 3):
        scheduler.submit(request, ids(request), max_tokens=7)
    commit(scheduler, planned(scheduler), [5], [5], [5])
    scheduler.speculate(2, ids(6, 7, 8))
    plan = planned(scheduler)
    assert rows(plan) == [(1, 1, 0, 0), (1, 4, 3, 0), (1, 1, 0, 0)]
    for start, free in ((2, 3), (3, 1), (4, 0)):
        assert scheduler.stats().num_free_pages == free
        commit(scheduler, plan, [9], [9], [9])
        plan = planned(scheduler)
        if start < 4:
            assert rows(plan) == [(start, 1, 0, 0)] * 3
    # The third took the page of position 4 from the second, which needed it one step later.
    assert (rows(plan), scheduler.stats().num_preemptions) == ([(4, 1, 0, 0)] * 2, 1)


def test_a_prompts_last_row_only_proposes() -> None:
    scheduler = make(max_num_batched_tokens=4, overlap_depth=1)
    scheduler.submit(1, PROMPT, max_tokens=20)
    scheduler.speculate(1, ids(5, 6), 3)
    assert rows(planned(scheduler)) == [(0, 4, 0, 0)]
    assert rows(planned(scheduler)) == [(4, 1, 0, 3)]


def test_a_draft_that_waits_follows_what_is_accepted_meanwhile() -> None:
    scheduler = make(overlap_depth=1)
    decoding(scheduler)
    plan = planned(scheduler)
    scheduler.speculate(1, ids(6, 7, 8))
    assert scheduler.next_plan() is None  # its last token must be known first
    commit(scheduler, plan, [6])
    plan = planned(scheduler)
    assert (rows(plan), plan.tokens.tolist()) == ([(6, 3, 2, 0)], [6, 7, 8])
    scheduler.speculate(1, ids(7, 8, 40))
    commit(scheduler, plan, [7, 8, 41])
    assert rows(planned(scheduler)) == [(9, 1, 0, 0)]  # 41 is not what was guessed


def test_abort_and_failure_with_a_verifying_step_in_flight() -> None:
    for aborted in (True, False):
        scheduler = make()
        decoding(scheduler)
        scheduler.speculate(1, ids(6, 7, 8))
        plan = planned(scheduler)
        if aborted:
            assert scheduler.abort(1)
            assert not scheduler.speculate(1, ids(6))
        updates = commit(scheduler, plan, [] if not aborted else [6, 7, 9], failed=not aborted)
        assert updates.finish.tolist() == ([] if aborted else [_scheduler.FINISH_ERROR])
        assert not scheduler.has_work()
        stats = scheduler.stats()
        assert stats.num_free_pages + stats.num_cached_pages == 64
        assert scheduler.match_prefix(ids(*range(9), 0)) == (4 if aborted else 0)


@pytest.mark.parametrize("bad", [[], [6, 8, 9], [7, 9], [6, 7, 8, 9, 9], [6, -1]])
def test_results_that_no_verification_gives_are_refused(bad: list[int]) -> None:
    scheduler = make()
    decoding(scheduler)
    scheduler.speculate(1, ids(6, 7, 8))
    plan = planned(scheduler)
    with pytest.raises(ValueError, match="commit"):
        commit(scheduler, plan, bad)
    commit(scheduler, plan, [6, 7, 8, 9])


def test_the_last_call_counts_and_retraction_clears() -> None:
    scheduler = make()
    decoding(scheduler)
    scheduler.speculate(1, ids(6, 7, 8), 2)
    scheduler.speculate(1, ids())
    assert rows(planned(scheduler)) == [(5, 1, 0, 0)]
    assert not scheduler.speculate(2, ids(6))
