# SPDX-License-Identifier: MIT
"""Bad input, over every route: a typed 4xx that names the field, and a server none the worse."""

import asyncio
import itertools
import json
from types import SimpleNamespace

import httpx
import pytest

from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.test_processes import server
from tokenspeed.engine.messages import GenerateRequest
from tokenspeed.gateway.app import JSON_VALUES

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    TEXT: {"prompt": "hello", "max_tokens": 2},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [1]},
}
JSON = {"content-type": "application/json"}

NUMBERS = (
    "n max_tokens min_tokens temperature top_p top_k min_p repetition_penalty presence_penalty"
    " frequency_penalty seed prompt_logprobs top_logprobs logprobs max_completion_tokens best_of"
    " truncate_prompt_tokens length_penalty thinking_token_budget"
).split()
RAW_VALUES = (
    "NaN Infinity -Infinity 1e400 -1e400 -1 0 2147483648 9223372036854775808 -9223372036854775809"
    ' 1e308 null "1" [] {} true 1.5 '
).split()
RAW_VALUES += ["9" * 30, "9" * 5000, "-" + "9" * 5000]
# What a value may mean in a field is the field's business; what it may never do is a 5xx, and an
# error always names the field.
OWN_NAMES = {"top_logprobs": {"logprobs"}}


async def raw(g, path: str, field: str, value: str):
    body = json.dumps({**BODIES[path], field: "@"}).replace('"@"', value)
    return await g.http.post(path, content=body.encode(), headers=JSON)


async def send_numbers(g, path: str) -> dict[tuple[str, str], int]:
    """The statuses of the whole matrix of numeric fields and values."""
    statuses = {}
    for field, value in itertools.product(NUMBERS, RAW_VALUES):
        reply = await raw(g, path, field, value)
        statuses[field, value[:20]] = reply.status_code
        assert reply.status_code in (200, 400), (field, value[:40], reply.text[:300])
        if reply.status_code == 400:
            error = reply.json()["error"]
            assert error["param"] in {field, *OWN_NAMES.get(field, ())}, (field, value, error)
            assert error["type"] == "invalid_request_error"
            assert len(error["message"]) <= 600
    assert (await g.http.post(path, json=BODIES[path])).status_code == 200
    return statuses


@pytest.mark.full
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_numeric_fields_reach_the_real_engine(path):
    with server(real=True) as s:
        async with httpx.AsyncClient(base_url=s.url, timeout=120) as http:
            before = (await http.post(path, json={**BODIES[path], "temperature": 0})).json()
            await send_numbers(SimpleNamespace(http=http), path)
            after = (await http.post(path, json={**BODIES[path], "temperature": 0})).json()
    assert before["choices"] == after["choices"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_numeric_fields(path):
    async with gateway() as g:
        statuses = await send_numbers(g, path)
    # The matrix bites: these have no meaning anywhere.
    for field in ("temperature", "top_p", "min_p", "repetition_penalty"):
        for value in ("NaN", "Infinity", "-1", "1e400", "1e308", '"1"', "[]"):
            assert statuses[field, value] == 400
    for field in ("n", "max_tokens"):
        for value in ("-1", "0", "1.5", '"1"', "true", "NaN"):
            assert statuses[field, value] == 400


LISTS = {
    "logit_bias": [
        *(f'{{"{k}":1}}' for k in ("x", "1" * 30, " 5 ", "1_0", "\u0661")),
        '{"1":1e9}',
        '{"1":NaN}',
        '{"-1":1}',
        '{"99999999":1}',
        "[]",
        "1",
    ],
    "stop_token_ids": ["[-1]", "[1.5]", '["1"]', "[99999999999999999999]", "5", "[null]"],
    "allowed_token_ids": ["[]", "[-1]", "[99999999999999999999]", "{}"],
    "bad_words": ['[""]', "[1]", '"x"'],
    "stop": ['[""]', "[1]", "5", json.dumps(["x"] * 100), json.dumps("x" * 5000)],
    "cache_salt": ['""', '"\\u0000"', '"ü"', "5", json.dumps("x" * 1000), '"a b"'],
    "stream_options": ["5", "[]", '{"include_usage": 5}'],
    "stream": ['"yes"', "1"],
    "model": ["5", "[]"],
    "chat_template": ['"{{ 1 }}"'],
    "messages": ["[]", "5", "{}", "[5]", '["x"]', "null"],
    "prompt": ["[]", '""', "5", "{}", "null", "[[]]", '[["a"]]', "[1.5]", "[null]", "[-1]", "[[1]"],
    "tools": ["5", "{}", "[5]"],
    "response_format": ['{"type":"json_schema"}', '{"type":"zebra"}', "5"],
    "tool_choice": ['"required"', '{"type":"function"}', "5"],
    "structured_outputs": ['{"regex":"(a+"}', '{"regex":"a","choice":["b"]}', "5"],
    "guided_json": ['{"type":"object"}'],
    "functions": ['[{"name":"f"}]'],
    "suffix": ['"x"'],
    "add_generation_prompt": ["5"],
    "chat_template_kwargs": ['{"messages":[]}', "5", '{"self":1}', '{"tools":1}'],
}
ONLY = {"suffix": TEXT, "prompt": TEXT}
CHAT_ONLY = {"messages", "tools", "tool_choice", "functions", "chat_template", "echo"}
CHAT_ONLY |= {"add_generation_prompt", "chat_template_kwargs"}


@pytest.mark.parametrize("field", LISTS)
async def test_other_fields(field):
    async with gateway() as g:
        for path in (CHAT, TEXT):
            if ONLY.get(field, CHAT if field in CHAT_ONLY else path) != path:
                continue
            for value in LISTS[field]:
                reply = await raw(g, path, field, value)
                assert reply.status_code == 400, (path, value, reply.text)
                param = reply.json()["error"]["param"]
                wanted = value == "[[1]" or param.partition("[")[0].partition(".")[0] == field
                assert wanted, (path, value, reply.text)


BROKEN = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"{'a': 1}",
    b'{"messages":[{"role":"user","content":"x"}]} trailing',
    b'{"messages": [{"role":"user","content":"\xff\xfe"}], "prompt": "\xff"}',
    b'{"messages": [{"role":"user","content":"\\ud800"}], "prompt": "\\ud800",'
    b' "tokens": ["\\ud800"]}',
    b'{"model": "\\ud800", "messages": [{"role":"user","content":"x"}], "prompt": "x",'
    b' "tokens": []}',
    b"[" * 100_000,
    b'{"x":' * 100_000,
    b'{"messages":[{"role":"user","content":' + b"[" * 100_000,
    b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b', "tokens": ' + b"[" * 900 + b"]" * 900 + b"}",
    b"\x00" * 100,
    b"\x1f\x8b\x08\x00",
    b'{"messages": [], "prompt": "", "metadata": [' + b"1," * (1 << 20) + b"1]}",
]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
async def test_broken_json(path, body):
    async with gateway() as g:
        reply = await g.http.post(path, content=body, headers=JSON)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(reply.content) < 1000
        assert (await g.post(path, BODIES[path])).status_code == 200
        assert not any(isinstance(s, GenerateRequest) for s in g.client.sent[:-1])


