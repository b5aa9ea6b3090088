# SPDX-License-Identifier: MIT
"""Requests as Codex 0.169 sends them, answered; what it needs of the answers to go on.

`codex_requests.json` holds requests that a server wrote down: with a model that Codex does not
know, one of its catalogue, after a search of tools, and with tools that come in the input. Long
texts are cut, ids and paths made even, tools that differ in nothing but their names left out.
"""

import json
from pathlib import Path

import pytest

from tests.gateway.harness import gateway
from tests.gateway.response_events import check_stream, parse
from tests.gateway.scripted import Scripted
from tests.gateway.test_responses import HERMES, PATH, call

SENT = json.loads(Path(__file__).with_name("codex_requests.json").read_text())
TEMPLATE = (
    "{{ tools | map(attribute='function') | map(attribute='name') | join(' ') }}\n"
    "{% for m in messages %}{{ m.role }}{{ ':' + m.reasoning_content if m.reasoning_content }}"
    "{% for c in m.tool_calls or [] %} {{ c.id }}={{ c.function.name }}{% endfor %}"
    "{{ '\\n' }}{% endfor %}"
)
PATCH = '*** Begin Patch\n*** Add File: a.txt\n+hi "there" 🙂\n*** End Patch\n'
ANSWER = (
    f"<think>Both.</think>I do.{call('exec_command', cmd='ls')}{call('apply_patch', input=PATCH)}"
    f"{call('mcp__demo__add', a=1, b=2)}"
)


async def answered(name, answer=ANSWER):
    sent = SENT[name]
    names = {"served_model_name": (sent["body"]["model"],)}
    async with gateway(echo=Scripted(answer), template=TEMPLATE, config=HERMES | names) as g:
        reply = await g.post(PATH, sent["body"], headers=sent["headers"])
        assert reply.status_code == 200, reply.text
        assert g.service.responses.num_bytes == 0
        prompt = g.service.tokenizer.decode(g.echo.prompts[0], skip_special_tokens=False)
    events = parse(reply.text)
    return check_stream(events), prompt.splitlines(), reply.headers, events


@pytest.mark.parametrize(
    ("name", "tools", "ignored"),
    [
        (
            "fallback",
            "exec_command view_image multi_agent_v1__close_agent mcp__demo__add mcp__demo__echo",
            "tools.web_search",
        ),
        (
            "catalogue",
            "exec_command apply_patch view_image tool_search",
            "tools.web_search, text.verbosity",
        ),
        (
            "search",
            "exec_command apply_patch view_image tool_search",
            "tools.web_search, text.verbosity",
        ),
        (
            "tools_in_input",
            "functions__exec functions__wait clock__sleep collaboration__followup_task"
            " collaboration__interrupt_agent",
            "text.verbosity",
        ),
    ],
)
async def test_every_tool_is_offered_or_named(name, tools, ignored):
    _, prompt, headers, _ = await answered(name)
    assert prompt[0] == tools
    assert headers["x-tokenspeed-ignored"] == ignored


async def test_history_is_turns_of_the_model():
    _, prompt, _, _ = await answered("fallback")
    assert prompt[1:] == [
        "developer",
        "developer",
        "user",
        "user",
        "assistant:I think. call_1=exec_command",
        "tool",
        "assistant call_2=shell_command call_3=apply_patch call_4=mcp__demo__add",
        "tool",
        "tool",
        "tool",
    ]
    _, prompt, _, _ = await answered("search")
    assert prompt[-4:] == [
        "assistant call_1=tool_search",
        "tool",
        "assistant call_4=mcp__demo__add",
        "tool",
    ]


async def test_calls_are_such_as_codex_runs():
    final, _, _, events = await answered("fallback")
    thought, said, shell, patch, add = final["output"]
    assert thought["encrypted_content"].startswith("tsr1.")
    assert said["content"][0]["text"] == "I do."
    assert (shell["name"], shell["arguments"]) == ("exec_command", '{"cmd": "ls"}')
    assert (add["name"], add["namespace"]) == ("add", "mcp__demo")
    assert patch["type"] == "function_call"  # this request has no such tool
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]
    final, _, _, _ = await answered("catalogue")
    [patch] = [item for item in final["output"] if item["type"] == "custom_tool_call"]
    assert (patch["name"], patch["input"]) == ("apply_patch", PATCH)


async def test_what_was_answered_can_be_sent_back():
    """As Codex does: items as they came, without the reasoning's status."""
    body = SENT["fallback"]["body"]
    async with gateway(echo=Scripted(ANSWER, "end"), template=TEMPLATE, config=HERMES) as g:
        first = check_stream(parse((await g.post(PATH, body)).text))
        echoed = [dict(item) for item in first["output"]]
        del echoed[0]["status"], echoed[0]["content"]  # then what is sealed has to do
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "ok"}
            for item in echoed[2:]
        ]
        reply = await g.post(PATH, body | {"input": [*body["input"], *echoed, *results]})
        assert reply.status_code == 200, reply.text
        prompt = g.service.tokenizer.decode(g.echo.prompts[1], skip_special_tokens=False)
    ids = [item["call_id"] for item in echoed[2:]]
    names = ["exec_command", "apply_patch", "mcp__demo__add"]
    calls = " ".join(f"{i}={name}" for i, name in zip(ids, names, strict=True))
    assert prompt.splitlines()[-4:] == [f"assistant:Both. {calls}", "tool", "tool", "tool"]


async def test_a_conversation_that_is_too_long_is_named_so():
    """Codex looks for this code in a 400 and shortens the conversation."""
    body = SENT["fallback"]["body"]
    long = {"role": "user", "content": "word " * 6000}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    async with gateway(echo=Scripted("x"), template=template, config=HERMES) as g:
        reply = await g.post(PATH, body | {"input": [*body["input"], long]})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
