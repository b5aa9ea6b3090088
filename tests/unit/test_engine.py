# SPDX-License-Identifier: MIT
"""The engine over the real scheduler and a model of hashes: right tokens whatever the schedule."""

import contextlib
import itertools
import json
import random
from typing import Any

import pytest
import torch

from tests.fake_model import FakeModel
from tokenspeed.config import EngineConfig
from tokenspeed.engine.build import assemble
from tokenspeed.engine.engine import Engine
from tokenspeed.engine.messages import (
    CacheReceipt,
    GenerateRequest,
    ReleasePrefix,
    RetainPrefix,
    Retention,
    TokenOutput,
)
from tokenspeed.engine.part import assemble_part
from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import SamplingParams

VOCAB = 101
Collected = dict[int, list[TokenOutput]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def engine_of(model: FakeModel | None = None, **options: Any) -> Engine:
    defaults = {"num_pages": 64, "page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    config = EngineConfig.of(**(defaults | {"max_model_len": 128} | options))
    model = model or FakeModel(VOCAB)
    return assemble(config, assemble_part(config, model))  # type: ignore[arg-type]


def request(request_id: int, prompt: list[int], stop: Any = (), **params: Any) -> GenerateRequest:
    params.setdefault("temperature", 0.0)
    return GenerateRequest(request_id, prompt, SamplingParams(**params), list(stop))


def drain(engine: Engine) -> Collected:
    outputs: Collected = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    check_idle(engine)
    return outputs


def check_idle(engine: Engine) -> None:
    """Nothing is held once nothing is asked."""
    engine._schedulers.check_invariants()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert not engine._schedulers.has_work()


def ids_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    dice = random.Random(seed)
    shared = [dice.randrange(VOCAB) for _ in range(longest // 2)]
    return [
        shared[: dice.randrange(len(shared))]
        + [dice.randrange(VOCAB) for _ in range(dice.randint(1, longest // 2))]
        for _ in range(count)
    ]


GRID = list(itertools.product((0, 1), (7, 64), (1, 8), (4, 16), (False, True)))


@pytest.mark.parametrize(("depth", "chunk", "seats", "page_size", "caching"), GRID)
def test_tokens_do_not_depend_on_the_schedule(
    depth: int, chunk: int, seats: int, page_size: int, caching: bool
) -> None:
    model = FakeModel(VOCAB)
    engine = engine_of(
        model,
        overlap_depth=depth,
        max_num_batched_tokens=max(chunk, seats),
        max_num_seqs=seats,
        page_size=page_size,
        num_pages=256 // page_size,
        enable_prefix_caching=caching,
    )
    asked = prompts(12)
    for request_id, prompt in enumerate(asked):
        engine.add_request(request(request_id, prompt, max_tokens=20))
    outputs = drain(engine)
    for request_id, prompt in enumerate(asked):
        assert ids_of(outputs[request_id]) == model.greedy(prompt, 20)
        assert [o.finish_reason for o in outputs[request_id]][-1] == "length"
    assert (max(model.batch_sizes) > 1) == (seats > 1)


@pytest.mark.parametrize("depth", [0, 1])
def test_retraction_changes_no_token(depth: int) -> None:
    model = FakeModel(VOCAB)
    engine = engine_of(model, num_pages=33, overlap_depth=depth, max_model_len=128)
    asked = prompts(10, seed=3, longest=40)
    for request_id, prompt in enumerate(asked):
        params = {"temperature": 1.0, "seed": 5, "frequency_penalty": 1.0} if request_id % 2 else {}
        engine.add_request(request(request_id, prompt, max_tokens=60, **params))
    outputs = drain(engine)
    assert engine.stats().num_preemptions > 0
    calm = engine_of(model, num_pages=512, overlap_depth=0)
    for request_id, prompt in enumerate(asked):
        params = {"temperature": 1.0, "seed": 5, "frequency_penalty": 1.0} if request_id % 2 else {}
        calm.add_request(request(request_id, prompt, max_tokens=60, **params))
    expected = drain(calm)
    assert {i: ids_of(o) for i, o in outputs.items()} == {i: ids_of(o) for i, o in expected.items()}


def test_a_second_turn_finds_the_first_in_the_cache() -> None:
    engine, model = engine_of(), FakeModel(VOCAB)
    prompt = list(range(30))
    engine.add_request(request(1, prompt, max_tokens=10))
    answer = ids_of(drain(engine)[1])
    again = [*prompt, *answer, 3, 4]
    engine.add_request(request(2, again, max_tokens=5))
    outputs = drain(engine)[2]
    assert outputs[0].num_cached_tokens == 36  # 39 computed tokens fill nine pages of four
    assert ids_of(outputs) == model.greedy(again, 5)
    engine.flush_cache()
    engine.add_request(request(3, again, max_tokens=5))
    assert drain(engine)[3][0].num_cached_tokens == 0


def test_flushing_forgets_what_drafts_are_copied_from() -> None:
    drafts = {"method": "suffix", "adaptive": False, "num_speculative_tokens": 3}
    num_accepted = []
    for flushes in (False, True):
        engine = engine_of(speculative_config=json.dumps(drafts))
        for request_id in range(2):
            engine.add_request(request(request_id, list(range(30)), max_tokens=10))
            drain(engine)
            if flushes:
                engine.flush_cache()
        speculation = engine.stats().speculation
        assert speculation is not None
        num_accepted.append(speculation.drafters[0].num_accepted_tokens)
    assert num_accepted[0] >= num_accepted[1] + 6


def test_the_first_output_carries_a_receipt() -> None:
    engine = engine_of(num_pages=64)
    for request_id, (length, reason) in enumerate([(40, "never_cached"), (40, ""), (30, "")]):
        wish = Retention(60.0 * request_id)
        params = SamplingParams(max_tokens=3, temperature=0.0)
        engine.add_request(GenerateRequest(request_id, list(range(length)), params, retention=wish))
        outputs = drain(engine)[request_id]
        assert outputs[0].receipt == CacheReceipt(0, reason, kept_until_s=60.0 * request_id)
        assert {output.receipt for output in outputs[1:]} <= {None}
    assert engine.stats().num_retained_pages == 11  # one holds the end of the shorter prompt
    off = engine_of(enable_prefix_caching=False)
    off.add_request(request(1, [1, 2, 3], max_tokens=1))
    assert drain(off)[1][0].receipt == CacheReceipt(reason="disabled")


def test_users_take_turns() -> None:
    engine = engine_of(max_num_seqs=1)
    for request_id in range(6):
        params = SamplingParams(max_tokens=2, temperature=0.0)
        user = "b" if request_id > 3 else "a"
        ids = [request_id] * 20
        engine.add_request(GenerateRequest(request_id, ids, params, user=user))
    assert list(drain(engine)) == [0, 4, 1, 5, 2, 3]


def test_prefixes_are_kept_and_dropped_by_message() -> None:
    engine = engine_of()
    prompt = list(range(40))
    engine.add_request(request(1, prompt, max_tokens=1))
    drain(engine)
    pin = RetainPrefix(5, prompt, retention=Retention(pinned=True))
    assert engine.order_prefix(pin) == 10
    assert engine.stats().num_pinned_pages == 10
    assert engine.order_prefix(RetainPrefix(6, prompt)) == 10
    assert engine.stats().num_pinned_pages == 0
    assert engine.order_prefix(ReleasePrefix(7, prompt, b"another tenant")) == 0
    assert engine.order_prefix(ReleasePrefix(8, [*prompt, 2**70, -1])) == 10
    engine.add_request(request(2, prompt, max_tokens=1))
    receipt = drain(engine)[2][0].receipt
    assert receipt is not None
    assert receipt.reason == "evicted"
    for wrong in ([2**70], [-1], [VOCAB], []):
        assert engine.order_prefix(ReleasePrefix(9, wrong)) == 0
    for seconds in (float("nan"), -1.0):
        assert engine.order_prefix(RetainPrefix(9, prompt, retention=Retention(seconds))) == 10
        assert engine.stats().num_retained_pages == 0
    with pytest.raises(RequestError, match="retention_s"):
        engine.add_request(
            GenerateRequest(3, prompt, SamplingParams(), retention=Retention(float("nan")))
        )


def test_salts_share_nothing() -> None:
    engine = engine_of()
    params = SamplingParams(max_tokens=1)
    for request_id, salt in enumerate([b"a", b"b", b"a"]):
        engine.add_request(GenerateRequest(request_id, list(range(20)), params, [], salt))
        cached = drain(engine)[request_id][0].num_cached_tokens
        assert (cached > 0) == (request_id == 2)


@pytest.mark.parametrize("depth", [0, 1])
def test_stop_ids_end_a_request(depth: int) -> None:
    model = FakeModel(VOCAB)
    path = model.greedy([5, 6], 30)
    stop = path[10]
    first = path.index(stop)
    engine = engine_of(model, overlap_depth=depth)
    engine.add_request(request(1, [5, 6], stop=[stop], max_tokens=30))
    last = drain(engine)[1][-1]
    assert (last.finish_reason, last.stop_token_id) == ("stop", stop)
    engine.add_request(request(2, [5, 6], stop=[stop], max_tokens=30))
    assert ids_of(drain(engine)[2]) == path[: first + 1]


def test_a_stop_id_beyond_the_vocabulary_never_comes() -> None:
    engine = engine_of()
    engine.add_request(request(1, [5, 6], stop=[VOCAB, 2**31], min_tokens=2, max_tokens=4))
    assert drain(engine)[1][-1].finish_reason == "length"


def test_min_tokens_holds_a_stop_back() -> None:
    model = FakeModel(VOCAB)
    stop = model.greedy([5, 6], 1)[0]
    engine = engine_of(model)
    engine.add_request(request(1, [5, 6], stop=[stop], min_tokens=4, max_tokens=30))
    ids = ids_of(drain(engine)[1])
    assert len(ids) >= 5
    assert stop not in ids[:4]


def test_max_tokens_none_fills_the_context() -> None:
    engine = engine_of(max_model_len=32)
    engine.add_request(request(1, list(range(20)), max_tokens=None))
    outputs = drain(engine)[1]
    assert len(ids_of(outputs)) == 12
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("depth", [0, 1])
def test_a_failed_row_ends_its_request_alone(depth: int) -> None:
    model = FakeModel(VOCAB)
    model.fail_on = 100
    engine = engine_of(model, max_num_seqs=32, num_pages=512, overlap_depth=depth)
    asked = [[token % 100 for token in prompt] for prompt in prompts(32, seed=9)]
    asked[13][0] = 100
    for request_id, prompt in enumerate(asked):
        engine.add_request(request(request_id, prompt, max_tokens=16, logit_bias={100: -100.0}))
    outputs = drain(engine)
    assert (ids_of(outputs[13]), outputs[13][-1].finish_reason) == ([], "error")
    assert outputs[13][-1].error is not None
    healthy = FakeModel(VOCAB)
    alone = engine_of(healthy, max_num_seqs=1)
    for request_id, prompt in enumerate(asked):
        if request_id != 13:
            alone.add_request(request(request_id, prompt, max_tokens=16, logit_bias={100: -100.0}))
    expected = drain(alone)
    for request_id in expected:
        assert ids_of(outputs[request_id]) == ids_of(expected[request_id])
    # What the failed request wrote must not be found by the next one.
    engine.add_request(request(99, asked[13], max_tokens=2))
    assert drain(engine)[99][0].num_cached_tokens == 0


def storm(count: int, seed: int) -> None:
    """Random traffic over a random engine: arrivals, aborts, retractions, shared prefixes.

    Every request that was not aborted must get exactly its own greedy tokens.
    """
    dice, model = random.Random(seed), FakeModel(VOCAB)
    engine = engine_of(
        model,
        overlap_depth=dice.randrange(2),
        page_size=dice.choice((1, 4, 16)),
        num_pages=160,
        max_model_len=96,
        max_num_seqs=dice.choice((1, 3, 8)),
        max_num_batched_tokens=dice.choice((8, 17, 64)),
        enable_prefix_caching=dice.random() < 0.8,
    )
    asked = prompts(count, seed=seed)
    arrivals = iter(enumerate(asked))
    outputs: Collected = {}
    live: set[int] = set()
    aborted: set[int] = set()
    arriving = True
    while arriving or engine.has_work():
        for request_id, prompt in itertools.islice(arrivals, dice.randrange(4)):
            engine.add_request(request(request_id, prompt, max_tokens=12))
            live.add(request_id)
            arriving = request_id < count - 1
        if live and dice.random() < 0.1:
            victim = dice.choice(sorted(live))
            live.remove(victim)
            aborted.add(victim)
            engine.abort(victim)
        for output in engine.step():
            assert output.request_id in live
            outputs.setdefault(output.request_id, []).append(output)
            if output.finish_reason is not None:
                live.remove(output.request_id)
    check_idle(engine)
    assert len(aborted) > count // 30
    for request_id in set(range(count)) - aborted:
        assert ids_of(outputs[request_id]) == model.greedy(asked[request_id], 12)


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_gets_its_own_tokens(seed: int) -> None:
    storm(60, seed)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 150))
def test_much_random_traffic_gets_its_own_tokens(seed: int) -> None:
    storm(1000, seed)


def test_logprobs_of_output_and_prompt() -> None:
    model = FakeModel(VOCAB)
    engine = engine_of(model, max_num_batched_tokens=9)
    prompt = list(range(20))
    engine.add_request(request(1, prompt, max_tokens=4, logprobs=2, prompt_logprobs=1))
    outputs = drain(engine)[1]
    sequence = prompt + ids_of(outputs)
    expected = model.logits(model.states(sequence[:-1])).log_softmax(-1)
    read = outputs[0].prompt_logprobs
    assert read is not None
    assert read[0] is None
    entries = [*read[1:], *(entry for o in outputs for entry in o.logprobs or ())]
    assert len(entries) == 23
    for position, entry in enumerate(entries):
        assert entry is not None
        assert entry.token_ids[0] == sequence[position + 1]
        assert len(entry.token_ids) == (2 if position < 19 else 3)
        chosen = [float(expected[position, token]) for token in entry.token_ids]
        assert entry.logprobs == pytest.approx(chosen, abs=1e-5)
    assert all(o.prompt_logprobs is None for o in outputs[1:])


def test_a_prompt_that_fails_in_its_first_chunk_ends_there() -> None:
    model = FakeModel(VOCAB)
    model.fail_on = 100
    engine = engine_of(model, max_num_batched_tokens=8)
    prompt = [100, *range(60)]
    for request_id in range(2):
        engine.add_request(request(request_id, prompt, max_tokens=2))
        last = drain(engine)[request_id][-1]
        assert (last.finish_reason, last.num_cached_tokens) == ("error", 0)
    assert engine.num_steps == 2  # the other chunks are not even tried


def test_logprobs_go_to_their_own_request() -> None:
    engine = engine_of(max_num_seqs=1)
    for request_id in range(3):
        engine.add_request(request(request_id, [request_id, 7], max_tokens=3, logprobs=0))
    for outputs in drain(engine).values():
        for output in outputs:
            assert [e.token_ids for e in output.logprobs or ()] == [output.token_ids]


def test_prompt_logprobs_are_whole_when_the_prompt_is_cached() -> None:
    engine = engine_of()
    prompt = list(range(30))
    for request_id in range(2):
        engine.add_request(request(request_id, prompt, max_tokens=1, prompt_logprobs=0))
        entries = drain(engine)[request_id][0].prompt_logprobs or []
        assert [e and e.token_ids[0] for e in entries] == [None, *prompt[1:]]


EVERY_WORD = [[i] for i in range(VOCAB)]
EARLY_STOP = {"min_tokens": 1, "stop": [4]}
EXTREMES: dict[str, list[Any]] = {
    "temperature": [0.0, 1e-300, 1e-6, 1.0, 100.0],
    "top_k": [-1, 0, 1, VOCAB, 2**31 - 1],
    "top_p": [1e-300, 1e-6, 0.5, 1.0],
    "min_p": [0.0, 1e-300, 1.0],
    "repetition_penalty": [0.01, 1.0, 100.0],
    "presence_penalty": [-2.0, 0.0, 2.0],
    "frequency_penalty": [-2.0, 0.0, 2.0],
    "seed": [None, 0, -(2**63), 2**63 - 1],
    "logit_bias": [None, {}, {0: -100, 1: 100.0}, dict.fromkeys(range(VOCAB), -100.0)],
    "allowed_token_ids": [None, [0], [3, 3, 3], list(range(VOCAB))],
    "bad_words_token_ids": [None, [], [[0], [1, 2]], EVERY_WORD],
    "min_tokens": [0, 6],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
}


@pytest.mark.parametrize("depth", [0, 1])
def test_no_parameters_take_the_engine_down(depth: int) -> None:
    dice = random.Random(depth)
    engine = engine_of(overlap_depth=depth, num_pages=400)
    count = 150
    served = []
    for request_id in range(count):
        params = {name: dice.choice(values) for name, values in EXTREMES.items()}
        with contextlib.suppress(RequestError):  # nothing is left to choose
            engine.add_request(request(request_id, [1, 2, 3], stop=[5], max_tokens=6, **params))
            served.append(request_id)
    outputs = drain(engine)
    assert {outputs[request_id][-1].finish_reason for request_id in served} <= {"stop", "length"}
    assert count // 2 < len(served) < count


REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("empty", {"prompt": []}, "prompt", "empty_prompt"),
    ("too long", {"prompt": [1] * 128}, "prompt", "context_length_exceeded"),
    ("no room", {"prompt": [1] * 100, "max_tokens": 29}, "max_tokens", "context_length_exceeded"),
    ("id too large", {"prompt": [1, VOCAB]}, "prompt", "invalid_value"),
    ("id negative", {"prompt": [1, -1]}, "prompt", "invalid_value"),
    ("id huge", {"prompt": [1, 2**70]}, "prompt", "invalid_value"),
    ("not ids", {"prompt": [1.5]}, "prompt", "invalid_value"),
    ("nested", {"prompt": [[1]]}, "prompt", "invalid_value"),
    ("ragged", {"prompt": [[1], 2]}, "prompt", "invalid_value"),
    ("truth", {"prompt": [True]}, "prompt", "invalid_value"),
    ("bias", {"logit_bias": {VOCAB: 1.0}}, "logit_bias", "invalid_value"),
    ("allowed", {"allowed_token_ids": [-1]}, "allowed_token_ids", "invalid_value"),
    ("bad words", {"bad_words_token_ids": [[1, VOCAB]]}, "bad_words_token_ids", "invalid_value"),
    ("stop", {"stop_token_ids": [2**40]}, "stop_token_ids", "invalid_value"),
    ("logprobs", {"logprobs": 21}, "logprobs", "invalid_value"),
    ("prompt logprobs", {"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
    ("n", {"n": 2}, "n", "invalid_value"),
    ("all banned", {"bad_words_token_ids": EVERY_WORD}, "bad_words", "invalid_value"),
    ("all stop", {"min_tokens": 1, "stop": [*range(VOCAB)]}, "min_tokens", "invalid_value"),
    ("no choice", {"allowed_token_ids": [4]} | EARLY_STOP, "allowed_token_ids", "invalid_value"),
]


@pytest.mark.parametrize(
    ("options", "field", "code"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_what_cannot_be_served_is_refused(
    options: dict[str, Any], field: str | None, code: str
) -> None:
    engine = engine_of()
    options = {"prompt": [1, 2]} | options
    with pytest.raises(RequestError) as caught:
        engine.add_request(request(1, **options))
    assert (caught.value.field, caught.value.code) == (field, code)
    assert not engine.has_work()
    engine.add_request(request(1, [1, 2], max_tokens=3))
    assert len(ids_of(drain(engine)[1])) == 3


def test_a_live_request_id_is_taken() -> None:
    engine = engine_of()
    engine.add_request(request(1, [1, 2], max_tokens=3))
    with pytest.raises(RequestError):
        engine.add_request(request(1, [1, 2], max_tokens=3))
    assert len(ids_of(drain(engine)[1])) == 3
    engine.abort(77)


def test_unseeded_requests_differ_and_a_seeded_engine_repeats() -> None:
    def run(seed: int) -> list[list[int]]:
        engine = engine_of(seed=seed)
        for request_id in range(3):
            engine.add_request(request(request_id, [1], max_tokens=8, temperature=5.0))
        return [ids_of(outputs) for _, outputs in sorted(drain(engine).items())]

    first = run(0)
    assert len({tuple(ids) for ids in first}) == 3
    assert run(0) == first
    assert run(1) != first