async def test_more_values_than_any_conversation_has():
    many = [{"role": "user", "content": "x"}] * 100_000
    sent = {
        "/v1/chat/completions": {"messages": many},
        "/v1/messages": {"model": "m", "max_tokens": 2, "messages": many},
        "/v1/responses": {"input": many},
    }
    async with gateway() as g:
        for path, body in sent.items():
            reply = await g.post(path, body)
            assert reply.status_code == 400
            assert f"more than {JSON_VALUES} values" in reply.json()["error"]["message"]


async def test_deep_but_valid_json_stops_before_the_template():
    deep = json.loads("[" * 200 + "]" * 200)
    async with gateway() as g:
        for body in (
            {"messages": [{"role": "user", "content": "x", "more": deep}]},
            {"messages": BODIES[CHAT]["messages"], "tools": [{"x": deep}]},
            {"messages": BODIES[CHAT]["messages"], "chat_template_kwargs": {"x": deep}},
        ):
            for path in (CHAT, "/tokenize"):
                reply = await g.post(path, body)
                assert reply.status_code == 400
                assert reply.json()["error"]["code"] == "json_too_deep"


@pytest.mark.parametrize(
    ("path", "change", "status", "code"),
    [
        (CHAT, {"model": "gpt-5"}, 404, "model_not_found"),
        (TEXT, {"model": "x" * 10**6}, 404, "model_not_found"),
        ("/tokenize", {"model": "gpt-5"}, 404, "model_not_found"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 300_000}]}, 400, None),
        (TEXT, {"prompt": "word " * 5000}, 400, "context_length_exceeded"),
        (TEXT, {"prompt": [1] * 4096}, 400, "context_length_exceeded"),
        (TEXT, {"prompt": [[1], [2] * 5000]}, 400, "context_length_exceeded"),
        (TEXT, {"prompt": [1 << 20]}, 400, "invalid_token_id"),
        (TEXT, {"prompt": [10**30]}, 400, "invalid_token_id"),
        (TEXT, {"prompt": ["x"] * 1000}, 400, "empty_prompt"),
        (CHAT, {"n": 1_000_000}, 400, "invalid_value"),
        (TEXT, {"prompt": ["x"] * 200, "n": 100}, 400, "invalid_value"),
        (TEXT, {"prompt": ["x"] * 200}, 503, "overloaded"),
        (CHAT, {"best_of": 5}, 400, "unsupported_parameter"),
        (TEXT, {"echo": True, "logprobs": 1}, 400, "unsupported_parameter"),
        (CHAT, {"top_logprobs": 3}, 400, "invalid_value"),
        ("/tokenize", {"prompt": "x" * 1_000_000}, 400, "context_length_exceeded"),
    ],
)
async def test_requests_that_cannot_be_served(path, change, status, code):
    async with gateway(config={"max_queue_len": 50}) as g:
        reply = await g.post(path, {**BODIES[path], **change})
        assert reply.status_code == status, reply.text
        assert reply.json()["error"]["code"] == (code or "context_length_exceeded")
        assert len(reply.content) < 1200
        if reply.json()["error"]["code"] == "context_length_exceeded":
            assert reply.json()["error"]["param"] in ("prompt", "messages")
        if status == 503:
            assert int(reply.headers["retry-after"]) >= 1
        assert not [s for s in g.client.sent if isinstance(s, GenerateRequest)]
        assert (await g.post(path, BODIES[path])).status_code == 200


