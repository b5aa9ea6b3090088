# SPDX-License-Identifier: MIT
"""What real clients sent in whole sessions, sent again: every request of `golden/` is answered.

`python benchmarks/clients.py --capture tests/gateway/golden` writes the files. The engine says what
the scripted model said then, in tokens that no tokenizer would have chosen, and has a cache in
pages. Answers are read as the SDKs' types, events one by one; usage must be the engine's numbers;
from the second turn on the cache must have all whole pages of what went before.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import tests.gateway.harness as harness
from benchmarks.null_engine import PAGE_SIZE
from tests.gateway import anthropic_events, response_events
from tests.gateway.harness import TOKENIZER, Gateway, gateway, parse_events
from tests.gateway.paged_script import SessionEngine, common, odd_ids
from tokenspeed.gateway.request_log import RequestRecord

FILES = sorted(Path(__file__).with_name("golden").glob("*.json"))
AS_BEFORE = "as before"  # in the place of tools that are those of the request before
CALL = re.compile(r"call_[0-9a-f]{24}")
Block = tuple[str, str]  # kind, text: reasoning, content, or a call's name and arguments


def test_there_are_transcripts():
    names = {file.stem for file in FILES}
    assert {"claude-code", "codex", "mini-swe-agent", "aider", "anthropic"} < names
    assert {"openai-chat", "openai-responses"} < names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
async def test_every_request_is_answered(file, monkeypatch, caplog):
    monkeypatch.setattr(harness, "MAX_MODEL_LEN", 1 << 17)
    golden = json.loads(file.read_text())
    scripts = [odd_ids(TOKENIZER, f"{one}<|end|>") for one in golden["answers"]]
    engine = SessionEngine(scripts)
    config = {"served_model_name": ("model",)}
    seen = Seen()
    async with gateway(echo=engine, config=config, observers=[seen]) as g:
        usages = await _replay(g, golden)
    assert len(engine.prompts) == len(seen.numbers) == len(scripts)
    totals = [len(total) for total in engine.totals]
    for turn, (prompt, cached, output) in enumerate(seen.numbers):
        assert usages[turn] in (None, (prompt, cached, output))
        assert prompt == len(engine.prompts[turn])
        assert output == len(scripts[turn])
        assert prompt + output == totals[turn]
        if turn == 0:
            assert cached == 0
        elif golden["linear"]:
            assert cached == (totals[turn - 1] - 1) // PAGE_SIZE * PAGE_SIZE
        else:
            shared = common(engine.totals[turn - 1], engine.prompts[turn])
            assert shared < totals[turn - 1] - 1
            assert cached == shared // PAGE_SIZE * PAGE_SIZE
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


class Seen:
    """An observer of requests: prompt, cached and output tokens of each, as the gateway counts."""

    def __init__(self) -> None:
        self.numbers: list[tuple[int, int, int]] = []

    def begin(self, record: RequestRecord) -> None:
        pass

    def finish(self, record: RequestRecord) -> None:
        self.numbers.append((record.num_prompt, record.num_cached, record.num_output))


async def _replay(g: Gateway, golden: dict[str, Any]) -> list[tuple[int, int, int] | None]:
    """Prompt, cached and output tokens of each turn, by usage; None where none was asked for."""
    usages, calls, tools = [], [], None
    now: dict[str, str] = {}  # a call's id in the file, and what it is this time
    for request in golden["requests"]:
        body = request["body"]
        if body is None:
            reply = await g.http.request(
                request["method"], request["path"], headers=request["headers"]
            )
            assert reply.status_code == request["status"]
            continue
        if body.get("tools") == AS_BEFORE:
            body["tools"] = tools
        tools = body.get("tools")
        text = json.dumps(body)
        known = dict.fromkeys(CALL.findall(text))
        now |= zip([one for one in known if one not in now], calls[len(now) :], strict=True)
        sent = CALL.sub(partial(_renamed, now), text)
        reply = await g.http.post(request["path"], content=sent, headers=request["headers"])
        assert reply.status_code == request["status"] == 200, reply.text
        blocks, usage = READERS[golden["dialect"]](reply.text, body)
        assert blocks == _blocks(golden["answers"][len(usages)])
        usages.append(usage)
        calls += dict.fromkeys(CALL.findall(reply.text))
    return usages


def _renamed(names: dict[str, str], found: "re.Match[str]") -> str:
    return names[found[0]]


def _blocks(answer: str) -> list[Block]:
    """What the script says: a thought, a text, a call, of which the last two may be missing."""
    thought, _, rest = answer.removeprefix("<think>").partition("</think>")
    said, _, written = rest.partition("<tool_call>")
    blocks = [("reasoning", thought)] + ([("content", said)] if said else [])
    if written:
        about = json.loads(written.removesuffix("</tool_call>"))
        blocks.append((about["name"], json.dumps(about["arguments"])))
    return blocks


def _messages(text, body):
    assert body["stream"]
    message = anthropic_events.joined(text)
    anthropic_events.whole_conforms(message)
    blocks = [_block(block) for block in message["content"]]
    called = message["content"][-1]["type"] == "tool_use"
    assert message["stop_reason"] == ("tool_use" if called else "end_turn")
    usage = message["usage"]
    parts = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    cached = usage["cache_read_input_tokens"]
    return blocks, (sum(usage[part] for part in parts), cached, usage["output_tokens"])


def _block(block: dict[str, Any]) -> Block:
    if block["type"] == "tool_use":
        return block["name"], json.dumps(block["input"])
    if block["type"] == "thinking":
        return "reasoning", block["thinking"]
    return "content", block["text"]


def _responses(text, body):
    assert body["stream"]
    final = response_events.check_stream(response_events.parse(text))
    assert final["status"] == "completed"
    assert final["model"] == body["model"]
    usage = final["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    cached = usage["input_tokens_details"]["cached_tokens"]
    blocks = [_item(item) for item in final["output"]]
    return blocks, (usage["input_tokens"], cached, usage["output_tokens"])


def _item(item: dict[str, Any]) -> Block:
    if item["type"] == "function_call":
        return item["name"], json.dumps(json.loads(item["arguments"]))
    kind = "reasoning" if item["type"] == "reasoning" else "content"
    return kind, item["content"][0]["text"]


def _chat(text, body):
    if body.get("stream"):
        message, usage = _chunks(parse_events(text), body)
    else:
        whole = ChatCompletion.model_validate_json(text)
        message, usage = json.loads(text)["choices"][0]["message"], whole.usage
    blocks = [("reasoning", message["reasoning_content"])]
    blocks += [("content", message["content"])] if message.get("content") else []
    for call in message.get("tool_calls") or []:
        function = call["function"]
        blocks.append((function["name"], json.dumps(json.loads(function["arguments"]))))
    if usage is None:
        return blocks, None
    cached = usage.prompt_tokens_details.cached_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return blocks, (usage.prompt_tokens, cached, usage.completion_tokens)


def _chunks(chunks: list[Any], body: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The message, and the usage if it was asked for. Kinds must come in the script's order."""
    message: dict[str, Any] = {"reasoning_content": "", "content": "", "tool_calls": []}
    order, finished, usage = [], None, None
    for chunk in chunks:
        usage = ChatCompletionChunk.model_validate(chunk).usage
        for choice in chunk["choices"]:
            assert finished is None
            finished = choice["finish_reason"]
            for kind, value in choice["delta"].items():
                if kind in message and value:
                    order.append(kind)
                    _add(message, kind, value)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert finished == ("tool_calls" if message["tool_calls"] else "stop")
    assert order == sorted(order, key=list(message).index)
    assert (usage is not None) == bool(body.get("stream_options", {}).get("include_usage"))
    return message, usage


def _add(message: dict[str, Any], kind: str, value: Any) -> None:
    if kind != "tool_calls":
        message[kind] += value
        return
    for part in value:
        if part["index"] == len(message[kind]):
            message[kind].append(part)
        else:
            function = message[kind][part["index"]]["function"]
            function["arguments"] += part["function"]["arguments"]


READERS = {"messages": _messages, "responses": _responses, "chat": _chat}
