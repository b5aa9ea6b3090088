# SPDX-License-Identifier: MIT
"""Answers that requests dictate: every id, whatever is sampled, drafted, retracted or told."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.drafted_run import CPU, Answer, DraftedRun, Row
from tests.drafted_run import request as sequence
from tests.fake_model import FakeModel
from tests.unit.test_engine import VOCAB, drain, engine_of, ids_of, prompts, request
from tests.unit.test_step_message import plan
from tokenspeed.engine.engine import FAILED
from tokenspeed.errors import RequestError
from tokenspeed.execution.forced import ForcedOutputs
from tokenspeed.execution.plan_view import PlanView
from tokenspeed.execution.sampler import Sampler
from tokenspeed.execution.sampling_params import Grammar, SamplingParams
from tokenspeed.execution.step import Bind
from tokenspeed.execution.step_message import decode_step, encode_step

STOP = 7


def dictated(count: int, seed: int) -> list[int]:
    """With the id in it that would end another request."""
    dice = random.Random(seed)
    ids = [dice.randrange(VOCAB) for _ in range(count)]
    ids[count // 2] = STOP
    return ids


def ways(i: int) -> dict[str, Any]:
    """How the i-th request is sampled otherwise: every third one dictates nothing."""
    params: dict[str, Any] = {"seed": i, "temperature": (i % 2) * 0.8, "max_tokens": 50 + i}
    if i % 3:
        params["forced_output_ids"] = dictated(50 + i, seed=i)
    if i % 4 == 1:
        params |= {"frequency_penalty": 1.0, "bad_words_token_ids": [[3], [STOP]]}
    return params


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_pages", [33, 512])
def test_what_is_dictated_comes_whatever_the_schedule(depth: int, num_pages: int) -> None:
    """And what others are given is what they are given without such neighbours."""
    engine, alone = (engine_of(num_pages=n, overlap_depth=depth) for n in (num_pages, 512))
    asked = prompts(10, seed=3, longest=40)
    for i, prompt in enumerate(asked):
        engine.add_request(request(i, prompt, **ways(i)))
        if i % 3 == 0:
            alone.add_request(request(i, prompt, **ways(i)))
    outputs = drain(engine)
    assert (engine.stats().num_preemptions > 0) == (num_pages == 33)
    expected = {i: ids_of(o) for i, o in drain(alone).items()}
    expected |= {i: dictated(50 + i, seed=i) for i in range(10) if i % 3}
    assert {i: ids_of(o) for i, o in outputs.items()} == expected
    assert {o[-1].finish_reason for o in outputs.values()} == {"length"}


def test_the_next_in_the_slot_dictates_nothing() -> None:
    engine, model = engine_of(max_num_seqs=1), FakeModel(VOCAB)
    engine.add_request(request(1, [1, 2, 3], forced_output_ids=[9] * 12))
    engine.add_request(request(2, [4, 5], max_tokens=12))
    outputs = drain(engine)
    assert ids_of(outputs[1]) == [9] * 12
    assert ids_of(outputs[2]) == model.greedy([4, 5], 12)


def test_drafts_are_right_if_they_are_what_is_dictated() -> None:
    config = '{"method": "ngram", "adaptive": false, "num_speculative_tokens": 4}'
    engine = engine_of(speculative_config=config)
    loop = [5, 6, 8, STOP, 9] * 8
    engine.add_request(request(1, [1, 2, *loop[:10]], forced_output_ids=loop))
    outputs = drain(engine)[1]
    assert ids_of(outputs) == loop
    assert outputs[-1].num_accepted_tokens >= 24
    assert engine.num_steps <= 16


def test_numbers_that_are_not_finite_fail_it_as_ever() -> None:
    model = FakeModel(VOCAB)
    model.fail_on = 11
    engine = engine_of(model)
    engine.add_request(request(1, [1], forced_output_ids=[5, 11, 6]))
    outputs = drain(engine)[1]
    assert ids_of(outputs) == [5, 11]
    assert outputs[-1].error == FAILED


def test_it_must_fit_the_model() -> None:
    engine = engine_of(max_model_len=32)
    for wrong, field in (([VOCAB], "forced_output_ids"), ([1] * 31, "max_tokens")):
        with pytest.raises(RequestError) as caught:
            engine.add_request(request(1, [1, 2], forced_output_ids=wrong))
        assert caught.value.field == field


# -- verification and logprobs, without a scheduler

ANSWERS = [dictated(20 + i, seed=i) for i in range(4)]


def run(**options: Any) -> list[Answer]:
    """Rows that ask for logprobs go place by place, the others all at once; the last is free."""
    requests = [
        sequence(
            [9, 2, 4 + i],
            seed=i,
            temperature=0.7,
            logprobs=i % 2 + 1 if i != 2 else None,
            forced_output_ids=answer,
        )
        for i, answer in enumerate(ANSWERS)
    ]
    requests.append(sequence([8, 8], seed=9, temperature=0.7, max_tokens=25))
    draft, lose = options.pop("draft", lambda row: []), options.pop("lose", None)
    return DraftedRun(FakeModel(VOCAB), requests, **options).run(draft, lose=lose)


@pytest.fixture(scope="module")
def plain() -> list[Answer]:
    return run()


def test_logprobs_are_of_what_is_dictated(plain: list[Answer]) -> None:
    model = FakeModel(VOCAB)
    for i, answer in enumerate(ANSWERS):
        ids, entries, _ = plain[i]
        assert ids == answer
        states = model.states([9, 2, 4 + i, *answer])[2:-1]
        truth = model.logits(states).log_softmax(-1)
        for at, entry in enumerate(entries):
            assert entry.token_ids[0] == answer[at]
            assert entry.logprobs[0] == pytest.approx(float(truth[at, answer[at]]), abs=1e-5)
            assert entry.ranks[0] == 1 + int((truth[at] > truth[at, answer[at]]).sum())
        assert len(entries) == (0 if i == 2 else len(answer))


@pytest.mark.parametrize("num_right", [0, 1, 2, 6])
def test_drafts_change_nothing(plain: list[Answer], num_right: int) -> None:
    def draft(row: Row) -> list[int]:
        coming = plain[row.number][0][len(row.request.output_ids) :][:num_right]
        return [*coming, (coming[-1] + 1 if coming else 1) % VOCAB]

    assert run(draft=draft) == plain
    assert run(draft=draft, lose=random.Random(num_right)) == plain


def test_ids_behind_the_last_and_other_slots_are_left_alone() -> None:
    forced = ForcedOutputs(4, CPU)
    assert not forced
    forced.bind(2, 10, [70, 71])
    forced.bind(0, 3, [80])
    assert forced
    ids, slots = torch.tensor([1, 2, 3, -1, 5, 6]), np.array([2, 2, 2, 2, 1, 0], np.int32)
    got = forced.impose(ids, slots, torch.tensor([10, 11, 12, 11, 3, 3]))
    assert got.tolist() == [70, 71, 3, -1, 5, 80]
    forced.bind(2, 10, None)
    assert forced.impose(ids, slots, torch.tensor([10, 11, 12, 11, 3, 3])).tolist()[:2] == [1, 2]
    forced.bind(0, 4, None)
    assert not forced


def test_nothing_is_done_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForcedOutputs, "impose", None)
    engine = engine_of()
    engine.add_request(request(1, [1, 2, 3], max_tokens=5))
    assert len(ids_of(drain(engine)[1])) == 5


def test_another_rank_that_samples_is_told() -> None:
    params = SamplingParams(forced_output_ids=ANSWERS[0], logprobs=1)
    bind = Bind(1, 5, sequence([1, 2, 3], forced_output_ids=ANSWERS[0], logprobs=1), [4, 6])
    message = decode_step(encode_step([PlanView(plan())], {0: [bind]}))
    assert isinstance(message.plans[0], PlanView)
    [told] = message.binds[0]
    assert told.sequence.params == params
    sampler = Sampler(max_num_seqs=2, vocab_size=VOCAB, device=CPU)
    sampler.bind(told.slot, told.sequence, told.output_ids)
    slots, places = np.array([1], np.int32), torch.tensor([5])
    ids, _ = sampler.sample(torch.zeros(1, VOCAB), slots, places)
    assert ids.tolist() == [ANSWERS[0][2]]


# -- parameters


def test_it_is_the_whole_answer() -> None:
    params = SamplingParams(forced_output_ids=[1, 2, 3], max_tokens=2, min_tokens=1)
    assert (params.max_tokens, params.min_tokens) == (3, 0)
    assert params.all_stop_ids([1, 9]) == []
    assert params.replace(max_tokens=100).max_tokens == 3


@pytest.mark.parametrize("ids", [[], "12", [1.0], [True], {1: 2}, 3])
def test_what_is_no_list_of_ids_is_refused(ids: Any) -> None:
    with pytest.raises(RequestError, match="must be a list") as caught:
        SamplingParams(forced_output_ids=ids)
    assert caught.value.field == "forced_output_ids"


@pytest.mark.parametrize(
    "other", [{"grammar": Grammar("k")}, {"structured_outputs": {"regex": "a"}}, {"stop": ["a"]}]
)
def test_what_could_end_it_early_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"cannot be combined with {next(iter(other))}"):
        SamplingParams(forced_output_ids=[1], **other)
