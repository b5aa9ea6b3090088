# SPDX-License-Identifier: MIT
"""Pacing as Python sees it: exact budgets of a known model, refusals, bad floors at both doors."""

import math
from typing import Any

import numpy as np
import pytest

from tokenspeed._policy import FEATURES, StepTimeModel
from tokenspeed._policy import Pacing as Policy
from tokenspeed._scheduler import Scheduler
from tokenspeed.config import MAX_PRIORITY, MAX_TPS_FLOOR, EngineConfig, PacingOptions
from tokenspeed.engine.messages import GenerateRequest
from tokenspeed.engine.pacing import Pacing, check_terms
from tokenspeed.engine.step_times import Experts, StepTimes
from tokenspeed.errors import RequestError
from tokenspeed.execution.plan_view import PlanView, Words
from tokenspeed.execution.sampling_params import SamplingParams

STEP_S, TOKEN_S = 0.01, 0.001
BANK_S, MARGIN, LEAST_ERROR = 0.08, 2, 0.01 * 1.4826


def known_times() -> StepTimeModel:
    """A step takes STEP_S and TOKEN_S for each token of a prompt, and the model is sure of it."""
    prior = np.zeros(len(FEATURES))
    prior[FEATURES.index("step")], prior[FEATURES.index("prefill_tokens")] = STEP_S, TOKEN_S
    times = StepTimeModel(prior)
    for prefill in [0, 16, 64, 256] * 64:
        x = np.zeros(len(FEATURES))
        x[FEATURES.index("step")], x[FEATURES.index("prefill_tokens")] = 1, prefill
        times.observe(x, STEP_S + TOKEN_S * prefill)
    return times


def scheduler(**options: Any) -> Scheduler:
    sizes = {"num_pages": 1000, "page_size": 16, "max_num_seqs": 8}
    return Scheduler(
        **sizes | options, max_num_batched_tokens=1024, max_model_len=8192, hash_key=b"k" * 16
    )


def commit(made: Scheduler, words: Words) -> None:
    plan = PlanView(words)
    samples = (plan.flags & 1).tolist()
    rows = [w for slot, s in zip(plan.slots.tolist(), samples, strict=True) for w in (slot, 0, s)]
    ids = [7] * sum(samples)
    total = 8 + len(rows) + len(ids)
    head = [
        0x53525354,
        int(words[1]),
        total,
        int(words[3]),
        int(words[4]),
        len(samples),
        len(ids),
        0,
    ]
    made.commit(np.array(head + rows + ids, np.int32))


def prefill_of(words: Words) -> int:
    plan = PlanView(words)
    return int(plan.num_tokens[plan.flags & 4 != 0].sum())


def prompt(length: int, token: int = 1) -> Words:
    return np.full(length, token, np.int32)


def test_a_step_has_what_fits_before_a_token_is_due() -> None:
    policy = Policy(known_times(), tps_floor=18.0, max_num_seqs=8)
    made = scheduler()
    made.pace(policy)
    made.submit(1, prompt(4), max_tokens=4000)
    now_s = 1.0
    for _ in range(100):  # as far ahead as may be
        made.advance(now_s)
        words = made.next_plan()
        assert words is not None
        now_s += STEP_S
        made.advance(now_s)
        commit(made, words)
    ((*stream, ahead_s, runs),) = policy.streams()
    assert (stream, runs) == ([1, 18.0, 100], True)
    assert ahead_s == pytest.approx(BANK_S + 0.05)
    made.submit(2, prompt(4000, 2), max_tokens=5)
    words = made.next_plan()
    assert words is not None
    assert policy.budget_s == pytest.approx(0.13)  # 0.9 / 18 = 0.05 and the bank
    fits = (0.13 / (1 + MARGIN * LEAST_ERROR) - STEP_S) / TOKEN_S  # 116.3
    assert prefill_of(words) == int(fits) // 16 * 16 == 112
    made.check_invariants()


