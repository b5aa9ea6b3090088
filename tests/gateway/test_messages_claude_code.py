# SPDX-License-Identifier: MIT
"""What Claude Code 2.1 sends, written down without its words, and what its session looks like here.

Headers, fields, roles and the places of `cache_control` are as captured; texts and schemas are not.
"""

import json

import pytest

from tests.gateway import anthropic_events as events
from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.scripted import Scripted

PATH = "/v1/messages?beta=true"
SHOW = "{{ [messages, tools, thinking] | tojson }}"
SESSION = "5d0c1b7e-8a52-4d7e-9a43-0f6d7a3b1c11"
BETAS = (
    "claude-code-20250219,interleaved-thinking-2025-05-14,thinking-token-count-2026-05-13,"
    "context-management-2025-06-27,prompt-caching-scope-2026-01-05"
)
LATE_BETAS = (
    f"{BETAS},mid-conversation-system-2026-04-07,advanced-tool-use-2025-11-20,effort-2025-11-24"
)
HEADERS = {
    "accept": "application/json",
    "authorization": "Bearer x",
    "user-agent": "claude-cli/2.1.197 (external, sdk-cli)",
    "x-claude-code-session-id": SESSION,
    "x-stainless-lang": "js",
    "x-stainless-retry-count": "0",
    "x-stainless-timeout": "600",
    "anthropic-beta": BETAS,
    "anthropic-dangerous-direct-browser-access": "true",
    "anthropic-version": "2023-06-01",
    "x-app": "cli",
}
KEPT = {"cache_control": {"type": "ephemeral"}}


def text(said, **more):
    return {"type": "text", "text": said, **more}


def tool(name, **more):
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"command": {"description": "What to do", "type": "string"}},
        "required": ["command"],
        "additionalProperties": False,
    }
    return {"name": name, "description": f"Does {name}.", "input_schema": schema, **more}


TOOLS = [tool("Bash"), tool("Read"), tool("ToolSearch"), tool("Write")]


