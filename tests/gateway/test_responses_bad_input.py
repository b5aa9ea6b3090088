# SPDX-License-Identifier: MIT
"""/v1/responses with anything in any field: served, or refused by name; and what clients do."""

import asyncio
import itertools
import json

import openai
import pytest

from tests.gateway.harness import gateway
from tests.gateway.response_events import check_stream, parse
from tests.gateway.scripted import Scripted
from tests.gateway.test_responses import ADD, ANSWERS, HERMES, PATH, TEMPLATE, TOOLS
from tokenspeed.gateway.responses_schema import ResponsesRequest

FIELDS = ResponsesRequest.__struct_fields__
DEEP: list = []
for _ in range(100):
    DEEP = [DEEP]
VALUES = (
    *(0, -1, 1, 2**63, 1e308, 1.5, True, "", "x", "auto", "\x00", [], {}, [[]], [{}], [5], DEEP),
    *({"a": "b"}, {"type": []}, {"type": "function"}, {"format": {"type": 5}}, {"effort": 5}),
    *({"ttl": "1h"}, [{"type": []}], [{"type": {}, "role": []}], [{"type": "message"}]),
    *([{"role": "user"}], [{"type": "reasoning", "content": 5}], [{"type": "function_call"}]),
    [{"type": "additional_tools", "tools": [5, {}]}],
    [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}],
    [{"type": "tool_search", "execution": "client"}],
)


def served(*answers, **kwargs):
    return gateway(echo=Scripted(*answers, **kwargs), template=TEMPLATE, config=HERMES)


@pytest.mark.parametrize("field", FIELDS)
async def test_any_value_in_any_field_is_served_or_named(field):
    async with served("x") as g:
        for value in VALUES:
            if field in ("background", "stream") and value is True:
                continue
            reply = await g.post(PATH, {"input": "hi", "tools": [ADD], field: value})
            assert reply.status_code in (200, 400, 404), (value, reply.text)
            if reply.status_code != 200:
                error = reply.json()["error"]
                param = (error["param"] or "").replace("[", ".").partition(".")[0]
                # an instruction's items are named as input; a retention is one of two fields
                assert param == field or (field, param) == ("instructions", "input"), (value, error)
        assert (await g.post(PATH, {"input": "hi"})).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": "x", "previous_response_id": "resp_no"}, "previous_response_id", None),
        ({"input": "x", "conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"input": "x", "top_logprobs": 2}, "top_logprobs", "unsupported_parameter"),
        ({"input": "x", "truncation": "middle"}, "truncation", "invalid_value"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"input": "x", "metadata": {"a" * 65: "b"}}, "metadata", "invalid_value"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format", None),
        (
            {"input": "x", "text": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "text.format",
            "invalid_grammar",
        ),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"input": "x", "prompt_cache_retention": "for ever"}, "prompt_cache_retention", None),
    ],
)
async def test_refusals_name_the_field(body, param, code):
    async with served("x") as g:
        reply = await g.post(PATH, body)
    assert 400 <= reply.status_code < 405
    error = reply.json()["error"]
    assert error["param"] == param
    assert code in (None, error["code"])
    assert error["type"] == "invalid_request_error"


async def test_fields_that_nobody_knows_change_nothing():
    extra = {"client_metadata": {"a": 1}, "of_the_future": [1], "moderation": {}, "image": 5}
    async with served("x") as g:
        reply = await g.post(PATH, {"input": "hi", **extra})
    assert reply.status_code == 200


async def test_what_was_ignored_makes_a_harmless_header():
    tools = [{"type": f"é\r\nx-evil: {i} 🙂"} for i in range(1000)]
    async with served("x") as g:
        reply = await g.post(PATH, {"input": "hi", "tools": tools})
    assert reply.status_code == 200
    assert "x-evil" not in reply.headers
    named = reply.headers["x-tokenspeed-ignored"].split(", ")
    assert named[:2] == ["tools.???x-evil??0??", "tools.???x-evil??1??"]
    assert len(named) == 16


