# SPDX-License-Identifier: MIT
"""/v1/responses, in process: objects, events and their order, whole and streamed alike."""

import json

import pytest

from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.response_events import check_response, check_stream, parse, plain
from tests.gateway.scripted import Scripted

PATH = "/v1/responses"
HERMES = {"answer_format": "hermes"}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content or '' }}/{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}"
)
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits"}
SPACE = {"type": "namespace", "name": "mcp__demo", "description": "Demo", "tools": [ADD, PATCH]}
SEARCH = {
    "type": "tool_search",
    "execution": "client",
    "description": "Finds tools",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}
WEB = {"type": "web_search", "external_web_access": True}
TOOLS = [ADD, PATCH, SPACE, SEARCH, {"type": "local_shell"}, WEB]


def call(name: str, **arguments: object) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(arguments)}}}</tool_call>'


TEXT = "héllo 🙂 wörld"
ANSWERS = {
    "text": TEXT,
    "nothing": "",
    "reasoning": f"<think>so 🙂 it is</think>{TEXT}",
    "function": f"<think>so</think>I add.{call('add', a=1, b='ü')}",
    "custom": call("apply_patch", input='*** Begin\n+"🙂"\n*** End\n'),
    "namespace": call("mcp__demo__add", a=[1, 2]) + call("mcp__demo__apply_patch", input="x"),
    "own": call("tool_search", query="add", limit=3) + call("local_shell", command=["ls", "-l"]),
    "unknown": call("nobody", a=1),
    "broken": '<tool_call>{"name": "add", "arguments": {"a": 1',
}


async def streamed(g, body):
    reply = await g.post(PATH, body | {"stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    return parse(reply.text)


@pytest.mark.parametrize("burst", [1, 3, 1000])
@pytest.mark.parametrize("name", ANSWERS)
async def test_stream_and_whole_are_the_same(name, burst):
    echo = Scripted(ANSWERS[name], burst=burst)
    body = {"input": "hi", "tools": TOOLS, "include": ["reasoning.encrypted_content"]}
    async with gateway(echo=echo, template=TEMPLATE, config=HERMES) as g:
        reply = await g.post(PATH, body)
        assert reply.status_code == 200, reply.text
        whole = check_response(reply.json())
        final = check_stream(await streamed(g, body))
    cached = final["usage"].pop("input_tokens_details"), whole["usage"].pop("input_tokens_details")
    assert cached[1] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert plain(final) == plain(whole)
    assert whole["status"] == "completed"
    assert whole["completed_at"] >= whole["created_at"]


async def outputs(answer, **body):
    async with gateway(echo=Scripted(answer), template=TEMPLATE, config=HERMES) as g:
        reply = await g.post(PATH, {"input": "hi", "tools": TOOLS} | body)
    assert reply.status_code == 200, reply.text
    return check_response(reply.json())


async def test_items_of_every_kind():
    made = await outputs(ANSWERS["function"])
    assert [item["type"] for item in made["output"]] == ["reasoning", "message", "function_call"]
    thought, said, called = made["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "so"}]
    assert (thought["summary"], thought["encrypted_content"]) == ([], None)
    assert said["content"][0]["text"] == "I add."
    assert (called["name"], json.loads(called["arguments"])) == ("add", {"a": 1, "b": "ü"})
    assert called["call_id"].startswith("call_")
    assert "namespace" not in called
    [patch] = (await outputs(ANSWERS["custom"]))["output"]
    assert (patch["type"], patch["name"]) == ("custom_tool_call", "apply_patch")
    assert patch["input"] == '*** Begin\n+"🙂"\n*** End\n'
    first, second = (await outputs(ANSWERS["namespace"]))["output"]
    assert (first["type"], first["namespace"], first["name"]) == (
        "function_call",
        "mcp__demo",
        "add",
    )
    assert (second["type"], second["namespace"], second["name"], second["input"]) == (
        "custom_tool_call",
        "mcp__demo",
        "apply_patch",
        "x",
    )


async def test_calls_with_items_of_their_own():
    search, shell = (await outputs(ANSWERS["own"]))["output"]
    assert search["type"] == "tool_search_call"
    assert (search["execution"], search["arguments"]) == ("client", {"query": "add", "limit": 3})
    assert shell["type"] == "local_shell_call"
    assert (shell["action"]["command"], shell["action"]["env"]) == (["ls", "-l"], {})
    wrong = call("local_shell", command="ls -l") + '<tool_call>{"name": "tool_search", "arg'
    shell, *rest = (await outputs(wrong))["output"]
    assert shell["action"]["command"] == ["bash", "-lc", "ls -l"]
    assert [item["type"] for item in rest] == ["tool_search_call"]
    assert (rest[0]["status"], rest[0]["arguments"]) == ("incomplete", {})


async def test_usage_counts_reasoning_and_cache():
    async with gateway(echo=Scripted(ANSWERS["reasoning"]), template=TEMPLATE, config=HERMES) as g:
        body = {"input": "hi " * 200}
        first, second = [(await g.post(PATH, body)).json()["usage"] for _ in range(2)]
        num_prompt = len(g.echo.prompts[0])
    thought = len(TOKENIZER.encode("<think>so 🙂 it is", add_special_tokens=False))
    assert first["input_tokens"] == num_prompt
    assert first["total_tokens"] == num_prompt + first["output_tokens"]
    assert 0 < first["output_tokens_details"]["reasoning_tokens"] <= thought + 8
    assert first["input_tokens_details"]["cached_tokens"] == 0
    assert second["input_tokens_details"]["cached_tokens"] == (num_prompt - 1) // 64 * 64 > 0


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_is_cut_is_incomplete(stream):
    body = {"input": "hi", "max_output_tokens": 5}
    async with gateway(echo=Scripted(TEXT * 5), template=TEMPLATE, config=HERMES) as g:
        if stream:
            events = await streamed(g, body)
            assert events[-1]["type"] == "response.incomplete"
            made = check_stream(events)
        else:
            made = check_response((await g.post(PATH, body)).json())
    assert made["status"] == "incomplete"
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}
    assert made["output"][-1]["status"] == "incomplete"
    assert made["usage"]["output_tokens"] == 5


async def test_a_late_error_is_an_event_and_is_kept():
    async with gateway(
        echo=Scripted(TEXT, error="it broke"), template=TEMPLATE, config=HERMES
    ) as g:
        events = await streamed(g, {"input": "hi"})
        final = check_stream(events)
        [error] = [event for event in events if event["type"] == "error"]
        assert (error["code"], error["message"]) == ("server_error", "it broke")
        assert final["status"] == "failed"
        assert final["error"] == {"code": "server_error", "message": "it broke"}
        assert final["output"][0]["content"][0]["text"] == TEXT
        kept = await g.http.get(f"{PATH}/{final['id']}")
        assert kept.json() == final
        whole = await g.post(PATH, {"input": "hi"})
        assert whole.status_code == 500
        assert whole.json()["error"]["type"] == "server_error"


async def test_every_field_comes_back():
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "s",
        "store": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "tool_choice": "auto",
        "truncation": "auto",
        "user": "u",
    }
    made = await outputs(TEXT, **asked)
    assert {name: made[name] for name in asked} == asked
    assert made["tools"] == TOOLS[:5]
    assert made["top_logprobs"] == 0
    assert made["error"] is None
    assert made["background"] is False
