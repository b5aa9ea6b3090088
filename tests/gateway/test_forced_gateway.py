# SPDX-License-Identifier: MIT
"""Answers that requests dictate, in every dialect: what comes back, and what is refused by name."""

import json

import pytest

from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.test_priorities import DIALECTS, USER, every_dialect

TEXT = "def add(a, b):\n    return a + b\n" * 3
EOS = TOKENIZER.eos_ids[0]
WORDS = TOKENIZER.encode(TEXT, add_special_tokens=False)
IDS = [*WORDS[:9], EOS, *WORDS[9:]]
FIELD = "forced_output_ids"


def answer_of(path, body):
    """Text, why it ended, output tokens."""
    if path == "/v1/messages":
        text = "".join(block["text"] for block in body["content"])
        return text, body["stop_reason"], body["usage"]["output_tokens"]
    if path == "/v1/responses":
        text = "".join(part["text"] for item in body["output"] for part in item["content"])
        reason = body["incomplete_details"]["reason"]
        return text, reason, body["usage"]["output_tokens"]
    [choice] = body["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, choice["finish_reason"], body["usage"]["completion_tokens"]


def streamed(path, text):
    """The text and the output tokens of a stream."""
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    if path == "/v1/messages":
        parts = [e["delta"].get("text", "") for e in events if e["type"] == "content_block_delta"]
        usage = next(e["usage"] for e in events if e["type"] == "message_delta")
        return "".join(parts), usage["output_tokens"]
    if path == "/v1/responses":
        parts = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
        return "".join(parts), events[-1]["response"]["usage"]["output_tokens"]
    choices = [choice for e in events for choice in e["choices"]]
    parts = [c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices]
    return "".join(parts), events[-1]["usage"]["completion_tokens"]


@every_dialect
async def test_it_is_answered_whole_and_the_count_is_right(path):
    reasons = {"/v1/messages": "max_tokens", "/v1/responses": "max_output_tokens"}
    async with gateway(enable_forced_output=True) as g:
        body = DIALECTS[path] | {FIELD: IDS}
        reply = await g.post(path, body)
        assert reply.status_code == 200, reply.text
        expected = (TEXT, reasons.get(path, "length"), len(IDS))
        assert answer_of(path, reply.json()) == expected
        request = g.client.requests[0]
        assert request.params.forced_output_ids == IDS
        assert (request.params.max_tokens, request.stop_ids) == (len(IDS), [])
        usage = {"stream_options": {"include_usage": True}} if path not in reasons else {}
        reply = await g.post(path, body | {"stream": True} | usage)
        assert reply.status_code == 200, reply.text
        assert streamed(path, reply.text) == (TEXT, len(IDS))


@every_dialect
async def test_without_the_flag_it_is_refused_by_name(path):
    async with gateway() as g:
        for more in ({}, {"stream": True}):
            reply = await g.post(path, DIALECTS[path] | {FIELD: IDS} | more)
            assert reply.status_code == 400
            message = reply.json()["error"]["message"]
            assert message.startswith(f"{FIELD}: ")
            assert "--enable-forced-output" in message
        assert g.client.requests == []
        reply = await g.post(path, DIALECTS[path] | {FIELD: None})
        assert reply.status_code == 200


@every_dialect
async def test_what_is_no_answer_is_refused_by_name(path):
    wrong = [[], [1 << 20], [-1], [2**63], [2**70], ["a"], [1.5], [True], "abc", 5]
    async with gateway(enable_forced_output=True) as g:
        for ids in wrong:
            reply = await g.post(path, DIALECTS[path] | {FIELD: ids})
            assert reply.status_code == 400, ids
            assert reply.json()["error"]["message"].startswith(FIELD), ids
        assert g.client.requests == []


STOPS = {path: "stop_sequences" if path == "/v1/messages" else "stop" for path in DIALECTS}
JSON = {"type": "json_object"}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
GRAMMARS = {
    "/v1/chat/completions": {"response_format": JSON},
    "/v1/completions": {"structured_outputs": {"regex": "a+"}},
    "/v1/responses": {"text": {"format": JSON}},
    "/v1/messages": {"output_config": {"format": SCHEMA}},
}


async def check_refused(g, path, more):
    reply = await g.post(path, DIALECTS[path] | {FIELD: IDS} | more)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(f"{FIELD}: cannot be combined with")
    assert g.client.requests == []


@every_dialect
async def test_stop_strings_are_refused(path):
    async with gateway(enable_forced_output=True) as g:
        await check_refused(g, path, {STOPS[path]: ["a"]})


@pytest.mark.full
async def test_grammars_are_refused():
    pytest.importorskip("xgrammar")
    async with gateway(enable_forced_output=True) as g:
        for path, more in GRAMMARS.items():
            await check_refused(g, path, more)


async def test_several_answers_and_logprobs_are_of_the_same_ids():
    async with gateway(enable_forced_output=True) as g:
        body = {"messages": USER, FIELD: IDS[:4], "n": 2, "logprobs": True, "top_logprobs": 1}
        reply = await g.post("/v1/chat/completions", body | {"return_tokens_as_token_ids": True})
        for choice in reply.json()["choices"]:
            told = [entry["token"] for entry in choice["logprobs"]["content"]]
            assert told == [f"token_id:{i}" for i in IDS[:4]]
