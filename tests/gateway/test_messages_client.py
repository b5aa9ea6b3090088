# SPDX-License-Identifier: MIT
"""The `anthropic` SDK against the gateway in process, and errors as it types them."""

import itertools
import json
from contextlib import asynccontextmanager

import anthropic
import httpx2
import pytest
from anthropic.types import ErrorResponse
from pydantic import TypeAdapter

from tests.gateway import anthropic_events as events
from tests.gateway.harness import gateway
from tests.gateway.scripted import Scripted
from tokenspeed.gateway.messages_schema import MessagesRequest

CONFIG = {"answer_format": "hermes"}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "é", "n": [1, 2]}}\n</tool_call>'
ANSWER = f"<think>\nhm</think>\n\nI look.\n{CALL}"
TOOL = {"name": "f", "input_schema": {"type": "object"}}
ASK = {
    "model": "claude-any",
    "max_tokens": 500,
    "messages": [{"role": "user", "content": "hello"}],
    "tools": [TOOL],
}
PATH = "/v1/messages"


@asynccontextmanager
async def client(g, **options):
    transport = httpx2.ASGITransport(g.app)
    options = {"api_key": "secret", "max_retries": 0} | options
    async with httpx2.AsyncClient(transport=transport) as http:
        yield anthropic.AsyncAnthropic(base_url="http://localhost", http_client=http, **options)


async def test_a_loop_of_the_sdk():
    echo = Scripted(ANSWER, ANSWER, "Done.", burst=3)
    async with gateway(echo=echo, config=CONFIG, keys=("secret",)) as g, client(g) as c:
        message = await c.messages.create(**ASK)
        async with c.messages.stream(**ASK) as stream:
            said = "".join([text async for text in stream.text_stream])
            streamed = await stream.get_final_message()
        assert said == "I look."
        for one in (message, streamed):
            thought, text, use = one.content
            assert thought.thinking == "hm"
            assert text.text == "I look."
            assert use.input == {"x": "é", "n": [1, 2]}
            assert one.stop_reason == "tool_use"
        assert streamed.usage.output_tokens == message.usage.output_tokens
        history = [
            *ASK["messages"],
            {"role": "assistant", "content": message.content},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "42"}],
            },
        ]
        history[2]["content"][0]["tool_use_id"] = message.content[2].id
        done = await c.messages.create(**ASK | {"messages": history})
        assert done.content[0].text == "Done."
        counted = await c.messages.count_tokens(
            model="x", messages=history, tools=[TOOL], system="word " * 50
        )
        plain = await c.messages.count_tokens(model="x", messages=history, tools=[TOOL])
        usage = done.usage
        assert plain.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
        assert counted.input_tokens > plain.input_tokens


async def test_the_beta_client_and_a_bearer_token():
    betas = ["context-management-2025-06-27", "mcp-client-2025-11-20"]
    async with (
        gateway(echo=Scripted("ok"), keys=("secret",)) as g,
        client(g, api_key=None, auth_token="secret") as c,
    ):
        message = await c.beta.messages.create(**ASK, betas=betas)
    assert message.content[0].text == "ok"
    assert message.model == "claude-any"


async def test_typed_errors():
    async with gateway(keys=("secret",)) as g:
        async with client(g, api_key="wrong") as c:
            with pytest.raises(anthropic.AuthenticationError):
                await c.messages.create(**ASK)
        async with client(g) as c:
            with pytest.raises(anthropic.BadRequestError) as wrong:
                await c.messages.create(**ASK, extra_body={"temperature": 1000.0})
            assert wrong.value.body["error"]["message"].startswith("temperature: ")
            assert wrong.value.request_id == wrong.value.body["request_id"]
            with pytest.raises(anthropic.NotFoundError):
                await c.messages.batches.list()
            g.pool.draining = True
            with pytest.raises(anthropic.InternalServerError) as busy:
                await c.messages.create(**ASK)
            assert busy.value.status_code == 503
            assert busy.value.type == "overloaded_error"
            assert int(busy.value.response.headers["retry-after"]) > 0
            g.pool.draining = False


async def test_models_are_listed_for_both_dialects():
    async with gateway(keys=("secret",)) as g, client(g) as c:
        listed = [model async for model in c.models.list()]
        one = await c.models.retrieve("null")
    assert [model.id for model in listed] == ["null", "org/alias"]
    assert one == listed[0]
    assert one.type == "model"
    assert one.max_input_tokens == 4096
    assert one.created_at.tzinfo is not None


