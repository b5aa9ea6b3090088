# SPDX-License-Identifier: MIT
"""`LLM`: texts in, texts out, shaped like vLLM's, in one process without a socket."""

import gc
import itertools
import signal
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenspeed
from tokenspeed import LLM, EngineConfig, SamplingParams
from tokenspeed.errors import ModelLoadError, RequestError

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_pages": 64, "page_size": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), **OPTIONS)


def test_the_public_surface() -> None:
    assert tokenspeed.__all__ == sorted(tokenspeed.__all__)
    assert [getattr(tokenspeed, name) for name in tokenspeed.__all__] == [
        EngineConfig,
        LLM,
        SamplingParams,
    ]
    with pytest.raises(AttributeError):
        _ = tokenspeed.Missing


def test_it_ends_when_nobody_has_it(folder: Path) -> None:
    """With its ranks, and not whenever cycles happen to be collected."""
    gc.disable()
    try:
        llm = LLM(str(folder), **OPTIONS)
        seen = weakref.ref(llm)
        del llm
        assert seen() is None
    finally:
        gc.enable()


def test_results_come_in_order_with_text_and_ids(llm: LLM) -> None:
    outputs = llm.generate(["def f(x):", {"prompt": "é"}], GREEDY, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["def f(x):", "é"]
    for output in outputs:
        assert output.finished
        answer = output.outputs[0]
        assert (answer.index, answer.finish_reason, answer.stop_reason) == (0, "length", None)
        assert len(answer.token_ids) == 12
        assert answer.text == llm.get_tokenizer().decode(answer.token_ids)
        assert answer.logprobs is None
    ids = [{"prompt_token_ids": o.prompt_token_ids} for o in outputs]
    again = llm.generate(ids, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in outputs]
    assert [o.prompt for o in again] == [None, None]
    plain = llm.generate([o.prompt_token_ids for o in outputs], GREEDY, use_tqdm=False)
    assert [o.outputs[0].text for o in plain] == [o.outputs[0].text for o in outputs]


def test_a_stop_string_across_token_boundaries(llm: LLM) -> None:
    text = llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].text
    stop = text[3:6]
    assert text.find(stop) == 3
    for include in (False, True):
        params = GREEDY.replace(stop=[stop], include_stop_str_in_output=include)
        answer = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
        assert answer.text == text[: 6 if include else 3]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert len(answer.token_ids) <= 12
    assert not llm._engine.has_work()


def test_a_stop_token_counts_but_does_not_show(llm: LLM) -> None:
    full = llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0]
    stop = full.token_ids[4]
    end = full.token_ids.index(stop) + 1
    params = GREEDY.replace(stop_token_ids=[stop])
    answer = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    assert answer.token_ids == full.token_ids[:end]
    assert answer.text == llm.get_tokenizer().decode(full.token_ids[: end - 1])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_end_of_sequence_has_no_stop_reason(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, logit_bias={257: 100.0}, temperature=0.0)
    answer = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    assert (answer.finish_reason, answer.stop_reason, answer.text) == ("stop", None, "")
    assert answer.token_ids == [257]


def test_logprobs_are_shaped_like_vllms(llm: LLM) -> None:
    params = GREEDY.replace(logprobs=3, prompt_logprobs=1)
    output = llm.generate("hello", params, use_tqdm=False)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 12
    total = 0.0
    for token, position in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(position)) == token
        assert len(position) == 3  # the greedy token is the likeliest of the three
        assert position[token].rank == 1
        assert position[token].decoded_token == llm.get_tokenizer().token_text(token)
        total += position[token].logprob
    assert answer.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for token, at in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert at is not None
        assert token in at


def test_n_answers_are_n_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=10, temperature=1.0, ignore_eos=True)
    three = llm.generate("abc", params, use_tqdm=False)[0].outputs
    assert [answer.index for answer in three] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in three}) == 3
    for i, answer in enumerate(three):
        alone = params.replace(n=1, seed=5 + i)
        found = llm.generate("abc", alone, use_tqdm=False)[0].outputs[0]
        assert found.token_ids == answer.token_ids


