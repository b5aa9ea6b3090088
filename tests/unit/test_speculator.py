# SPDX-License-Identifier: MIT
"""`Speculator` over drafters that are told what to say, and plans made by hand."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.fake_model import FakeModel
from tests.speculating import PROMPT, Harness, Oracle, adaptive, plan, run
from tokenspeed.config import EngineConfig
from tokenspeed.engine.build import assemble
from tokenspeed.engine.depths import Depths, Offers
from tokenspeed.engine.draft_counts import DraftCounts, num_accepted
from tokenspeed.engine.engine import Engine
from tokenspeed.engine.messages import DrafterStats, GenerateRequest
from tokenspeed.engine.part import assemble_part
from tokenspeed.engine.speculator import Weighted
from tokenspeed.engine.step_times import PLAIN_INTERVAL, Experts, StepTimes, features_of
from tokenspeed.execution.plan_view import (
    ROW_PREFILL,
    ROW_SAMPLE,
)
from tokenspeed.execution.sampling_params import SamplingParams


def test_a_draft_is_verified_counted_and_told_to_the_drafters() -> None:
    first, second = Oracle("first"), Oracle("second")
    h = Harness(first, second)
    h.start(1, 2)
    first.next[1], second.next[1], second.next[2] = [11, 12, 13, 14, 15], [99], [21]
    assert h.prepared() == [(1, [11, 12, 13, 14], 0), (2, [21], 0)]
    h.launch(r1=(3, 0), r2=(1, 0))  # the planner shortened one
    h.land(0.01, r1=[11, 12, 7], r2=[5])
    assert first.seen == second.seen == {1: [*range(5), 10, 11, 12, 7], 2: [*range(5), 10, 5]}
    assert (h.it.drafted(1), h.it.drafted(2)) == ((3, 2), (1, 0))
    assert h.it.stats().drafters == [
        DrafterStats("first", 1, 3, 2, [1, 1, 0]),
        DrafterStats("second", 1, 1, 0, [0]),
    ]
    assert h.it.stats().depths == [0, 1, 0, 0, 1]


def test_nothing_found_is_nothing_told() -> None:
    drafter = Oracle()
    h = Harness(drafter)
    h.start(1)
    assert h.prepared() == []
    h.launch(r1=(0, 0))
    assert h.prepared() == []
    h.land(0.01, r1=[3])
    assert drafter.num_asked == 1  # only when there are new ids
    assert h.prepared() == []
    assert h.it.stats().depths == [2, 0, 0, 0, 0]


def test_a_request_that_ended_is_forgotten() -> None:
    drafter = Oracle()
    h = Harness(drafter)
    h.start(1, 2)
    drafter.next = {1: [11], 2: [11]}
    h.it.remove(1)
    assert h.prepared() == [(2, [11], 0)]
    assert set(drafter.seen) == {2}
    h.it.remove(2)
    assert not h.it._live


def test_salts_reach_the_drafters() -> None:
    drafter = Oracle()
    Harness(drafter).it.add(1, PROMPT, b"tenant")
    assert drafter.salts == {1: b"tenant"}


def test_a_stop_id_amid_a_draft_counts_what_came() -> None:
    drafter = Oracle()
    h = Harness(drafter)
    h.start(1)
    drafter.next[1] = [11, 12, 13]
    h.prepared()
    h.launch(r1=(3, 0))
    h.extend(1, [11, 12])  # 12 is the end: what was accepted behind it was dropped
    assert h.it.drafted(1) == (3, 2)


def test_a_guess_that_the_planner_cut_off_is_not_counted() -> None:
    drafter = Oracle()
    h = Harness(drafter)
    h.start(1)
    drafter.next[1] = [11, 12, 13, 14]
    h.prepared()
    h.launch(r1=(2, 0))
    h.extend(1, [11, 12, 13])
    assert h.it.drafted(1) == (2, 2)


def test_weights_propose_for_the_step_after() -> None:
    h = Harness(weighted=Weighted("mtp", 2))
    h.it.add(1, PROMPT, b"")
    assert h.prepared() == [(1, [], 2)]  # with the last piece of the prompt
    h.launch(r1=(0, 2))
    assert h.prepared() == []
    h.extend(1, [10], [11, 12])
    h.it.committed()
    assert h.prepared() == [(1, [11, 12], 2)]
    h.launch(r1=(2, 2))
    h.extend(1, [11, 3], [4])
    h.it.committed()
    assert h.prepared() == [(1, [4], 2)]
    assert h.it.stats().drafters == [DrafterStats("mtp", 1, 2, 1, [1, 0])]


def test_weights_rest_while_tokens_are_enough() -> None:
    drafter = Oracle()
    h = Harness(drafter, weighted=Weighted("mtp", 8))
    h.start(1)
    assert h.prepared() == [(1, [], 4)]
    h.launch(r1=(0, 4))
    drafter.next[1] = [11, 12]
    h.extend(1, [5], [6, 7])
    h.it.committed()
    assert h.prepared() == [(1, [11, 12], 0)]


def test_ids_on_their_way_are_guessed_first() -> None:
    drafter = Oracle()
    h = Harness(drafter, ahead=True)
    h.start(1)
    h.launch(r1=(0, 0))  # its id has not come when the next step is planned
    drafter.next[1] = [11, 12, 13, 14, 15, 16]
    assert h.prepared() == [(1, [12, 13, 14, 15], 0)]
    h.launch(r1=(4, 0))
    h.land(0.01, r1=[11])
    assert h.prepared() == []  # it is in no other step now
    h.land(0.01, r1=[12, 13, 7])
    assert h.it.drafted(1) == (4, 2)
    drafter.next[1] = [8]
    assert h.prepared() == [(1, [8], 0)]


def test_a_draft_that_no_step_took_is_replaced() -> None:
    drafter = Oracle()
    h = Harness(drafter, ahead=True)
    h.start(1)
    h.launch(r1=(0, 0))
    drafter.next[1] = [11, 12]
    assert h.prepared() == [(1, [12], 0)]
    h.launch()  # there was no room
    h.land(0.01, r1=[5])
    drafter.next[1] = []
    assert h.prepared() == [(1, [], 0)]


def test_a_slot_given_anew_is_not_the_old_request() -> None:
    drafter = Oracle()
    h = Harness(drafter)
    h.start(1, 2)
    drafter.next = {1: [11], 2: [11]}
    h.prepared()
    h.it.launched([plan([(1, ROW_SAMPLE, 1, 0)])])
    h.it.committed()  # 1 was retracted: nothing of it came
    h.it.launched([plan([(2, ROW_SAMPLE, 1, 0), (1, ROW_PREFILL, 0, 0)], {2: 1, 1: 2})])
    h.extend(1, [11, 5])
    h.it.committed()
    assert (h.it.drafted(1), h.it.drafted(2)) == ((1, 1), (0, 0))


def test_a_draft_that_was_lost_in_flight_holds_nothing_up() -> None:
    drafter = Oracle()
    h = Harness(drafter)
    h.start(1)
    drafter.next[1] = [11]
    h.prepared()
    h.launch(r1=(1, 0))
    h.land(0.01)  # it was retracted
    h.it.launched([plan([(1, ROW_SAMPLE, 0, 0)], {1: 1})])
    h.land(0.01, r1=[11])
    assert h.prepared() == [(1, [11], 0)]


def test_depths_follow_what_is_accepted() -> None:
    drafter = Oracle()
    h = adaptive(drafter)
    h.start(1)
    assert run(h, drafter, 60, right=True, per_draft=0.004)[-20:] == [8] * 20
    poor = run(h, drafter, 60, right=False, per_draft=0.004)[-20:]
    assert sum(depth > 0 for depth in poor) <= 2
    assert h.times is not None
    stats = h.times.stats()
    assert 90 <= stats.num_steps <= 121  # some are slept through
    assert stats.predicted_s == pytest.approx(stats.measured_s, rel=0.2)
    assert stats.error < 0.1


def test_what_no_step_carried_is_learnt_from() -> None:
    """A draft that would have been right is deep at once, though none was verified for long."""
    drafter = Oracle()
    h = adaptive(drafter)
    h.start(1)
    run(h, drafter, 80, right=False, per_draft=0.004)
    acceptance = h.it._depths._acceptance  # type: ignore[union-attr]
    before = acceptance.rate(1, 0, 4, 0)
    assert before < 0.2
    for token in range(100, 4900):  # it rests for most of them
        drafter.next[1] = [token] * 8
        h.prepared()
        h.launch(r1=(0, 0))
        h.land(0.01, r1=[token])
    assert acceptance.rate(1, 0, 4, 0) > 0.8


def test_weights_that_are_right_are_preferred_to_tokens_that_are_not() -> None:
    drafter = Oracle()
    h = adaptive(drafter, weighted=Weighted("mtp", 3))
    h.start(1)
    proposed: list[int] = []
    calls: list[tuple[int, list[int], int]] = []
    for token in range(100, 500, 5):
        drafter.next[1] = [7] * 8
        calls += h.prepared()
        _, draft, num_propose = calls[-1]
        accepted = num_accepted(draft, proposed)
        h.launch(r1=(len(draft), num_propose))
        given = [*proposed[:accepted], token]
        proposed = [token + 1, token + 2, token + 3][:num_propose]
        h.extend(1, given, proposed)
        h.now += 0.01 + 0.0001 * (len(draft) + num_propose)
        h.it.committed()
    assert [(len(draft), n) for _, draft, n in calls[-10:]] == [(3, 3)] * 10


def test_features_are_what_the_plan_says() -> None:
    made = plan([(1, ROW_SAMPLE, 2, 3), (2, ROW_SAMPLE, 0, 0), (3, ROW_PREFILL, 0, 0)], {1: 1})
    found = features_of([made], Experts(8, 2))
    touched = 8 * (1 - (1 - 2 / 8) ** 5)  # of five tokens
    expected = [1, 2, 2, 1, (3 * 5 + 3 + 1 + 1) / 1000, touched, 3, 1, 3, 1, 1 * (5 + 0.5) / 1e6]
    assert found.tolist() == pytest.approx(expected)


def test_steps_that_only_decode_are_learnt_from_now_and_then() -> None:
    depths = Depths(1, 100, StepTimes(Experts()))
    h = Harness(Oracle(), depths=depths)
    h.start(1)
    for _ in range(255 + 10 * PLAIN_INTERVAL):
        h.launch(r1=(0, 0))
        h.land(0.01, r1=[3])
    assert depths.times.stats().num_steps == 256 + 10


def test_a_step_in_which_something_was_captured_is_not_learnt_from() -> None:
    times, made = StepTimes(Experts()), plan([(1, ROW_SAMPLE, 0, 0)], {1: 1})
    for now_s, is_typical in ((5.0, False), (6.0, True)):
        times.launched([made], now_s)
        times.committed(now_s + 0.5, is_typical=is_typical)
    assert (times.num_steps, times.model.num_observed) == (1, 1)


def test_depths_leave_others_their_floors() -> None:
    """Eight drafts of 4 ms make a step of 42 ms; the others need one in 20."""
    asked: list[list[int]] = []

    def least_rates(request_ids: NDArray[np.uint64]) -> tuple[NDArray[np.float64], float]:
        asked.append(request_ids.tolist())
        return np.zeros(len(request_ids)), 1 / 0.02

    drafter = Oracle()
    depths = Depths(1, 1000, StepTimes(Experts()), least_rates)
    h = Harness(drafter, depth=8, depths=depths)
    h.start(1)
    found = run(h, drafter, 60, right=True, per_draft=0.004)
    assert set(found[-20:]) <= {2, 3}  # as far as step times are known
    assert asked[-1] == [1]


def least_rates_of(engine: Engine) -> Any:
    return engine._speculator._depths._least_rates  # type: ignore[union-attr]


def test_an_engine_asks_its_pacing_for_floors() -> None:
    def engine_of(**options: Any) -> Engine:
        config = EngineConfig.of(
            num_pages=64, page_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128,
            speculative_config='{"method": "ngram", "num_speculative_tokens": 3}', **options,
        )  # fmt: skip
        return assemble(config, assemble_part(config, FakeModel(101)))  # type: ignore[arg-type]

    assert least_rates_of(engine_of()) is None
    assert least_rates_of(engine_of(tps_floor=30.0, overlap_depth=1)) is None
    engine = engine_of(tps_floor=30.0)
    for request_id, floor in ((1, None), (2, 10.0), (3, 0.0)):
        params = SamplingParams(temperature=0.0, max_tokens=40)
        engine.add_request(GenerateRequest(request_id, [5, 6, 7], params, tps_floor=floor))
        for _ in range(3):
            engine.step()
    rates, others = least_rates_of(engine)(np.array([3, 2, 9], np.uint64))
    factor = 1 / 0.9 / 0.95  # lateness that is made up for, and the least share of prompts
    assert rates.tolist() == pytest.approx([0, 10 * factor, 0])
    assert others == pytest.approx(30 * factor)


def test_a_step_has_only_so_many_drafts() -> None:
    depths = Depths(1, 7, StepTimes(Experts()))
    offers = Offers()
    for request_id in range(4):
        offers.have(request_id, 0, 32, 8)
    for _ in range(50):
        for request_id in range(4):
            depths.findings.add(request_id, 0, 32, 8)
            depths.findings.missed.append(False)
        depths.learn()
    assert sum(depths.choose(offers, 4, 100)) == 3


def test_what_is_proposed_already_takes_room() -> None:
    depths = Depths(1, 7, StepTimes(Experts()))
    h = Harness(weighted=Weighted("mtp", 4), depths=depths)
    h.start(1)
    for _ in range(50):
        depths.findings.add(1, 0, 0, 4)
        depths.findings.missed.append(False)
    depths.learn()
    assert h.prepared() == [(1, [], 4)]
    h.launch(r1=(0, 4))
    h.extend(1, [5], [6, 7, 8, 9])
    h.it.committed()
    told = h.prepared()
    assert [(i, len(draft) + num_propose) for i, draft, num_propose in told] == [(1, 6)]


@pytest.mark.parametrize(
    ("draft", "ids", "count"),
    [([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1), ([1, 2, 3], [1, 2], 2), ([], [5], 0)],
)
def test_accepted_are_the_leading_equal_ones(draft: list[int], ids: list[int], count: int) -> None:
    assert num_accepted(draft, ids) == count


def test_counts_by_place() -> None:
    counts = DraftCounts("x")
    for num_draft, accepted in ((3, 3), (3, 1), (1, 0), (2, 2)):
        counts.record(num_draft, accepted)
    assert counts.stats() == DrafterStats("x", 4, 9, 6, [3, 2, 1])
