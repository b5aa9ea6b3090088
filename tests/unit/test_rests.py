# SPDX-License-Identifier: MIT
"""Who rests, naps and is tried rarely: `Speculator` where drafts do not pay."""

import itertools

import pytest

from tests.speculating import PROMPT, Harness, Oracle, adaptive, plan, run
from tokenspeed.engine.depths import Depths
from tokenspeed.engine.hearing import NAP, Hearing
from tokenspeed.engine.ledger import Ledger
from tokenspeed.engine.speculator import LONGEST_REST, Weighted
from tokenspeed.engine.step_times import Experts, StepTimes
from tokenspeed.engine.worth import KINDS
from tokenspeed.execution.plan_view import (
    ROW_PREFILL,
    ROW_SAMPLE,
)


def test_a_request_rests_where_drafts_do_not_pay() -> None:
    drafter = Oracle()
    h = adaptive(drafter)
    h.start(1)
    run(h, drafter, 80, right=False, per_draft=0.004)
    before = drafter.num_asked
    depths = run(h, drafter, 320, right=False, per_draft=0.004)
    assert sum(map(bool, depths)) <= 2
    assert drafter.num_asked - before <= 14  # once in LONGEST_REST steps, and what was tried
    assert drafter.seen[1][5:8] == [10, 100, 101]  # what came is told all the same


def test_rests_end_together() -> None:
    hearing, ends = Hearing([], None, never_naps=False), list[int]()
    for step in (1, 5, 37, 90):
        hearing._num_steps = step
        hearing.rest(step, 0, 64)
        ends.append(hearing._resting[step][1])
    assert ends == [96, 96, 128, 160]
    hearing.rest(1, 0, 2)
    assert hearing._resting[1][1] == 92


def test_rests_are_as_long_as_they_should_be() -> None:
    """The longest ones, beside a request that waits for its first row all the time."""
    drafter, dozed = Oracle(), 0
    h = adaptive(drafter)
    h.start(1)
    run(h, drafter, 600, right=False, per_draft=0.004)
    h.it.add(2, PROMPT, b"")
    asked = []
    for step in range(1000):
        before = drafter.num_asked
        run(h, drafter, 1, right=False, per_draft=0.004)
        dozed += h.dozed
        asked += [step] * (drafter.num_asked - before)
    assert dozed > 900
    assert len(asked) > 5
    gaps = {b - a for a, b in itertools.pairwise(asked)}
    assert gaps - {1} == {LONGEST_REST}  # what was tried once more is looked at again at once


def test_who_comes_next_rests_from_the_beginning() -> None:
    drafter = Oracle()
    h = adaptive(drafter)
    h.start(1)
    run(h, drafter, 400, right=False, per_draft=0.004)
    h.it.remove(1)
    h.start(2)
    drafter.next[2], num_asked = [7] * 8, drafter.num_asked
    for token in range(NAP):
        assert not h.prepared()
        h.launch(r2=(0, 0))
        h.land(0.01, r2=[token])
    assert drafter.num_asked == num_asked


def test_who_is_not_looked_at_rests() -> None:
    """Matches of this length hardly ever give a draft worth while: nobody stays up for them."""
    drafter, dozed = Oracle(), 0
    h = adaptive(drafter)
    h.start(1)
    h.it._worth._patience = [0] * KINDS
    for _ in range(400):
        run(h, drafter, 1, right=False, per_draft=0.004)
        dozed += h.dozed
    assert dozed > 300


def test_a_long_match_ends_a_rest_when_it_is_heard() -> None:
    drafter = Oracle()
    h = adaptive(drafter)
    h.start(1)
    run(h, drafter, 200, right=False, per_draft=0.004)
    drafter.match_len = 32
    assert 0 not in run(h, drafter, NAP + 12, right=True, per_draft=0.0001)[NAP:]


def test_a_rest_teaches_nothing() -> None:
    """What was found before it is not held against what comes after it."""
    drafter = Oracle()
    h = adaptive(drafter)
    h.start(1)
    run(h, drafter, 200, right=False, per_draft=0.004)
    depths, missed = h.it._depths, list[bool]()
    assert depths is not None
    learn = depths.learn

    def learning() -> None:
        missed.extend(depths.findings.missed)
        learn()

    depths.learn = learning  # type: ignore[method-assign]
    for token in range(100, 9000):
        drafter.next[1] = [token] * 8
        h.prepared()
        h.launch(r1=(0, 0))
        h.land(0.01, r1=[token])
    assert len(missed) > 100
    assert not any(missed[1:])  # the first is from before


def test_every_row_of_a_step_counts_with_its_depth() -> None:
    drafter = Oracle()
    h = adaptive(drafter)
    h.start(1)
    run(h, drafter, 500, right=False, per_draft=0.004)
    h.it.remove(1)
    assert sum(h.it.stats().depths) == 501  # the first one too


def test_what_is_new_while_all_nap_is_forgotten_with_its_request() -> None:
    ledger = Ledger()
    ledger.naps = lambda: True  # type: ignore[method-assign]
    depths = Depths(1, 100, StepTimes(Experts()))
    h = Harness(weighted=Weighted("mtp", 4), depths=depths, ledger=ledger)
    for request_id in range(1, 50):
        h.start(request_id)
        h.it.remove(request_id)
    assert not h.it._fresh


@pytest.mark.parametrize("every", [1, 3, 6, 20, 31])
def test_who_arrives_ends_no_measurement_and_no_debt(every: int) -> None:
    """Steps with prefill come in between; drafts are always right."""
    drafter = Oracle()
    depths = Depths(1, 1000, StepTimes(Experts()))
    h = Harness(drafter, depth=8, depths=depths, ledger=Ledger())
    h.start(1)
    ledger = h.it._hearing._ledger
    assert ledger is not None
    ledger._balance_s, ledger._plain_s[1] = -0.01, 0.01
    asked = 0
    for step in range(4000):
        drafter.next[1] = [100 + step] * 8
        asked += bool(h.prepared())
        if step % every == 0:
            rows = [(1, ROW_SAMPLE, 0, 0), (2, ROW_PREFILL, 0, 0)]
            made = plan(rows, {2: 1})
            h.dozed = h.it.dozes([made], h.now - 100)
            assert not h.dozed
            h.it.launched([made])
            h.times.launched([made], h.now)  # type: ignore[union-attr]
        else:
            h.launch(r1=(0, 0))
        h.land(0.01, r1=[100 + step])
    assert asked > 100


def test_weights_that_do_not_pay_are_tried_rarely() -> None:
    depths = Depths(1, 1000, StepTimes(Experts()))
    h = Harness(weighted=Weighted("mtp", 4), depths=depths)
    for _ in range(200):
        depths.findings.add(0, 0, 0, 0)
        depths.findings.missed.append(True)
    depths.learn()
    asked = 0
    for request_id in range(1, 200):
        h.start(request_id)
        asked += sum(n > 0 for _, _, n in h.prepared())
        tries = h.it._live[request_id].tries_weights
        h.it.remove(request_id)
        assert tries or request_id > 10
        if request_id > 64:
            assert tries == (request_id % 32 == 0)
    assert asked <= 10
