# SPDX-License-Identifier: MIT
"""Chat completions: shapes, framing, stop strings, usage, seeds, in process."""

import json

import pytest

from benchmarks.null_engine import Echo
from tests.gateway.harness import TOKENIZER, gateway
from tokenspeed.engine.messages import GenerateRequest

CHAT = "/v1/chat/completions"
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"  # the echo is then the content
HELLO = [{"role": "user", "content": "héllo 🙂 wörld"}]
NUM = len(TOKENIZER.encode("héllo 🙂 wörld", add_special_tokens=False))


class Bursts(Echo):
    """Several tokens of a request in one output, as speculation gives them."""

    def step(self):
        merged = {}
        for _ in range(3):
            for output in super().step():
                before = merged.get(output.request_id)
                ids = (before.token_ids if before else []) + output.token_ids
                merged[output.request_id] = type(output)(
                    output.request_id, ids, output.finish_reason, output.stop_token_id
                )
        return list(merged.values())


async def test_whole_answer():
    async with gateway(template=PLAIN) as g:
        reply = await g.post(CHAT, {"messages": HELLO, "max_tokens": NUM, "model": "org/alias"})
    assert reply.status_code == 200
    body = reply.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "org/alias")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "héllo 🙂 wörld"},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": NUM,
        "completion_tokens": NUM,
        "total_tokens": 2 * NUM,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@pytest.mark.parametrize("engine", [Echo, Bursts])
async def test_stream_says_the_same_as_the_whole(engine):
    body = {"messages": HELLO, "max_tokens": NUM + 3, "stream_options": {"include_usage": True}}
    async with gateway(echo=engine(), template=PLAIN) as g:
        whole = (await g.post(CHAT, {**body, "stream": False})).json()
        events = await g.events(CHAT, body)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [e["choices"][0]["delta"]["content"] for e in events[:-1]]
    assert all("\ufffd" not in text for text in texts)
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]][-1] == "length"
    assert all(e["usage"] is None for e in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert len({e["id"] for e in events}) == 1


async def test_role_comes_even_if_the_first_token_shows_nothing():
    async with gateway() as g:  # the demo's template begins with a special token
        events = await g.events(CHAT, {"messages": HELLO, "max_tokens": 9})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in e["choices"][0]["delta"] for e in events[1:])