def test_priority_first_then_the_shorter() -> None:
    made = scheduler(max_num_seqs=1)
    made.pace(Policy(known_times(), tps_floor=1.0, max_num_seqs=1))
    made.submit(1, prompt(4), max_tokens=1)
    words = made.next_plan()
    made.submit(2, prompt(900, 2), max_tokens=1)
    made.submit(3, prompt(9, 3), max_tokens=1)
    made.submit(4, prompt(900, 4), max_tokens=1, priority=-10)
    made.submit(5, prompt(9, 5), max_tokens=1, tps_floor=0.0, priority=10)
    order = []
    while words is not None:
        order += PlanView(words).bound_request_ids()
        commit(made, words)
        words = made.next_plan()
    assert order == [1, 4, 3, 2, 5]


def test_waits_are_foretold_and_refused() -> None:
    policy = Policy(known_times(), tps_floor=50.0, max_wait_s=0.5, max_num_seqs=1)
    made = scheduler(max_num_seqs=1)
    made.pace(policy)
    made.submit(1, prompt(4), max_tokens=100)
    assert policy.predicted_wait_s(1) == 0
    assert not policy.hopeless(1)
    words = made.next_plan()
    made.submit(2, prompt(4), max_tokens=1)
    made.submit(3, prompt(4), max_tokens=1, max_wait_s=2.5)
    assert policy.predicted_wait_s(2) == 1  # nothing has ended yet
    assert policy.hopeless(2)
    assert not policy.hopeless(3)
    assert policy.retry_after_s(2) == 1
    made.advance(0.75)
    assert policy.overdue() == [2]
    assert made.abort(2)
    assert policy.overdue() == []
    made.advance(2.0)
    assert words is not None
    commit(made, words)
    assert made.abort(1)  # after 2 seconds
    words = made.next_plan()  # the third
    made.submit(4, prompt(4), max_tokens=1)
    assert policy.predicted_wait_s(4) == 2.0
    assert policy.hopeless(4)
    assert policy.retry_after_s(4) == pytest.approx(2.0 - 0.5 / 1.5)
    made.submit(5, prompt(4), max_tokens=1, max_wait_s=2.9)  # of a wait of 2 or more
    assert policy.hopeless(5)


def test_pace_is_refused_where_it_would_mean_nothing() -> None:
    policy = Policy(StepTimeModel(), tps_floor=1.0, max_num_seqs=8)
    made = scheduler()
    made.submit(1, prompt(4), max_tokens=1)
    with pytest.raises(ValueError, match="requests already"):
        made.pace(policy)
    with pytest.raises(ValueError, match="num_micro_steps"):
        scheduler(num_micro_steps=2).pace(policy)
    with pytest.raises(ValueError, match="log of events"):
        scheduler(record_events=True).pace(policy)
    with pytest.raises(ValueError, match="needs a pacer"):
        made.submit(2, prompt(4), max_tokens=1, tps_floor=5.0)


@pytest.mark.parametrize("floor", [0.0, -1.0, math.nan, math.inf, 1e6])
def test_bad_floors_of_a_server(floor: float) -> None:
    with pytest.raises(ValueError, match="tps_floor"):
        EngineConfig.of(tps_floor=floor)
    with pytest.raises(ValueError, match="tps_floor"):
        Policy(StepTimeModel(), tps_floor=floor, max_num_seqs=1)


def test_the_greatest_floor_is_one_for_config_policy_and_scheduler() -> None:
    most = float(MAX_TPS_FLOOR)
    above, made = math.nextafter(most, math.inf), scheduler()
    assert EngineConfig.of(tps_floor=most).pacing.tps_floor == most
    made.pace(Policy(StepTimeModel(), tps_floor=most, max_num_seqs=8))
    made.submit(1, prompt(4), max_tokens=1, tps_floor=most)
    with pytest.raises(ValueError, match=f"{MAX_TPS_FLOOR}]"):
        EngineConfig.of(tps_floor=above)
    with pytest.raises(ValueError, match=f"{MAX_TPS_FLOOR}]"):
        Policy(StepTimeModel(), tps_floor=above, max_num_seqs=8)
    with pytest.raises(ValueError, match=f"and {MAX_TPS_FLOOR}$"):
        made.submit(2, prompt(4), max_tokens=1, tps_floor=above)


