# SPDX-License-Identifier: MIT
"""A session's answers come back as the ids that were sampled, in every dialect."""

import json

import pytest

from benchmarks.null_engine import PAGE_SIZE
from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.paged_script import SessionEngine, odd_ids

CHAT = "/v1/chat/completions"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "n": {"type": "number"}},
            },
        },
    }
    for name in ("read_file", "run_tests")
]
CALL = '<tool_call>{"name": "%s", "arguments": {"path": "a/%d.py", "n": 1.0}}</tool_call>'


def script(turn: int) -> list[int]:
    """Thinking, then words on every third turn, else one call or two."""
    text = f"<think>Turn {turn}: what   now? é</think>"
    if turn % 3 == 2:
        text += f"Turn {turn} is done.\n\nIt works.\n"
    else:
        text += f"\nI look at {turn}.\n" + CALL % ("read_file", turn)
        text += CALL % ("run_tests", turn) if turn % 3 == 1 else ""
    return odd_ids(TOKENIZER, text + "<|end|>")


def chat_follow_up(message, turn: int):
    """What an agent sends next: its model's message written anew, results, reminders."""
    echo = {"role": "assistant", "content": (message["content"] or "").strip() or None}
    if turn % 2:
        echo["reasoning_content"] = message["reasoning_content"]
    results = []
    for call in message.get("tool_calls", []):
        function = call["function"]
        arguments = json.loads(function["arguments"])
        arguments = {"n": 1, "path": arguments["path"]}  # another order, whole floats as integers
        again = {"name": function["name"], "arguments": json.dumps(arguments)}
        echo.setdefault("tool_calls", []).append(
            {"id": call["id"], "type": "function", "function": again}
        )
        results.append({"role": "tool", "tool_call_id": call["id"], "content": f"ok {turn}"})
    if not results:
        results = [{"role": "user", "content": [{"type": "text", "text": f"go on {turn}"}]}]
    if turn % 4 == 1:
        results.append({"role": "system", "content": f"Reminder {turn}: be brief."})
    return [echo, *results]


async def chat_session(g, num_turns: int, stream: bool, **extra):
    messages = [
        {"role": "system", "content": "You are an agent. " * 20},
        {"role": "user", "content": "Fix the tests."},
    ]
    cached = []
    for turn in range(num_turns):
        body = {"messages": messages, "tools": TOOLS, **extra}
        if stream:
            message, usage = _joined(
                await g.events(CHAT, {**body, "stream_options": {"include_usage": True}})
            )
        else:
            reply = await g.post(CHAT, body)
            assert reply.status_code == 200, reply.text
            message, usage = reply.json()["choices"][0]["message"], reply.json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        messages = [*messages, *chat_follow_up(message, turn)]
    return cached


def _joined(events):
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for event in events[:-1]:
        delta = event["choices"][0]["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                message["tool_calls"].append({"id": call["id"], "function": call["function"]})
            else:
                last = message["tool_calls"][-1]["function"]
                last["arguments"] += call["function"]["arguments"]
    return message, events[-1]["usage"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
async def test_ten_turns_are_continued_token_by_token(stream, thinking):
    echo = SessionEngine([script(turn) for turn in range(10)])
    extra = {"chat_template_kwargs": {"enable_thinking": True}} if thinking else {}
    if thinking:
        echo.scripts = [ids[len(odd_ids(TOKENIZER, "<think>")) :] for ids in echo.scripts]
    async with gateway(echo=echo) as g:
        cached = await chat_session(g, 10, stream, **extra)
    assert len(echo.prompts) == 10
    for before, prompt in zip(echo.totals, echo.prompts[1:], strict=False):
        assert prompt[: len(before)] == before
    expected = [(len(total) - 1) // PAGE_SIZE * PAGE_SIZE for total in echo.totals[:-1]]
    assert cached == [0, *expected]
