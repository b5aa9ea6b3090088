# SPDX-License-Identifier: MIT
"""Reasoning and tool calls of /v1/chat/completions, streamed as whole, of a scripted engine."""

from typing import Any

import pytest

from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.scripted import Scripted
from tokenspeed.engine import messages as m

CHAT = "/v1/chat/completions"
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    {"type": "custom", "custom": {"name": "patch", "description": "Apply a patch"}},
]
ANSWER = (
    "<think>Two \u00e9 calls.</think>I call."
    '<tool_call>{"name": "add", "arguments": {"a": [1, 2], "b": "x\\"y"}}</tool_call>'
    '<tool_call>{"name": "patch", "arguments": {"input": "+\\u00e9\\n-\\"b\\""}}</tool_call>'
)
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "go"}], "tools": TOOLS}


def merged(events: list[Any]) -> dict[str, Any]:
    """The message that a client makes of the deltas."""
    made: dict[str, Any] = {
        "content": "",
        "reasoning": "",
        "reasoning_content": "",
        "tool_calls": [],
    }
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            for key in ("content", "reasoning", "reasoning_content"):
                made[key] += delta.get(key) or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(made["tool_calls"]):
                    made["tool_calls"].append({"id": call["id"], "type": call["type"]})
                kept = made["tool_calls"][call["index"]]
                for kind in ("function", "custom"):
                    for key, text in call.get(kind, {}).items():
                        about = kept.setdefault(kind, {})
                        about[key] = about.get(key, "") + text
    return made


@pytest.mark.parametrize("burst", [1, 3, 1000])
async def test_streamed_is_whole(burst: int) -> None:
    async with gateway(echo=Scripted(ANSWER, burst=burst)) as g:
        whole = (await g.post(CHAT, BODY)).json()
        events = await g.events(CHAT, BODY)
    choice = whole["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert message["reasoning"] == message["reasoning_content"] == "Two \u00e9 calls."
    assert message["content"] == "I call."
    first, second = message["tool_calls"]
    assert first["function"] == {"name": "add", "arguments": '{"a": [1, 2], "b": "x\\"y"}'}
    assert second["custom"] == {"name": "patch", "input": '+\u00e9\n-"b"'}
    streamed = merged(events)
    assert all(call.pop("id").startswith("call_") for call in streamed["tool_calls"])
    for call in message["tool_calls"]:
        call.pop("id")
    message.pop("role")
    assert streamed == message
    details = whole["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < whole["usage"]["completion_tokens"]


async def test_one_call_where_several_are_not_wanted() -> None:
    async with gateway(echo=Scripted(ANSWER)) as g:
        whole = (await g.post(CHAT, BODY | {"parallel_tool_calls": False})).json()
        assert g.pool.num_open == 0
        assert any(isinstance(message, m.AbortRequest) for message in g.client.sent)
    choice = whole["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["add"]
    assert choice["finish_reason"] == "tool_calls"


async def test_without_calls_what_looks_like_one_is_text() -> None:
    async with gateway(echo=Scripted(ANSWER)) as g:
        whole = (await g.post(CHAT, BODY | {"tool_choice": "none"})).json()
        banned = g.client.requests[0].params.bad_words_token_ids
        await g.post(CHAT, {"messages": BODY["messages"], "tool_choice": "none"})
        assert g.client.requests[1].params.bad_words_token_ids is None
    message = whole["choices"][0]["message"]
    assert banned == [TOKENIZER.encode("<tool_call>", add_special_tokens=False)]
    assert "tool_calls" not in message
    assert message["content"].startswith('I call.<tool_call>{"name": "add"')
    assert whole["choices"][0]["finish_reason"] == "stop"


async def test_a_call_cut_by_the_limit_keeps_what_came() -> None:
    async with gateway(echo=Scripted(ANSWER)) as g:
        whole = (await g.post(CHAT, BODY | {"max_tokens": 30})).json()
        events = await g.events(CHAT, BODY | {"max_tokens": 30})
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"
    got, streamed = choice["message"]["tool_calls"], merged(events)["tool_calls"]
    assert [call["function"] for call in streamed] == [call["function"] for call in got]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "zebra", "zebra": {}}]}, "tools[0].type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a\nb"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": {"type": "function", "function": {"name": "zebra"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ],
)
async def test_mistakes_are_named(change: dict[str, Any], field: str) -> None:
    async with gateway() as g:
        reply = await g.post(CHAT, BODY | change)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == field
