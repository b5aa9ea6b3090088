# SPDX-License-Identifier: MIT
"""Structured output of the demo model, through `LLM` and a server: every answer is valid."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.processes import TEXT, Server, server
from tests.random_schemas import fits, random_schema
from tokenspeed import LLM, SamplingParams
from tokenspeed.errors import RequestError

pytest.importorskip("xgrammar")

CHAT = "/v1/chat/completions"
SMALL: dict[str, Any] = {"num_pages": 24, "page_size": 16, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_model_len=1024) as made:
        yield made


def params(seed: int = 0, **asked: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=900, temperature=1.0, seed=seed, top_p=0.95, structured_outputs=asked
    )


def check_schemas(llm: LLM, count: int) -> None:
    rng = random.Random(count)
    schemas = [random_schema(rng) for _ in range(count)]
    asked = [params(seed, json=schema) for seed, schema in enumerate(schemas)]
    outputs = llm.generate(["Answer in JSON:\n"] * count, asked, use_tqdm=False)
    for schema, output in zip(schemas, outputs, strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop", (schema, answer.text)
        assert fits(json.loads(answer.text), schema), (schema, answer.text)


def test_random_schemas(llm: LLM) -> None:
    check_schemas(llm, 20)


@pytest.mark.full
def test_a_thousand_random_schemas(llm: LLM) -> None:
    check_schemas(llm, 1000)


def test_every_kind_of_format_beside_answers_without_one(llm: LLM) -> None:
    tag = {"type": "tag", "begin": "<a>", "content": {"type": "regex", "pattern": "[0-9]"}}
    asked: list[tuple[dict[str, Any] | None, str]] = [
        ({"regex": "[A-Z][a-z]{2,5} [0-9]{3}"}, "[A-Z][a-z]{2,5} [0-9]{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        (None, ".*"),
        ({"grammar": 'root ::= "x"{3} [a-c]'}, "xxx[a-c]"),
        ({"grammar": "start: /[ab]{1,4}/"}, "[ab]{1,4}"),
        ({"structural_tag": {"format": {**tag, "end": "</a>"}}}, "<a>[0-9]</a>"),
    ]
    each = [SamplingParams(max_tokens=60, seed=1, structured_outputs=one) for one, _ in asked]
    for stops in ({}, {"ignore_eos": True}, {"stop_token_ids": [300]}, {"min_tokens": 9}):
        given = [one.replace(**stops) for one in each]
        outputs = llm.generate(["Say "] * len(asked), given, use_tqdm=False)
        for (one, pattern), output in zip(asked, outputs, strict=True):
            answer = output.outputs[0]
            assert re.fullmatch(pattern, answer.text, re.DOTALL), (one, stops, answer.text)
            assert one is None or answer.finish_reason == "stop"
    free = llm.generate("Say ", each[2], use_tqdm=False)[0].outputs[0].token_ids
    assert outputs[2].outputs[0].token_ids == free


def test_retraction_and_overlap_change_nothing(llm: LLM) -> None:
    schema = random_schema(random.Random(4))
    asked = [params(seed, json=schema) for seed in range(8)]
    texts = []
    for options in ({}, SMALL, {**SMALL, "overlap_depth": 1}):
        with LLM(max_model_len=256, **options) as made:
            each = [one.replace(max_tokens=200) for one in asked]
            outputs = made.generate(["JSON: "] * 8, each, use_tqdm=False)
            texts.append([output.outputs[0].text for output in outputs])
    assert texts[0] == texts[1] == texts[2]


def test_a_bad_one_is_refused_and_nothing_is_left(llm: LLM) -> None:
    good = params(choice=["a"])
    for bad in ({"regex": "(" * 9}, {"json": {"$ref": "#"}}, {"choice": "a"}, {"regx": "a"}):
        with pytest.raises(RequestError):
            llm.generate(["x", "y"], [good, params(**bad)], use_tqdm=False)
    assert llm.generate("x", good, use_tqdm=False)[0].outputs[0].text == "a"


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    with server("--max-model-len", "2048", real=True) as made:
        yield made


def post(made: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(made.url + path, json={"seed": 1, **body}, timeout=60.0)


def chat(made: Server, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say something."}]
    reply = post(made, CHAT, messages=messages, max_tokens=1500, **body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["choices"][0]
    return found


def test_response_formats_over_http(served: Server) -> None:
    rng = random.Random(9)
    for seed in range(5):
        schema = random_schema(rng)
        wanted = {"name": "answer", "schema": schema, "strict": True}
        asked = {"type": "json_schema", "json_schema": wanted}
        choice = chat(served, response_format=asked, seed=seed)
        assert choice["finish_reason"] == "stop"
        assert fits(json.loads(choice["message"]["content"]), schema)
    choice = chat(served, structured_outputs={"choice": ["yes", "no"]})
    assert choice["message"]["content"] in ("yes", "no")
    reply = post(served, TEXT, prompt="x", structured_outputs={"regex": "[0-9]{4}"})
    assert re.fullmatch("[0-9]{4}", reply.json()["choices"][0]["text"])


def test_required_and_named_tools_over_http(served: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city"],
    }
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
        for name in ("weather", "news")
    ]
    named = {"type": "function", "function": {"name": "news"}}
    for tool_choice, names in (("required", {"weather", "news"}), (named, {"news"})):
        choice = chat(
            served, tools=tools, tool_choice=tool_choice, parallel_tool_calls=False, temperature=0.5
        )
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert call["function"]["name"] in names
        assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "(" * 30_000}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
    ],
)
def test_what_is_refused_over_http(served: Server, body: dict[str, Any], param: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    reply = post(served, CHAT, messages=messages, **body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