def test_cached_tokens_are_counted(llm: LLM) -> None:
    prompt = "a prompt that is longer than a page or two of sixteen tokens"
    first, second = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    output = llm.chat(messages, GREEDY, use_tqdm=False)[0]
    assert output.prompt == "<|user|>hi\n<|assistant|>"
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [o.outputs[0].text for o in two] == [output.outputs[0].text] * 2
    pieces = list(llm.stream_chat(messages, GREEDY))
    assert "".join(pieces) == output.outputs[0].text
    for _ in itertools.islice(llm.stream_chat(messages, GREEDY), 2):
        pass
    assert not llm._engine.has_work()


def test_one_bad_prompt_refuses_the_call_and_leaves_nothing(llm: LLM) -> None:
    for bad in ([], {"prompt_token_ids": []}, [99999], {"text": "x"}, {"prompt": "x" * 9999}):
        with pytest.raises(RequestError):
            llm.generate(["fine", bad], GREEDY, use_tqdm=False)
        assert not llm._engine.has_work()
    with pytest.raises(ValueError, match="2 prompts"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)


def test_ids_alone_need_no_tokenizer(folder: Path, llm: LLM) -> None:
    bare = LLM(str(folder), skip_tokenizer_init=True, **OPTIONS)
    ids = llm.get_tokenizer().encode("def f(x):")
    answer = bare.generate([ids], GREEDY, use_tqdm=False)[0].outputs[0]
    expected = llm.generate([ids], GREEDY, use_tqdm=False)[0].outputs[0]
    assert (answer.token_ids, answer.text) == (expected.token_ids, "")
    ended = SamplingParams(max_tokens=5, logit_bias={257: 100.0})
    assert bare.generate([ids], ended, use_tqdm=False)[0].outputs[0].finish_reason == "stop"
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        bare.generate("text", GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match="tokenizer"):
        bare.generate([ids], GREEDY.replace(stop=["x"]), use_tqdm=False)


def test_a_progress_bar_counts_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err


def test_what_cannot_be_built_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        LLM(str(tmp_path))
    with pytest.raises(ValueError, match="unknown option"):
        LLM(str(folder), max_modle_len=5)
    with pytest.raises(ValueError, match="too few for one request"):
        LLM(str(folder), dtype="float32", num_pages=2, page_size=16, max_model_len=64)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU here"):
            LLM(str(folder), device="cuda")
    with pytest.raises(ValueError, match="not both"):
        LLM(str(folder), config=EngineConfig())


def test_no_socket_library_is_imported(folder: Path, python: str, repository: Path) -> None:
    code = (
        "import sys; from tokenspeed import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, num_pages=8, page_size=16, max_model_len=64)\n"
        "out = llm.generate('a', SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)\n"
        "assert len(out[0].outputs[0].token_ids) == 3\n"
        "bad = {'zmq', 'msgspec', 'starlette', 'uvicorn', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([python, "-c", code], check=True, cwd=repository)


@pytest.mark.parametrize("depth", [0, 1])
def test_an_interrupt_in_the_middle_of_a_step_leaves_the_engine_whole(
    folder: Path, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(folder), overlap_depth=depth, **OPTIONS)
    expected = llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    launch, calls = llm._engine._runner.launch, itertools.count()

    def interrupted(words: Any) -> Any:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return launch(words)

    monkeypatch.setattr(llm._engine._runner, "launch", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc", "de"], GREEDY, use_tqdm=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert llm._engine.stats().kv_cache_usage == 0
    assert llm._engine.stats().num_running == 0


def test_streams_that_are_open_at_once_lose_nothing_to_each_other(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("a", "something else")]
    alone = ["".join(llm.stream_chat(one, GREEDY)) for one in conversations]
    first, second = (llm.stream_chat(one, GREEDY) for one in conversations)
    texts = [next(first), next(second)]
    expected = llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].text
    texts = [texts[0] + "".join(first), texts[1] + "".join(second)]
    assert texts == alone
    assert llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].text == expected
    assert llm._unread == {}