def body(messages, tools=TOOLS, **more):
    """A turn of the main loop; the user's last block is marked, as always."""
    at = max(i for i, message in enumerate(messages) if message["role"] == "user")
    *blocks, last = messages[at]["content"]
    marked = messages[at] | {"content": [*blocks, last | KEPT]}
    messages = [*messages[:at], marked, *messages[at + 1 :]]
    user = {"device_id": "4f" * 32, "account_uuid": "", "session_id": SESSION}
    return {
        "model": "claude-sonnet-4-5",
        "messages": messages,
        "system": [
            text("x-anthropic-billing-header: cc_version=2.1.197.389; cc_entrypoint=sdk-cli;"),
            text("You are an agent.", **KEPT),
            text("\nYou help with software.\n", **KEPT),
        ],
        "tools": tools,
        "metadata": {"user_id": json.dumps(user)},
        "max_tokens": 32000,
        "thinking": {"budget_tokens": 31999, "type": "enabled"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "stream": True,
        **more,
    }


FIRST = {
    "role": "user",
    "content": [
        text("<system-reminder>\nAgents: none.\n</system-reminder>\n"),
        text("<system-reminder>\nToday is a day.\n</system-reminder>\n"),
        text("Create hello.txt here"),
    ],
}


def call(name, **arguments):
    about = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{about}\n</tool_call>"


SCRIPT = (
    f"<think>\nLook first.</think>\n\nI will list the files.\n{call('Bash', command='ls')}",
    f"<think>\nWrite.</think>\n\n{call('Write', command='hello')}",
    "<think>\nDone.</think>\n\nThe file is there.",
)


def result(block, said, **more):
    """As Claude Code sends it: with the members in this order."""
    return {"tool_use_id": block["id"], "type": "tool_result", "content": said, **more}


def seen(g):
    """What the template got with the last request, less the system prompt."""
    messages, tools, thinking = json.loads(TOKENIZER.decode(g.echo.prompts[-1]))
    assert messages[0]["role"] == "system"
    assert thinking is True
    return messages[1:], [entry["function"]["name"] for entry in tools]


@pytest.mark.parametrize(
    "headers",
    [HEADERS, HEADERS | {"anthropic-beta": LATE_BETAS}, {"x-api-key": "x"}],
    ids=["betas", "more betas", "neither version nor beta"],
)
async def test_a_session_of_two_tools(headers):
    config = {"answer_format": "hermes"}
    async with gateway(echo=Scripted(*SCRIPT), template=SHOW, config=config, keys=("x",)) as g:
        history = [FIRST]
        for said in ("a.py", "File created", None):
            reply = await g.post(PATH, body(history), headers=headers)
            assert reply.status_code == 200, reply.text
            assert "x-tokenspeed-ignored" not in reply.headers
            answer = events.joined(reply.text)
            messages, tools = seen(g)
            assert tools == ["Bash", "Read", "ToolSearch", "Write"]
            if said is None:
                break
            made = result(answer["content"][-1], said, is_error=False)
            history += [
                {"role": "assistant", "content": answer["content"]},
                {"role": "user", "content": [made]},
            ]
        assert answer["stop_reason"] == "end_turn"
        assert answer["content"][-1] == text("The file is there.")
        assert [r.retention.seconds for r in g.client.requests] == [300.0] * 3
        assert len({r.user for r in g.client.requests}) == 1
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant", "tool"]
    assert messages[1]["reasoning_content"] == "Look first."
    assert messages[1]["content"] == "I will list the files."
    assert messages[1]["tool_calls"][0]["function"] == {
        "name": "Bash",
        "arguments": {"command": "ls"},
    }
    assert messages[2]["tool_call_id"] == messages[1]["tool_calls"][0]["id"]
    assert messages[2]["content"] == "a.py"
    assert messages[3]["reasoning_content"] == "Write."


async def test_tools_found_by_the_clients_search():
    """An inline system message lists them; the schema comes with `defer_loading`, named by a
    `tool_reference`. What was in the prompt before stays as it was."""
    search = call("ToolSearch", command="select:CronList")
    script = (search, call("CronList", command="now"), "done")
    listed = {"role": "system", "content": "Deferred tools: CronList, WebSearch"}
    config = {"answer_format": "hermes"}
    more = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
    headers = HEADERS | {"anthropic-beta": LATE_BETAS}
    async with gateway(echo=Scripted(*script), template=SHOW, config=config) as g:
        history = [FIRST, listed]

        async def turn(tools=TOOLS):
            reply = await g.post(PATH, body(history, tools, **more), headers=headers)
            assert reply.status_code == 200, reply.text
            return events.joined(reply.text)

        answer = await turn()
        reference = {"type": "tool_reference", "tool_name": "CronList"}
        loaded = result(answer["content"][-1], [reference])
        history += [
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": [loaded, text("Tool loaded.")]},
        ]
        # In alphabetical order, as Claude Code lists its tools: in the middle.
        tools = [TOOLS[0], tool("CronList", defer_loading=True), *TOOLS[1:]]
        answer = await turn(tools)
        assert answer["content"][-1]["name"] == "CronList"
        messages, names = seen(g)
        prompts = [TOKENIZER.decode(prompt) for prompt in g.echo.prompts]
    assert names == ["Bash", "Read", "ToolSearch", "Write"]
    assert [m["role"] for m in messages] == ["user", "system", "assistant", "tool", "user"]
    assert messages[1]["content"] == "Deferred tools: CronList, WebSearch"
    assert messages[3]["content"].startswith('Tool loaded: {"function": {"description": "Does Cron')
    assert messages[4]["content"] == "Tool loaded."
    before = prompts[0].partition("], [{")[0]
    assert prompts[1].startswith(before)


async def test_the_side_request_of_a_web_search():
    """It forces a tool that only Anthropic runs: a plain answer keeps the session alive."""
    asked = {
        "model": "claude-sonnet-4-5",
        "messages": [{"role": "user", "content": [text("Perform a web search for: slug")]}],
        "system": [text("x-anthropic-billing-header: cc_version=2.1.197.3d9;"), text("Search.")],
        "tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
        "tool_choice": {"type": "tool", "name": "web_search"},
        "max_tokens": 32000,
        "thinking": {"type": "disabled"},
        "temperature": 1,
        "stream": True,
    }
    async with gateway(echo=Scripted("ok")) as g:
        reply = await g.post(PATH, asked, headers=HEADERS)
    assert events.joined(reply.text)["content"] == [text("ok")]
    assert reply.headers["x-tokenspeed-ignored"] == "tools.0 web_search_20250305"


async def test_an_image_that_a_tool_read_does_not_end_the_session():
    data = {"type": "base64", "data": "iVBORw0KGgo=", "media_type": "image/png"}
    use = {"type": "tool_use", "id": "call_1", "name": "Read", "input": {"command": "a.png"}}
    shown = result(use, [{"type": "image", "source": data}])
    history = [FIRST, {"role": "assistant", "content": [use]}, {"role": "user", "content": [shown]}]
    async with gateway(echo=Scripted("a slug"), template=SHOW) as g:
        reply = await g.post(PATH, body(history), headers=HEADERS)
        assert events.joined(reply.text)["content"] == [text("a slug")]
        assert seen(g)[0][-1]["content"] == "[An image, which this model cannot see.]"
    assert reply.headers["x-tokenspeed-ignored"] == "messages.2.content.0.content.0 image"


async def test_a_permission_that_was_not_given():
    use = {"type": "tool_use", "id": "call_1", "name": "Read", "input": {"command": "x"}}
    refused = {"type": "tool_result", "content": "not granted yet", "is_error": True}
    history = [
        FIRST,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [refused | {"tool_use_id": "call_1"}]},
    ]
    async with gateway(echo=Scripted("so be it"), template=SHOW) as g:
        assert (await g.post(PATH, body(history), headers=HEADERS)).status_code == 200
        assert seen(g)[0][-1]["content"] == "Error:\nnot granted yet"


async def test_a_prompt_that_is_too_long_says_so_in_the_words_that_compact():
    long = {"role": "user", "content": [text("word " * 5000)]}
    async with gateway() as g:
        replies = [await g.post(PATH, body([long]), headers=HEADERS)]
        longer = {"role": "user", "content": [text("x" * 500_000)]}
        replies.append(await g.post(PATH, body([longer]), headers=HEADERS))
    for reply in replies:
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error"
        said, _, limit = error["message"].partition(" tokens > ")
        assert said.startswith("prompt is too long: ")
        assert int(said.rpartition(" ")[2]) > 4096
        assert limit == "4096 maximum"


async def test_the_look_whether_somebody_is_there():
    async with gateway() as g:
        assert (await g.http.head("/")).status_code == 404
