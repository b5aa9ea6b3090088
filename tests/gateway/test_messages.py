# SPDX-License-Identifier: MIT
"""/v1/messages in process: every event and object by the SDK's types, streamed as whole."""

import asyncio
import itertools
import json
import re

import pytest
from anthropic.types import MessageTokensCount
from pydantic import TypeAdapter

from tests.gateway import anthropic_events as events
from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.scripted import Scripted

PATH = "/v1/messages"
HERMES = {"answer_format": "hermes"}
CALLS = (
    '<tool_call>\n{"name": "read", "arguments": {"path": "a/b.py", "lines": [1, 2.5], "é": "🙂"}}\n'
    '</tool_call>\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
)
ANSWER = f"<think>\nwéll, 🙂 think\n\nmore</think>\n\nI look at <b>.\n\nThen:\n{CALLS}"
TOOLS = [
    {"name": "read", "description": "Reads.", "input_schema": {"type": "object"}},
    {"name": "stop", "input_schema": {"type": "object", "properties": {}}},
]
BODY = {
    "model": "claude-of-some-day",
    "max_tokens": 2000,
    "messages": [{"role": "user", "content": "hello"}],
    "tools": TOOLS,
}


async def whole(g, body=BODY, **kwargs):
    reply = await g.post(PATH, body, **kwargs)
    assert reply.status_code == 200, reply.text
    events.whole_conforms(reply.json())
    return reply.json()