async def test_late_errors_are_typed():
    async with gateway(echo=Scripted("a b c", error="not finite")) as g, client(g) as c:
        with pytest.raises(anthropic.APIStatusError, match="not finite"):
            async for _ in await c.messages.create(**ASK, stream=True):
                pass


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "kind"),
    [
        ("POST", PATH, {"json": ASK, "headers": {"x-api-key": "no"}}, 401, "authentication_error"),
        ("POST", f"{PATH}/count_tokens", {"headers": {}}, 401, "authentication_error"),
        ("GET", f"{PATH}/none", {"headers": {}}, 401, "authentication_error"),
        ("GET", PATH, {}, 405, "invalid_request_error"),
        ("DELETE", f"{PATH}/count_tokens", {}, 405, "invalid_request_error"),
        ("POST", f"{PATH}/batches", {}, 404, "not_found_error"),
        ("POST", PATH, {"content": b"{}"}, 415, "invalid_request_error"),
        ("POST", PATH, {"content": b"{", "headers": JSON}, 400, "invalid_request_error"),
        ("POST", PATH, {"content": b'"\xff"', "headers": JSON}, 400, "invalid_request_error"),
        ("POST", PATH, {"content": b"x" * 3000, "headers": JSON}, 413, "request_too_large"),
        ("POST", PATH, {"json": {}}, 400, "invalid_request_error"),
        ("POST", PATH, {"json": ASK | {"max_tokens": None}}, 400, "invalid_request_error"),
        ("POST", PATH, {"json": ASK | {"model": 5}}, 400, "invalid_request_error"),
    ],
)
async def test_errors_before_and_in_handlers_have_the_dialects_shape(
    method, path, more, status, kind
):
    headers = (
        {"x-api-key": "secret", **more.get("headers", {})} if more.get("headers") != {} else {}
    )
    async with gateway(keys=("secret",), max_body_bytes=2048) as g:
        reply = await g.http.request(method, path, **more | {"headers": headers})
        elsewhere = await g.http.request("DELETE", "/v1/messagesX", headers=headers)
    assert reply.status_code == status, reply.text
    if kind != "request_too_large":  # is documented, but no type of the SDK
        events.conforms(reply.json(), TypeAdapter(ErrorResponse))
    assert reply.json()["error"]["type"] == kind
    assert reply.json()["request_id"] == reply.headers["request-id"]
    assert "param" in elsewhere.json()["error"]  # another dialect's


async def test_messages_name_fields():
    async with gateway() as g:
        for body, said in (
            ({}, "model: field required"),
            ({"model": "m"}, "messages: field required"),
            ({"model": "m", "messages": ASK["messages"]}, "max_tokens: field required"),
            (ASK | {"max_tokens": -1}, "max_tokens: Expected `int` >= 0"),
            (ASK | {"stop_sequences": [5]}, "stop_sequences.0: Expected `str`, got `int`"),
            (ASK | {"stop_sequences": [""]}, "stop_sequences: at most 32 strings"),
            (ASK | {"top_p": 7.0}, "top_p: must be a number in (0.0, 1.0]"),
            (ASK | {"thinking": 5}, "thinking: Expected `object | null`, got `int`"),
            (ASK | {"tools": [{"name": "f"}]}, "tools.0.input_schema: must be an object"),
            (ASK | {"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name: there is no"),
            (
                ASK | {"messages": [{"role": "user", "content": [{"type": "a" * 5000}]}]},
                "messages.0",
            ),
        ):
            reply = await g.post(PATH, body)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["message"].startswith(said), reply.text
            assert len(reply.json()["error"]["message"]) <= 600


async def test_deep_json_is_refused_everywhere():
    deep: object = "x"
    for _ in range(100):
        deep = {"a": deep}
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": deep}}
    bodies = [
        ASK | {"tools": [TOOL | {"input_schema": {"a": deep}}]},
        ASK | {"messages": [*ASK["messages"], {"role": "assistant", "content": [use]}]},
        ASK | {"output_config": {"format": {"type": "json_schema", "schema": {"a": deep}}}},
        ASK | {"tool_choice": {"type": "auto", "a": deep}},
        ASK | {"system": [{"type": "text", "text": "a", "cache_control": {"a": deep}}]},
    ]
    async with gateway() as g:
        for body in bodies:
            reply = await g.post(PATH, body)
            assert reply.status_code == 400
            assert "nested too deeply" in reply.json()["error"]["message"]


async def test_any_value_in_any_field_is_served_or_named():
    values = '-1 0 1.5 1e308 2147483648 true null "x" "" [] {} [5] [{}] {"type":"x"} NaN'.split()
    values += ["9" * 30, "9" * 5000, '[[["a"]]]', '"\\ud800"', '{"type":["a"],"name":{}}']
    fields = MessagesRequest.__struct_fields__
    async with gateway(echo=Scripted("ok")) as g:
        for field, value in itertools.product((*fields, "of_tomorrow"), values):
            body = json.dumps(ASK | {"max_tokens": 2, field: "@"}).replace('"@"', value)
            reply = await g.http.post(PATH, content=body, headers=JSON)
            assert reply.status_code in (200, 400), (field, value[:40], reply.text)
            if reply.status_code == 400 and "\\" not in value:
                assert reply.json()["error"]["message"].startswith(field), (value[:40], reply.text)