@pytest.mark.parametrize("wait", [-1.0, math.nan, math.inf])
def test_bad_waits_of_a_server(wait: float) -> None:
    with pytest.raises(ValueError, match="max_queue_wait_s"):
        EngineConfig.of(max_queue_wait_s=wait)


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "attention_data_parallel_size"])
def test_pacing_is_for_one_scheduler_and_one_stage(name: str) -> None:
    sizes: dict[str, Any] = {name: 2}
    with pytest.raises(ValueError, match=name):
        EngineConfig.of(tps_floor=10.0, **sizes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("tps_floor", floor) for floor in (-1.0, math.nan, math.inf, 1e6)),
        *(("max_wait_s", wait) for wait in (-1.0, math.nan, math.inf)),
        *(("priority", priority) for priority in (-MAX_PRIORITY - 1, MAX_PRIORITY + 1)),
    ],
)
def test_bad_terms_of_a_request(field: str, value: Any) -> None:
    terms: dict[str, Any] = {field: value}
    request = GenerateRequest(1, [1], SamplingParams(), **terms)
    with pytest.raises(RequestError, match=field) as caught:
        check_terms(request, paced=True)
    assert caught.value.field == field


def test_terms_need_pacing() -> None:
    request = GenerateRequest(1, [1], SamplingParams(), tps_floor=5.0)
    check_terms(request, paced=True)
    with pytest.raises(RequestError, match="--tps-floor"):
        check_terms(request, paced=False)
    check_terms(GenerateRequest(1, [1], SamplingParams(), tps_floor=0.0), paced=False)


def test_refusals_say_when_to_come_back() -> None:
    times = StepTimes(Experts())
    pacing = Pacing(PacingOptions(50.0, 0.5), max_num_seqs=1, times=times)
    made = scheduler(max_num_seqs=1)
    made.pace(pacing.policy)
    made.submit(1, prompt(4), max_tokens=10)
    words = made.next_plan()
    assert words is not None
    times.launched([PlanView(words)], 0.0)
    assert pacing.refusal(1) is None
    assert pacing.overdue() == []
    made.submit(2, prompt(4), max_tokens=10)
    answer = pacing.refusal(2)
    assert answer is not None
    assert (answer.code, answer.finish_reason, answer.token_ids) == ("overloaded", "error", [])
    assert answer.retry_after_s == 1
    made.advance(1.0)
    assert [late.request_id for late in pacing.overdue()] == [2]
    times.committed(0.02)
    pacing.committed()
    assert pacing.stats().num_refused == 2
    assert (times.stats().num_steps, times.stats().measured_s) == (1, 0.02)


def test_a_floor_that_cannot_be_met_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    times = StepTimes(Experts())
    x = np.zeros(len(FEATURES))
    x[FEATURES.index("step")] = x[FEATURES.index("decode_rows")] = 1
    for _ in range(64):
        times.model.observe(x, STEP_S)
    pacing = Pacing(PacingOptions(50.0), max_num_seqs=8, times=times)
    made = scheduler()
    made.pace(pacing.policy)
    for request_id, floor in enumerate([50.0, 9000.0, 9000.0, 8000.0], 1):
        made.submit(request_id, prompt(4, request_id), max_tokens=9, tps_floor=floor)
        words = made.next_plan()
        assert words is not None
        commit(made, words)
        pacing.committed()
    floors = [record.args for record in caplog.records]
    assert floors == [(9000.0,), (8000.0,)]
    assert pacing.stats().num_unmeetable == 3
    assert [stream[1] for stream in pacing.policy.streams()] == [50.0, 0.0, 0.0, 0.0]
    assert pacing.policy.num_behind == 0