async def streamed(g, body=BODY):
    reply = await g.post(PATH, body | {"stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    message = events.joined(reply.text)
    events.whole_conforms(message)
    return message


async def test_blocks_in_order():
    async with gateway(echo=Scripted(ANSWER), config=HERMES) as g:
        message = await whole(g)
    assert (message["model"], message["role"]) == ("claude-of-some-day", "assistant")
    assert message["id"].startswith("msg_")
    thought, text, read, stop = message["content"]
    assert thought["thinking"] == "wéll, 🙂 think\n\nmore"
    assert text == {"type": "text", "text": "I look at <b>.\n\nThen:"}
    assert read["input"] == {"path": "a/b.py", "lines": [1, 2.5], "é": "🙂"}
    assert (stop["name"], stop["input"]) == ("stop", {})
    assert read["id"] != stop["id"]
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    usage = message["usage"]
    assert usage["output_tokens"] == len(TOKENIZER.encode(ANSWER, add_special_tokens=False)) + 1
    assert 0 < usage["output_tokens_details"]["thinking_tokens"] < usage["output_tokens"]


def cut(text, n):
    """In pieces of n characters, but for the markers: those are tokens here."""
    parts = re.split(r"(</?think>|</?tool_call>)", text)
    return [
        piece
        for i, part in enumerate(parts)
        for piece in ([part] if i % 2 else [part[j : j + n] for j in range(0, len(part), n)])
    ]


async def test_streams_say_the_same_however_they_are_cut():
    scripted = Scripted(ANSWER)
    async with gateway(echo=scripted, config=HERMES) as g:
        expected = events.anonymous(await whole(g))
        for n, burst in itertools.product((1, 2, 3, 5, 8, 13, 999), (1, 2, 3, 4, 5, 8, 999)):
            scripted.answers, scripted.burst = [cut(ANSWER, n)], burst
            message = events.anonymous(await streamed(g))
            assert message["content"] == expected["content"], (n, burst)
            assert message["stop_reason"] == expected["stop_reason"]
        assert events.anonymous(await whole(g))["content"] == expected["content"]


async def test_an_answer_cut_by_max_tokens_is_still_a_stream():
    """Blocks are closed, and what was whole stays whole."""
    scripted = Scripted(ANSWER)
    async with gateway(echo=scripted, config=HERMES) as g:
        complete = (await whole(g))["usage"]["output_tokens"]
        for n in range(1, complete, 4):
            body = BODY | {"max_tokens": n}
            message, same = await streamed(g, body), await whole(g, body)
            assert events.anonymous(message)["content"] == events.anonymous(same)["content"]
            assert message["stop_reason"] == same["stop_reason"] == "max_tokens"
            assert message["usage"]["output_tokens"] == n


async def test_golden_stream():
    answer = "<think>hm</think>\nA\n" + '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    async with gateway(echo=Scripted(answer, burst=999), config=HERMES) as g:
        reply = await g.post(PATH, BODY | {"stream": True}, headers={"x-request-id": "abc"})
    found = events.parse(reply.text)
    assert [event["type"] for event in found] == [
        "message_start",
        *["content_block_start", *["content_block_delta"] * 2, "content_block_stop"],
        *["content_block_start", "content_block_delta", "content_block_stop"] * 2,
        "message_delta",
        "message_stop",
    ]
    assert found[2]["delta"] == {"type": "thinking_delta", "thinking": "hm"}
    assert found[3]["delta"]["type"] == "signature_delta"
    assert reply.text.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert reply.headers["x-request-id"] == "abc"
    assert reply.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("burst", [1, 8])
async def test_stop_sequences(burst):
    async with gateway(echo=Scripted("one two three four", burst=burst)) as g:
        body = BODY | {"stop_sequences": ["zzz", "o thr"]}
        for message in (await whole(g, body), await streamed(g, body)):
            assert message["content"] == [{"type": "text", "text": "one tw"}]
            assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "o thr")
        ended = await whole(g)
    assert (ended["stop_reason"], ended["stop_sequence"]) == ("end_turn", None)


async def test_answers_of_white_space_have_no_blocks():
    async with gateway(echo=Scripted(" \n", "<think>\n \n</think>\n\n"), config=HERMES) as g:
        for _ in range(2):
            assert (await whole(g))["content"] == []
        g.echo.prompts.clear()
        for _ in range(2):
            assert (await streamed(g))["content"] == []


async def test_one_call_only_where_parallel_calls_are_off():
    body = BODY | {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    async with gateway(echo=Scripted(ANSWER), config=HERMES) as g:
        for message in (await whole(g, body), await streamed(g, body)):
            assert [block["type"] for block in message["content"]] == [
                "thinking",
                "text",
                "tool_use",
            ]
            assert message["stop_reason"] == "tool_use"


async def test_thoughts_can_be_left_out_but_for_their_signature():
    body = BODY | {"thinking": {"type": "adaptive", "display": "omitted"}}
    async with gateway(echo=Scripted(ANSWER), config=HERMES) as g:
        shown = (await whole(g))["content"][0]
        for message in (await whole(g, body), await streamed(g, body)):
            assert message["content"][0] == shown | {"thinking": ""}


async def test_usage_adds_up_and_tells_the_cache():
    text = {"type": "text", "text": "word " * 200}
    plain = BODY | {"messages": [{"role": "user", "content": [text]}], "max_tokens": 4}
    kept = {"type": "ephemeral", "ttl": "1h"}
    marked = plain | {"messages": [{"role": "user", "content": [text | {"cache_control": kept}]}]}
    async with gateway() as g:
        counted = (await g.post(f"{PATH}/count_tokens", plain)).json()["input_tokens"]
        cold, warm = await whole(g, plain), await streamed(g, plain)
        g.echo._seen.clear()
        made = await streamed(g, marked)
        retentions = [r.retention.seconds for r in g.client.requests]
    assert cold["usage"]["input_tokens"] == counted
    assert cold["usage"]["cache_creation_input_tokens"] == 0
    read = (counted - 1) // 64 * 64
    assert warm["usage"]["cache_read_input_tokens"] == read
    assert warm["usage"]["input_tokens"] == counted - read
    written = counted // 64 * 64
    assert made["usage"]["input_tokens"] == counted - written
    assert made["usage"]["cache_creation_input_tokens"] == written
    assert made["usage"]["cache_creation"] == {
        "ephemeral_5m_input_tokens": 0,
        "ephemeral_1h_input_tokens": written,
    }
    assert retentions == [0.0, 0.0, 3600.0]


async def test_a_receipt_for_who_asks():
    async with gateway() as g:
        plain = await whole(g)
        asked = (await g.post(PATH, BODY | {"cache_receipt": True})).json()["usage"]
        headers = {"x-tokenspeed-receipt": "1"}
        reply = await g.post(PATH, BODY | {"stream": True}, headers=headers)
    assert "cache_receipt" not in plain["usage"]
    start, end = (events.parse(reply.text)[i] for i in (0, -2))
    for usage in (asked, start["message"]["usage"], end["usage"]):
        assert usage["cache_receipt"]["matched"] == usage["cache_read_input_tokens"] > 0


async def test_message_start_has_the_real_input():
    async with gateway() as g:
        await whole(g)
        counted = (await g.post(f"{PATH}/count_tokens", BODY)).json()["input_tokens"]
        reply = await g.post(PATH, BODY | {"stream": True})
    usage = events.parse(reply.text)[0]["message"]["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted
    assert usage["cache_read_input_tokens"] > 0


async def test_count_tokens_needs_no_max_tokens_and_submits_nothing():
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    async with gateway() as g:
        reply = await g.post(f"{PATH}/count_tokens?beta=true", body)
        assert g.client.requests == []
        events.conforms(reply.json(), TypeAdapter(MessageTokensCount))
        more = await g.post(f"{PATH}/count_tokens", body | {"system": "Be brief."})
    assert more.json()["input_tokens"] > reply.json()["input_tokens"]


async def test_no_tokens_wanted_only_caches_the_prompt():
    body = BODY | {"max_tokens": 0}
    async with gateway() as g:
        for message in (await whole(g, body), await streamed(g, body)):
            assert message["content"] == []
            assert message["usage"]["output_tokens"] == 0
            assert message["stop_reason"] == "max_tokens"
        assert (await whole(g))["usage"]["cache_read_input_tokens"] > 0


async def test_signs_of_life_before_and_after_the_first_token():
    class Slow(Scripted):
        def step(self):
            self.turn = getattr(self, "turn", 0) + 1
            return super().step() if self.turn % 500 == 0 else []

    async with gateway(echo=Slow("a b"), keepalive_s=0.25) as g:
        g.client.paused = True
        task = asyncio.create_task(g.post(PATH, BODY | {"stream": True}))
        await asyncio.sleep(0.8)
        g.client.paused = False
        while g.echo.num_steps == 0:
            await asyncio.sleep(0.001)
        g.client.paused = True
        await asyncio.sleep(0.8)
        g.client.paused = False
        text = (await task).text
    before, _, after = text.partition("event: message_start")
    assert before
    assert set(before.split("\n\n")) == {": keep-alive", ""}
    assert 'event: ping\ndata: {"type":"ping"}\n\n' in after
    assert events.joined(text)["content"] == [{"type": "text", "text": "a b"}]


async def test_late_errors_are_events():
    async with gateway(echo=Scripted("a b c", error="numbers are not finite")) as g:
        reply = await g.post(PATH, BODY | {"stream": True})
        assert reply.status_code == 200
        found = events.parse(reply.text)
        status = (await g.post(PATH, BODY)).status_code
    reader = events.Reader()
    for event in found:
        reader.feed(event)
    assert reader.state == "failed"
    assert found[-1]["error"] == {"type": "api_error", "message": "numbers are not finite"}
    assert status == 500


async def test_thinking_comes_back_exactly():
    template = "{{ messages | tojson }}"
    async with gateway(echo=Scripted(ANSWER), config=HERMES, template=template) as g:
        message = await whole(g)
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "done"}
            for block in message["content"]
            if block["type"] == "tool_use"
        ]
        history = [
            *BODY["messages"],
            {"role": "assistant", "content": message["content"]},
            {"role": "user", "content": results},
        ]
        await whole(g, BODY | {"messages": history})
        rendered = json.loads(TOKENIZER.decode(g.echo.prompts[-1]))
        # History may come from elsewhere: signatures are not asked for.
        history[1]["content"][0]["signature"] = "of somebody else"
        await whole(g, BODY | {"messages": history})
        again = json.loads(TOKENIZER.decode(g.echo.prompts[-1]))
    assert rendered == again
    assert rendered[1]["reasoning_content"] == "wéll, 🙂 think\n\nmore"
    assert rendered[1]["content"] == "I look at <b>.\n\nThen:"
    assert [call["id"] for call in rendered[1]["tool_calls"]] == [
        result["tool_use_id"] for result in results
    ]
    assert [m["role"] for m in rendered] == ["user", "assistant", "tool", "tool"]


async def test_formats_and_forced_tools_go_by_grammar():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    given = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    wrong = {"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}
    strict = [TOOLS[0] | {"strict": True}]
    choices = [{"type": "any"}, {"type": "tool", "name": "stop"}]
    async with gateway(echo=Scripted('{"a": 1}'), config=HERMES) as g:
        for more in (
            given | {"tools": None},
            {"tools": strict},
            *({"tool_choice": choice} for choice in choices),
        ):
            await whole(g, BODY | more)
            assert g.client.requests[-1].params.grammar is not None
        await whole(g)
        await whole(g, BODY | {"tool_choice": {"type": "none"}})
        refused = await g.post(PATH, BODY | wrong | {"tools": None})
        assert [r.params.grammar for r in g.client.requests[-2:]] == [None, None]
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("output_config.format: ")