async def test_unknown_fields_are_accepted():
    async with gateway() as g:
        extra = {"user": "u", "metadata": {"a": 1}, "store": True, "no_such_field": [1, 2]}
        extra |= {"prompt_cache_key": "k", "parallel_tool_calls": False, "service_tier": "auto"}
        for path in (CHAT, TEXT):
            assert (await g.post(path, {**BODIES[path], **extra})).status_code == 200


async def test_nulls_mean_defaults():
    async with gateway() as g:
        for path in (CHAT, TEXT):
            for field in NUMBERS:
                body = {**BODIES[path], field: None}
                assert (await g.post(path, body)).status_code == 200, field


async def test_content_type_and_size():
    async with gateway(max_body_bytes=2000) as g:
        body = json.dumps(BODIES[CHAT]).encode()
        plain = await g.http.post(CHAT, content=body, headers={"content-type": "text/plain"})
        assert plain.status_code == 415
        utf8 = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await g.http.post(CHAT, content=body, headers=utf8)).status_code == 200
        big = await g.http.post(CHAT, content=b"x" * 3000, headers=JSON)
        assert (big.status_code, big.json()["error"]["code"]) == (413, "body_too_large")

        async def pieces():
            for _ in range(10):
                yield b"x" * 500

        chunked = await g.http.post(CHAT, content=pieces(), headers=JSON)
        assert chunked.status_code == 413


async def test_methods_and_paths():
    async with gateway() as g:
        wrong = await g.http.get(CHAT)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        for path in ("/", "/v1", "/v1/chat/completions/", "//v1/models", "/../etc/passwd", "/docs"):
            reply = await g.http.get(path)
            assert reply.status_code == 404
            assert reply.json()["error"]["code"] == "not_found"


async def test_the_engines_refusal_is_the_answer():
    async with gateway() as g:
        g.client.paused = True
        for body in (BODIES[TEXT], {**BODIES[TEXT], "stream": True}):
            task = asyncio.create_task(g.post(TEXT, body))
            while not g.client._open:
                await asyncio.sleep(0.001)
            (request_id,) = g.client._open
            g.client.reject(request_id, message="logit_bias: no", field="logit_bias", code="x")
            g.echo.abort(request_id)
            reply = await task
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == "logit_bias"


async def test_a_template_that_loops_costs_one_request():
    loop = "{% if messages[0].content == 'spin' %}{% for a in range(99999) %}"
    loop += "{% for a in range(99999) %}{% endfor %}{% endfor %}{% endif %}x"
    async with gateway(template=loop) as g:
        spin = await g.post(CHAT, {"messages": [{"role": "user", "content": "spin"}]})
        assert (spin.status_code, spin.json()["error"]["code"]) == (400, "template_limit")
        assert (await g.post(CHAT, BODIES[CHAT])).status_code == 200


async def test_duplicate_and_strange_request_ids():
    async with gateway() as g:
        replies = await asyncio.gather(
            *(g.post(TEXT, BODIES[TEXT], headers={"x-request-id": "same"}) for _ in range(8))
        )
        assert all(r.status_code == 200 for r in replies)
        assert len({r.json()["id"] for r in replies}) == 8
        for value in ("a\tb", "x" * 65, "", "é", "<script>"):
            reply = await g.post(TEXT, BODIES[TEXT], headers={"x-request-id": value.encode()})
            assert reply.status_code == 200
            assert "x-request-id" not in reply.headers


async def test_ids_of_the_engine_are_the_servers_own():
    async with gateway() as g:
        await g.post(TEXT, {**BODIES[TEXT], "request_id": "1"}, headers={"x-request-id": "1"})
        (request,) = [s for s in g.client.sent if isinstance(s, GenerateRequest)]
        assert request.request_id > 2**20
        assert request.prompt_ids == TOKENIZER.encode("hello")
