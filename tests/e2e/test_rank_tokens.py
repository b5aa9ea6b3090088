# SPDX-License-Identifier: MIT
"""An `LLM` whose ranks are processes gives the tokens of one rank on every mesh, whatever is asked.

The cache is too small for all requests at once, so that some are retracted and come back.
"""

import os
from typing import Any

import pytest

from tests.rank_processes import assert_gone, workers_of
from tokenspeed import LLM, SamplingParams
from tokenspeed.engine.ranks import muster
from tokenspeed.llm import RequestOutput

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "num_pages": 40,
    "page_size": 16,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
}
NUM_PROMPTS = 16
SHARED = list(range(300, 348))  # three pages that half of the prompts begin with
DICTATED = [(31 * j) % 1000 for j in range(70)]


def mesh(**sizes: int) -> dict[str, int]:
    names = {
        "tp": "tensor_parallel_size",
        "ep": "expert_parallel_size",
        "dp": "attention_data_parallel_size",
        "pp": "pipeline_parallel_size",
    }
    pages = OPTIONS["num_pages"] // sizes.get("dp", 1)
    return {"num_pages": pages} | {names.get(name, name): n for name, n in sizes.items()}


QUICK = [
    mesh(tp=2),
    mesh(dp=2, ep=2),
    mesh(pp=2),
]
FULL = [
    mesh(tp=2, overlap_depth=1),
    mesh(ep=2),
    mesh(dp=2),
    mesh(dp=2, overlap_depth=1),
    mesh(tp=2, ep=2),
    mesh(dp=2, tp=2, ep=4),
    mesh(pp=2, tp=2),
    mesh(pp=2, dp=2),
]


def prompts() -> list[list[int]]:
    return [
        (SHARED if i % 2 else []) + [(20 + 97 * i + 13 * j) % 1000 for j in range(6 + 5 * i)]
        for i in range(NUM_PROMPTS)
    ]


