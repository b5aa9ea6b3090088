# SPDX-License-Identifier: MIT
"""The message of a step: everything that a remote sampler needs arrives, and junk is refused."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed._scheduler import Scheduler
from tokenspeed.execution.plan_view import PlanView, Words
from tokenspeed.execution.sampler import Sequence
from tokenspeed.execution.sampling_params import Grammar, SamplingParams, TokenLogprobs
from tokenspeed.execution.step import Bind, StepOutput
from tokenspeed.execution.step_message import (
    decode_output,
    decode_step,
    encode_output,
    encode_step,
)

PARAMS = SamplingParams(
    max_tokens=7,
    min_tokens=2,
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    logit_bias={3: -1.5, 70_000: 2.0},
    allowed_token_ids=[1, 2, 3],
    bad_words_token_ids=[[4], [5, 6]],
    stop=["é\n"],
    stop_token_ids=[9],
    seed=-(2**63),
    logprobs=3,
    prompt_logprobs=0,
    structured_outputs={"regex": "é"},
    grammar=Grammar("key"),
)


def plan(request_id: int = 2**63 + 5, prompt_len: int = 20) -> Words:
    """A real one: of one prompt's first step."""
    scheduler = Scheduler(
        num_pages=8,
        page_size=4,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_model_len=32,
        max_num_partial_prefills=1,
        overlap_depth=0,
        num_micro_steps=1,
        enable_prefix_caching=True,
    )
    prompt = np.arange(prompt_len, dtype=np.int32)
    none = np.empty(0, np.int32)
    scheduler.submit(
        request_id,
        prompt,
        salt=b"",
        max_tokens=4,
        min_tokens=0,
        stop_ids=none,
        prompt_logprobs=False,
    )
    words = scheduler.next_plan()
    assert words is not None
    return words.copy()


def bind(slot: int = 0, request_id: int = 2**64 - 1, outputs: tuple[int, ...] = ()) -> Bind:
    prompt = np.arange(3 + slot, dtype=np.int32)
    return Bind(slot, request_id, Sequence(prompt, PARAMS, [2, 9], 2**63 - 1), list(outputs))


def same(a: Bind, b: Bind) -> bool:
    x, y = a.sequence, b.sequence
    return (
        (a.slot, a.request_id, a.output_ids) == (b.slot, b.request_id, b.output_ids)
        and x.prompt_ids.tolist() == y.prompt_ids.tolist()
        and y.prompt_ids.dtype == np.int32
        and (x.params, x.stop_ids, x.seed) == (y.params, y.stop_ids, y.seed)
    )


def logprobs(*ids: int) -> TokenLogprobs:
    return TokenLogprobs(list(ids), [-0.1 * i - 1e-7 for i in ids], list(range(1, len(ids) + 1)))


def test_a_step_of_several_indices_arrives_whole() -> None:
    words, binds = plan(), {1: [bind(), bind(1, 7, (5, 6, 7))], 2: [bind(2, 0)]}
    news = [("", b"words"), ("gone", None), ("é", b"")]
    plans, found, grammars = decode_step(
        encode_step([PlanView(words), None, PlanView(words)], binds, news)
    )
    assert grammars == news
    assert plans[1] is None
    for view in (plans[0], plans[2]):
        assert view is not None
        assert view.bound_request_ids() == [2**63 + 5]
        assert view.tokens.tolist() == PlanView(words).tokens.tolist()
        assert view.step_words.tolist() == PlanView(words).step_words.tolist()
        view.tokens[:] = 1  # tensors are made of it without a copy
    assert found.keys() == {1, 2}
    for dp, sent in binds.items():
        assert all(same(a, b) for a, b in zip(sent, found[dp], strict=True))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_step_without_plans_is_a_message_too(count: int) -> None:
    assert decode_step(encode_step([None] * count, {})) == ([None] * count, {}, [])


def test_outputs_arrive_whole() -> None:
    words = PlanView(plan()).result(np.array([17]), np.array([1]), np.array([False]))
    plain = StepOutput(words, {}, {})
    rich = StepOutput(
        words,
        {2**64 - 1: [logprobs(5, 6), logprobs(11)], 8: []},
        {3: {}, 4: {1: logprobs(7), 2: logprobs(8, 9, 10)}},
    )
    drafts = StepOutput(words, {}, {}, {2**64 - 1: [5, 2**31 - 1], 3: [0]})
    for output in (plain, rich, drafts):
        found = decode_output(encode_output(output))
        assert found.words.tolist() == output.words.tolist()
        assert (found.logprobs, found.prompt_logprobs) == (output.logprobs, output.prompt_logprobs)
        assert found.drafts == output.drafts
    low = TokenLogprobs([1], [float("-inf")], [1])
    assert decode_output(encode_output(StepOutput(words, {1: [low]}, {}))).logprobs == {1: [low]}


def test_every_sampling_parameter_travels() -> None:
    plain = {f.name: f.default for f in dataclasses.fields(SamplingParams)}
    left_alone = {name for name in plain if getattr(PARAMS, name) == plain[name]}
    # What is dictated goes with no grammar, and has a test of its own.
    of_the_gateway = {"n", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens"}
    assert left_alone == of_the_gateway | {"forced_output_ids"}


STEP = encode_step(
    [PlanView(plan()), None],
    {1: [bind(0), bind(1, 7, (5, 6))]},
    [("", b"vocabulary"), ("key", None)],
)
OUTPUT = encode_output(
    StepOutput(np.arange(9, dtype=np.int32), {1: [logprobs(5)]}, {2: {1: logprobs(6)}}, {1: [7]})
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize(("decode", "message"), [(decode_step, STEP), (decode_output, OUTPUT)])
def test_bytes_that_were_changed_are_a_value_error_or_a_message(
    decode: Any, message: bytes, data: st.DataObject
) -> None:
    """Nothing else is raised, and nothing outside of the message is read."""
    words = bytearray(message)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(words) - 1))
        words[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(words)), st.integers(0, len(words))))
    try:
        decode(bytes(words[:cut]))
    except ValueError:
        return


@settings(max_examples=150, deadline=None)
@given(facts=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["dp", "slot", "id", "logprobs", "params", "1"]), inner),
    max_leaves=6,
))  # fmt: skip
@pytest.mark.parametrize("decode", [decode_step, decode_output])
def test_json_of_any_other_shape_is_a_value_error(decode: Any, facts: Any) -> None:
    text = json.dumps(facts).encode()
    magic = (STEP if decode is decode_step else OUTPUT)[:8]
    size = 8 + -(-len(text) // 4)
    head = np.array([size, 0, 1, len(text), 0, 0], np.int32).tobytes()
    try:
        decode(magic + head + text + bytes(-len(text) % 4))
    except ValueError:
        return


@pytest.mark.parametrize("decode", [decode_step, decode_output])
def test_messages_of_others_are_refused(decode: Any) -> None:
    other = OUTPUT if decode is decode_step else STEP
    for junk in (b"", b"\0" * 4, b"\xff" * 64, other, other[:-4]):
        with pytest.raises(ValueError, match="message"):
            decode(junk)
