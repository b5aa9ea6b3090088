# SPDX-License-Identifier: MIT
"""Whatever a model says: valid events in every dialect, streamed as whole, never a 500.

Answers are random ids of the whole vocabulary, so bytes that are no UTF-8 and special tokens, mixed
with pieces of each format's own markup in no order.
"""

import random
from typing import Any

import pytest

from tests.gateway import anthropic_events, response_events
from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.scripted import Scripted
from tests.gateway.test_chat_tools import merged
from tokenspeed.engine import messages as m
from tokenspeed.text.parsers import FORMATS

PARAMETERS = {"type": "object", "properties": {"a": {"type": ["integer", "null"]}}}
TOOL = {"name": "add", "description": "adds", "parameters": PARAMETERS}
CHAT_TOOL = {"type": "function", "function": TOOL}
MESSAGES_TOOL = {"name": "add", "input_schema": PARAMETERS}
HI = [{"role": "user", "content": "hi"}]
FRAGMENTS = (
    '{"name": "add", "arguments": {"a": 1',
    "}}",
    "add",
    '"\\ud800"',
    "<think>",
    "</think>",
    "[add(a=",
    "a\x00b\x1b[0m\u2028",
    "\n",
)


class Babble(Scripted):
    """The n-th answer is the n-th list of ids, as often as there are."""

    def __init__(self, answers: list[list[int]], burst: int) -> None:
        super().__init__("", burst=burst)
        self.told = answers

    def add(self, request: m.GenerateRequest) -> None:
        ids = self.told[len(self.prompts) % len(self.told)]
        super().add(request)
        self._scripts[request.request_id] = [*ids, TOKENIZER.eos_ids[0]]


def babble(draw: random.Random, markers: tuple[str, ...]) -> list[int]:
    """Up to 60 pieces; no id of them ends an answer."""
    ids: list[int] = []
    for _ in range(draw.randint(1, 60)):
        if draw.random() < 0.5:
            ids.append(draw.randrange(4096))
        else:
            text = draw.choice(FRAGMENTS + markers)
            ids += TOKENIZER.encode(text, add_special_tokens=False)
    return [i for i in ids if i not in TOKENIZER.eos_ids]


async def check_chat(g: Any, body: dict[str, Any]) -> None:
    whole = (await g.post("/v1/chat/completions", body)).json()["choices"][0]
    events = await g.events("/v1/chat/completions", body)
    made, said = merged(events), whole["message"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    for name in ("content", "reasoning"):
        assert made[name] == (said.get(name) or "")
    calls = [call["function"] for call in said.get("tool_calls") or ()]
    assert [call["function"] for call in made["tool_calls"]] == calls


async def check_messages(g: Any, body: dict[str, Any]) -> None:
    reply = await g.post("/v1/messages", body)
    assert reply.status_code == 200, reply.text
    streamed = await g.post("/v1/messages", body | {"stream": True})
    whole, made = reply.json(), anthropic_events.joined(streamed.text)
    for message in (whole, made):
        message["usage"] = message["usage"]["output_tokens"]
        for block in message["content"]:
            block.pop("signature", None)
    assert anthropic_events.anonymous(made) == anthropic_events.anonymous(whole)


async def check_responses(g: Any, body: dict[str, Any]) -> None:
    reply = await g.post("/v1/responses", body)
    assert reply.status_code == 200, reply.text
    whole = response_events.check_response(reply.json())
    streamed = await g.post("/v1/responses", body | {"stream": True})
    made = response_events.check_stream(response_events.parse(streamed.text))
    for response in (whole, made):
        response["usage"] = response["usage"]["output_tokens"]
    assert response_events.plain(made) == response_events.plain(whole)


@pytest.mark.parametrize("name", FORMATS)
async def test_any_ids_in_any_format(name: str) -> None:
    draw = random.Random(name)
    told = [babble(draw, FORMATS[name].markers) for _ in range(4)]
    twice = [ids for one in told for ids in (one, one)]
    cut = {"max_tokens": draw.randint(1, 40)}  # some of them end in the middle of something
    tools = [CHAT_TOOL]
    async with gateway(
        echo=Babble(twice, draw.choice((1, 3, 99))), config={"answer_format": name}
    ) as g:
        for more in ({}, cut):
            for _ in range(2):
                await check_chat(g, {"messages": HI, "tools": tools} | more)
    twice = twice[4:]
    async with gateway(
        echo=Babble(twice, draw.choice((1, 3, 99))), config={"answer_format": name}
    ) as g:
        body = {"model": "m", "messages": HI, "tools": [MESSAGES_TOOL], "max_tokens": 500}
        for _ in range(2):
            await check_messages(g, body)
        await check_messages(g, body | cut)
        asked: dict[str, Any] = {"input": "hi", "tools": [{"type": "function"} | TOOL]}
        await check_responses(g, asked)
        await check_responses(g, asked | {"max_output_tokens": max(16, cut["max_tokens"])})