def params(stop: int) -> list[SamplingParams]:
    """Something else of each: greedy, drawn, penalised, biased, stopped, dictated, with
    log-probabilities."""
    base = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    kinds = [
        base,
        base.replace(temperature=0.8, seed=7, top_p=0.9),
        base.replace(logprobs=3, prompt_logprobs=2),
        base.replace(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
        base.replace(temperature=1.0, seed=11, top_k=50, logprobs=0),
        base.replace(stop_token_ids=[stop], min_tokens=3),
        base.replace(temperature=0.7, seed=3, min_p=0.02, logit_bias={30: 4.0, 40: -100.0}),
        base.replace(prompt_logprobs=0, bad_words_token_ids=[[stop], [20, 30]]),
        base.replace(temperature=0.9, seed=5, logprobs=1, forced_output_ids=DICTATED),
    ]
    return [kinds[i % len(kinds)].replace(max_tokens=48 + 4 * i) for i in range(NUM_PROMPTS)]


Answers = list[tuple[list[int], str | None, int | str | None]]


def ask(llm: LLM, stop: int) -> list[RequestOutput]:
    tokens = [{"prompt_token_ids": ids} for ids in prompts()]
    return llm.generate(tokens, params(stop), use_tqdm=False)


def answers(outputs: list[RequestOutput]) -> Answers:
    first = [output.outputs[0] for output in outputs]
    return [(one.token_ids, one.finish_reason, one.stop_reason) for one in first]


def assert_same_logprobs(got: list[RequestOutput], want: list[RequestOutput]) -> None:
    compared = 0
    for one, other in zip(got, want, strict=True):
        pairs = [(one.outputs[0].logprobs, other.outputs[0].logprobs)]
        pairs += [(one.prompt_logprobs, other.prompt_logprobs)]
        for mine, theirs in pairs:
            assert (mine is None) == (theirs is None)
            for here, there in zip(mine or [], theirs or [], strict=True):
                assert (here is None) == (there is None)
                for token, entry in (here or {}).items():
                    found = (there or {}).get(token)
                    if found is not None:  # the last of the likeliest may be as likely as another
                        assert entry.logprob == pytest.approx(found.logprob, abs=1e-3)
                        compared += 1
    assert compared > 500


@pytest.fixture(scope="module")
def stop() -> int:
    """A token that a greedy answer holds, some way in."""
    with LLM("demo", **OPTIONS) as llm:
        plain = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        some = llm.generate({"prompt_token_ids": prompts()[5]}, plain, use_tqdm=False)
    return some[0].outputs[0].token_ids[12]


@pytest.fixture(scope="module")
def alone(stop: int) -> list[RequestOutput]:
    """What one rank answers."""
    with LLM("demo", **OPTIONS) as llm:
        outputs = ask(llm, stop)
        assert llm._engine.stats().num_preemptions > 0
    reasons = {reason for _, reason, _ in answers(outputs)}
    assert reasons == {"length", "stop"}
    assert answers(outputs)[8] == (DICTATED, "length", None)
    return outputs


def abort_some(llm: LLM) -> None:
    """Conversations whose reader leaves in the middle, while others go on."""
    chat = [{"role": "user", "content": "Write a function that adds two numbers."}]
    long = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    streams = [llm.stream_chat(chat, long) for _ in range(4)]
    for stream in streams:
        next(stream)
    for stream in streams[:3]:
        stream.close()
    assert "".join(streams[3])


def check(llm: LLM, stop: int, alone: list[RequestOutput]) -> None:
    """The same twice, with aborts between; nothing is left over."""
    outputs = ask(llm, stop)
    assert answers(outputs) == answers(alone)
    assert_same_logprobs(outputs, alone)
    assert llm._engine.stats().num_preemptions > 0
    abort_some(llm)
    before = llm._engine.stats()
    again = ask(llm, stop)
    assert answers(again) == answers(alone)
    after = llm._engine.stats()
    assert after.prefix_hits > before.prefix_hits
    assert (after.num_running, after.num_waiting, after.kv_cache_usage) == (0, 0, 0.0)
    llm._engine._schedulers.check_invariants()


@pytest.mark.parametrize(
    "sizes", QUICK + [pytest.param(sizes, marks=pytest.mark.full) for sizes in FULL], ids=str
)
def test_tokens_of_one_rank(sizes: dict[str, int], stop: int, alone: list[RequestOutput]) -> None:
    with LLM("demo", **(OPTIONS | sizes)) as llm:
        workers = workers_of(os.getpid())
        assert workers
        check(llm, stop, alone)
    assert_gone(workers, os.getpid(), 2.0)


def test_tokens_of_one_rank_over_gloo(stop: int, alone: list[RequestOutput]) -> None:
    """As between machines, but for the steps' messages: tensors travel over TCP."""
    with LLM("demo", **(OPTIONS | mesh(tp=2) | {"communication": "gloo"})) as llm:
        assert answers(ask(llm, stop)) == answers(alone)
        assert llm._engine.stats().num_preemptions > 0
    assert_gone(workers_of(os.getpid()), os.getpid(), 2.0)


def test_an_llm_over_gloo_can_follow_another_but_not_stand_beside_it() -> None:
    options = OPTIONS | mesh(tp=2) | {"communication": "gloo"}
    with LLM("demo", **options), pytest.raises(ValueError, match="one per process"):
        LLM("demo", **options)
    with LLM("demo", **options):
        pass
    assert_gone(workers_of(os.getpid()), os.getpid(), 2.0)


@pytest.mark.full
def test_tokens_of_one_rank_without_any_shared_memory(
    monkeypatch: pytest.MonkeyPatch, stop: int, alone: list[RequestOutput]
) -> None:
    """Steps travel over TCP, too."""
    monkeypatch.setattr(muster, "can_share_memory", lambda: False)
    monkeypatch.setattr("tokenspeed.engine.ranks.wires.can_share_memory", lambda: False)
    with LLM("demo", **(OPTIONS | mesh(dp=2, ep=2))) as llm:
        check(llm, stop, alone)
    assert_gone(workers_of(os.getpid()), os.getpid(), 2.0)