async def test_retention_reaches_the_engine():
    asked = [
        ({"prompt_cache_retention": "24h"}, 86400),
        ({"prompt_cache_retention": "in_memory"}, 0),
        ({"prompt_cache_options": {"ttl": "12h", "mode": "implicit"}}, 43200),
        ({}, 0),
    ]
    async with served("x") as g:
        for fields, _ in asked:
            await g.post(PATH, {"input": "hi", **fields})
        kept = [request.retention.seconds for request in g.client.requests]
    assert kept == [seconds for _, seconds in asked]


async def test_receipts_are_in_the_usage_of_who_asks():
    async with served("x") as g:
        body = {"input": "hi " * 300}
        plain = (await g.post(PATH, body)).json()["usage"]
        assert "cache_receipt" not in plain
        asked = (await g.post(PATH, body | {"cache_receipt": True})).json()["usage"]
        matched = asked["input_tokens_details"]["cached_tokens"]
        assert asked["cache_receipt"]["matched"] == matched > 0
        reply = await g.post(PATH, body | {"stream": True}, headers={"x-tokenspeed-receipt": "1"})
        assert check_stream(parse(reply.text))["usage"]["cache_receipt"]["matched"] == matched


@pytest.mark.parametrize(
    ("effort", "told"), [("none", "none"), ("minimal", "low"), ("xhigh", "high"), ("odd", "odd")]
)
async def test_effort_reaches_the_template(effort, told):
    template = "{{ reasoning_effort }} {{ enable_thinking is defined and not enable_thinking }}"
    async with gateway(echo=Scripted("x"), template=template, config=HERMES) as g:
        reply = await g.post(PATH, {"input": "hi", "reasoning": {"effort": effort}})
        assert reply.json()["reasoning"]["effort"] == effort
        prompt = g.service.tokenizer.decode(g.echo.prompts[0], skip_special_tokens=False)
    assert prompt == f"{told} {effort == 'none'}"


async def test_a_client_that_leaves_ends_its_answer():
    async with served("many words " * 300) as g:
        task = asyncio.create_task(g.post(PATH, {"input": "hi", "stream": True}))
        while not g.echo.running:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while g.echo.running:
            await asyncio.sleep(0)
        assert g.echo.num_aborted == 1
        assert g.service.responses.num_bytes == 0


async def test_silence_is_broken_before_the_first_token():
    async with gateway(echo=Scripted("x"), template=TEMPLATE, config=HERMES, keepalive_s=0.25) as g:
        g.client.paused = True
        task = asyncio.create_task(g.post(PATH, {"input": "hi", "stream": True}))
        while not g.client.requests:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.8)
        g.client.paused = False
        text = (await task).text
    assert (
        text.index("response.in_progress") < text.index(": keep-alive") < text.index("output_item")
    )
    check_stream(parse(text))


@pytest.mark.parametrize("name", ["reasoning", "function", "custom", "namespace", "own"])
async def test_the_sdk_reads_every_answer(name):
    async with served(ANSWERS[name]) as g:
        client = openai.AsyncOpenAI(
            api_key="x", base_url="http://localhost/v1", http_client=g.http, max_retries=0
        )
        whole = await client.responses.create(model="null", input="hi", tools=TOOLS)
        async with client.responses.stream(model="null", input="hi", tools=TOOLS[:3]) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert events[-1].type == "response.completed"
        if name != "own":  # whose tools the second request does not have
            assert final.output_text == whole.output_text
            assert [item.type for item in final.output] == [item.type for item in whole.output]
        again = await client.responses.retrieve(whole.id)
        assert again.to_dict() == whole.to_dict()
        listed = [item async for item in client.responses.input_items.list(whole.id)]
        assert listed[0].content[0].text == "hi"
        await client.responses.delete(whole.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(whole.id)


async def test_answers_are_the_same_however_tokens_come():
    """The events joined do not depend on how many tokens a step brings."""
    seen = set()
    for burst, stream in itertools.product((1, 2, 5, 99), (True, False)):
        echo = Scripted(ANSWERS["function"], burst=burst)
        async with gateway(echo=echo, template=TEMPLATE, config=HERMES) as g:
            reply = await g.post(PATH, {"input": "hi", "tools": TOOLS, "stream": stream})
        made = check_stream(parse(reply.text)) if stream else reply.json()
        for item in made["output"]:
            del item["id"]
            item.pop("call_id", None)
        seen.add(json.dumps(made["output"]) + json.dumps(made["usage"]["output_tokens"]))
    assert len(seen) == 1