async def test_golden_framing():
    async with gateway(template=PLAIN) as g:
        reply = await g.post(
            CHAT,
            {
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 2,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            headers={"x-request-id": "abc-1"},
        )
    first = json.loads(reply.text.split("\n\n")[0][6:])
    head = f'"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]}'
    head = f'data: {{{head},"model":"null","choices":['
    no_usage = '],"usage":null}\n\n'
    delta = '"delta":{"role":"assistant","content":""}'
    usage = '"prompt_tokens":1,"completion_tokens":2,"total_tokens":3'
    usage += ',"prompt_tokens_details":{"cached_tokens":0}'
    usage += ',"completion_tokens_details":{"reasoning_tokens":0}'
    assert reply.text == (
        f'{head}{{"index":0,{delta},"logprobs":null,"finish_reason":null}}{no_usage}'
        f'{head}{{"index":0,"delta":{{"content":"x"}},"logprobs":null,"finish_reason":null}}'
        f"{no_usage}"
        f'{head}{{"index":0,"delta":{{"content":"x"}},"logprobs":null,'
        f'"finish_reason":"length","stop_reason":null}}{no_usage}'
        f'{head}],"usage":{{{usage}}}}}\n\n'
        "data: [DONE]\n\n"
    )
    assert reply.headers["x-request-id"] == "abc-1"
    assert reply.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("engine", [Echo, Bursts])
@pytest.mark.parametrize("include", [False, True])
async def test_stop_string_across_tokens(engine, include):
    body = {
        "messages": [{"role": "user", "content": "one two three"}],
        "stop": ["o thr", "zzz"],
        "include_stop_str_in_output": include,
        "max_tokens": 100,
    }
    expected = "one two thr" if include else "one tw"
    async with gateway(echo=engine(), template=PLAIN) as g:
        whole = (await g.post(CHAT, body)).json()["choices"][0]
        events = await g.events(CHAT, body)
        # Ended by their text, not by their clients.
        assert g.client.metrics.finished == {"stop": 2}
    assert whole["message"]["content"] == expected
    assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", "o thr")
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == expected
    assert events[-1]["choices"][0]["stop_reason"] == "o thr"


async def test_end_of_turn_is_not_shown_and_stop_token_is_named():
    body = {"messages": [{"role": "user", "content": "a b"}], "max_tokens": 100}
    b = TOKENIZER.encode(" b", add_special_tokens=False)
    async with gateway() as g:
        template_ends = (await g.post(CHAT, body)).json()["choices"][0]
        stopped = (await g.post(CHAT, {**body, "stop_token_ids": b})).json()["choices"][0]
        ignored = (await g.post(CHAT, {**body, "ignore_eos": True})).json()["choices"][0]
    assert (template_ends["finish_reason"], template_ends["stop_reason"]) == ("stop", None)
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", b[0])
    assert not stopped["message"]["content"].endswith(" b")
    assert ignored["finish_reason"] == "length"


async def test_several_choices_have_seeds_of_their_own():
    async with gateway(template=PLAIN) as g:
        body = {"messages": HELLO, "n": 3, "seed": 2**63 - 1, "max_tokens": 2}
        reply = (await g.post(CHAT, body)).json()
        events = await g.events(CHAT, body)
        requests = [s for s in g.client.sent if isinstance(s, GenerateRequest)]
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["prompt_tokens"] == NUM
    assert reply["usage"]["completion_tokens"] == 6
    assert [r.params.seed for r in requests[:3]] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert all(r.params.n == 1 for r in requests)
    assert len({r.request_id for r in requests}) == 6
    assert {e["choices"][0]["index"] for e in events} == {0, 1, 2}


async def test_logprobs_shape():
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    async with gateway(template=PLAIN) as g:
        whole = (await g.post(CHAT, body)).json()["choices"][0]
        events = await g.events(CHAT, body)
    first = whole["logprobs"]["content"][0]
    assert (first["token"], first["logprob"]) == ("h", -0.5)
    assert bytes(first["bytes"]) == b"h"
    assert [t["logprob"] for t in first["top_logprobs"]] == [-1.0, -2.0]
    streamed = [p for e in events[1:] for p in e["choices"][0]["logprobs"]["content"]]
    assert streamed == whole["logprobs"]["content"]


async def test_token_ids_and_continuous_usage():
    body = {
        "messages": HELLO,
        "return_token_ids": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 3,
    }
    ids = TOKENIZER.encode(HELLO[0]["content"], add_special_tokens=False)
    async with gateway(template=PLAIN) as g:
        whole = (await g.post(CHAT, {**body, "stream_options": None})).json()
        events = await g.events(CHAT, body)
    assert whole["prompt_token_ids"] == events[0]["prompt_token_ids"] == ids
    assert whole["choices"][0]["token_ids"] == ids[:3]
    assert [i for e in events[1:-1] for i in e["choices"][0]["token_ids"]] == ids[:3]
    assert [e["usage"]["completion_tokens"] for e in events[1:-1]] == [1, 2, 3]


async def test_cached_tokens_are_exact():
    body = {"messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 1}
    async with gateway(template=PLAIN) as g:
        cold = (await g.post(CHAT, body)).json()["usage"]
        warm = (await g.post(CHAT, body)).json()["usage"]
        other = (await g.post(CHAT, {**body, "cache_salt": "mine"})).json()["usage"]
    assert cold["prompt_tokens_details"]["cached_tokens"] == 0
    assert warm["prompt_tokens_details"]["cached_tokens"] == (warm["prompt_tokens"] - 1) // 64 * 64
    assert other["prompt_tokens_details"]["cached_tokens"] == 0


async def test_history_with_tools_and_reasoning_is_rendered():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "auto",
        "max_tokens": 100,
    }
    template = "{{ tools | tojson }}{{ messages | tojson }}"
    async with gateway(template=template) as g:
        reply = await g.post("/tokenize", {k: body[k] for k in ("messages", "tools")})
        text = TOKENIZER.decode(reply.json()["tokens"])
        answer = await g.post(CHAT, body)
    assert json.loads(text.partition("]")[0] + "]") == body["tools"]
    assert '"reasoning_content": "hm"' in text
    assert '"arguments": {"x": 1}' in text
    assert answer.status_code == 200


async def test_max_tokens_is_what_the_context_leaves():
    async with gateway(template=PLAIN) as g:
        for field in ("max_tokens", "max_completion_tokens"):
            reply = await g.post(CHAT, {"messages": HELLO, field: 10**9})
            assert reply.json()["usage"]["total_tokens"] == 4096
        reply = await g.post(CHAT, {"messages": HELLO})
        assert reply.json()["usage"]["total_tokens"] == 4096
        reply = await g.post(CHAT, {"messages": HELLO, "max_tokens": 9, "max_completion_tokens": 2})
        assert reply.json()["usage"]["completion_tokens"] == 2
