# SPDX-License-Identifier: MIT
"""Pacing in the engine, over the real scheduler and a model of hashes, at times that are told."""

from typing import Any

import pytest

from tests.fake_model import FakeModel
from tokenspeed.config import EngineConfig
from tokenspeed.engine import engine as engine_module
from tokenspeed.engine.build import assemble
from tokenspeed.engine.engine import Engine
from tokenspeed.engine.messages import GenerateRequest, TokenOutput
from tokenspeed.engine.part import assemble_part
from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import SamplingParams

VOCAB = 101


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        self.now_s += 1e-4  # no two calls at once
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(engine_module, "time", made)
    return made


def engine_of(**options: Any) -> Engine:
    sizes = {"num_pages": 64, "page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    config = EngineConfig.of(**sizes | {"max_model_len": 128} | options)
    return assemble(config, assemble_part(config, FakeModel(VOCAB)))  # type: ignore[arg-type]


def request(request_id: int, max_tokens: int = 4, **terms: Any) -> GenerateRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return GenerateRequest(request_id, [request_id, 2, 3, 4, 5], params, **terms)


def drain(engine: Engine) -> list[TokenOutput]:
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    engine._schedulers.check_invariants()
    return outputs


def test_tokens_are_the_same(clock: Clock) -> None:
    answers = []
    drafts = {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 3}'}
    for options in (
        {},
        {"tps_floor": 30.0},
        {"tps_floor": 9000.0, "overlap_depth": 1},
        {"tps_floor": 30.0, "overlap_depth": 1, **drafts},
        {"tps_floor": 30.0, "overlap_depth": 1, "num_pages": 32},  # too few for all
    ):
        engine = engine_of(**options)
        for request_id in range(1, 20):
            engine.add_request(request(request_id, 20, priority=request_id % 3))
        ids: dict[int, list[int]] = {}
        for output in drain(engine):
            ids.setdefault(output.request_id, []).extend(output.token_ids)
        answers.append(ids)
    assert all(answer == answers[0] for answer in answers)


def test_a_wait_begins_when_the_request_comes(clock: Clock) -> None:
    engine = engine_of(max_queue_wait_s=1.0)
    engine.add_request(request(1))
    assert [output.code for output in drain(engine)] == [None] * 4
    clock.now_s += 3600
    engine.add_request(request(2))
    assert [output.code for output in drain(engine)] == [None] * 4


def test_who_would_wait_too_long_is_refused_before_the_next_step(clock: Clock) -> None:
    engine = engine_of(max_queue_wait_s=5.0, max_num_seqs=1)
    engine.add_request(request(1, 20))
    engine.step()
    engine.add_request(request(2, max_wait_s=0.5))  # nobody knows yet how long: a second
    num_steps = engine.num_steps
    (answer,) = engine.step()
    assert engine.num_steps == num_steps
    assert (answer.request_id, answer.code, answer.finish_reason) == (2, "overloaded", "error")
    assert answer.retry_after_s == 1
    engine.add_request(request(3, max_wait_s=4.0))
    engine.step()
    clock.now_s += 4.5
    late = {output.request_id: output.code for output in engine.step()}
    assert late == {1: None, 3: "overloaded"}
    assert {output.request_id for output in drain(engine)} == {1}
    stats = engine.stats().pacing
    assert stats is not None
    assert stats.num_refused == 2


def test_refusals_keep_nobody_from_a_step(clock: Clock) -> None:
    engine = engine_of(max_queue_wait_s=5.0, max_num_seqs=1)
    engine.add_request(request(1, 20))
    engine.step()
    for request_id in range(2, 40):
        engine.add_request(request(request_id, max_wait_s=0.5))
        engine.step()
    assert engine.num_steps >= 19


def test_who_finds_room_at_once_need_not_wait(clock: Clock) -> None:
    engine = engine_of(max_queue_wait_s=0.0)
    engine.add_request(request(1))
    assert [output.code for output in drain(engine)] == [None] * 4


def test_who_was_refused_and_is_gone_hears_nothing(clock: Clock) -> None:
    engine = engine_of(max_queue_wait_s=5.0, max_num_seqs=1)
    engine.add_request(request(1, 20))
    engine.step()
    engine.add_request(request(2, max_wait_s=0.5))
    engine.abort(2)
    assert {output.request_id for output in drain(engine)} == {1}


def test_a_refused_request_can_be_asked_again(clock: Clock) -> None:
    engine = engine_of(max_queue_wait_s=0.5, max_num_seqs=1)
    engine.add_request(request(1))
    engine.step()
    engine.add_request(request(2))
    assert [output.request_id for output in drain(engine)].count(2) == 1
    engine.add_request(request(2))
    assert [output.code for output in drain(engine)] == [None] * 4


def test_bad_terms_are_refused_and_nothing_stays(clock: Clock) -> None:
    engine = engine_of()
    for terms in ({"tps_floor": float("nan")}, {"tps_floor": 5.0}, {"priority": 2000}):
        with pytest.raises(RequestError, match=next(iter(terms))):
            engine.add_request(request(1, **terms))
    assert not engine.has_work()
    assert engine.stats().pacing is None
