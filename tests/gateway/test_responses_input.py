# SPDX-License-Identifier: MIT
"""Items of the Responses dialect as messages and tools: every kind, known or not."""

import json
import time

import pytest

from tokenspeed.errors import RequestError
from tokenspeed.gateway.responses_input import Messages, input_items, reasoning_text
from tokenspeed.gateway.responses_seal import seal, unseal
from tokenspeed.gateway.responses_tools import (
    loaded_tools,
    read_tool_choice,
    read_tools,
    shown_tools,
)
from tokenspeed.text.conversation import ToolChoice

ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
}
SPACE = {"type": "namespace", "name": "mcp__demo", "tools": [ADD, PATCH]}
HOSTED = [
    {"type": kind}
    for kind in (
        "web_search web_search_preview image_generation file_search code_interpreter mcp"
        " computer_use_preview shell tool_search of_the_future"
    ).split()
]


def user(text):
    return {"role": "user", "content": text}


def messages(items, tools=()):
    ignored = []
    reader = Messages(read_tools(list(tools), ignored), ignored)
    reader.read(input_items(items, lambda _: None))
    return reader.made, ignored


def refused(*args, **kwargs):
    with pytest.raises(RequestError) as error:
        messages(*args, **kwargs)
    return error.value.field


def test_one_answer_is_one_message():
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "d"}]},
        user("u"),
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"a":1}'},
        {"type": "custom_tool_call", "call_id": "2", "name": "apply_patch", "input": "é\n"},
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {
            "type": "custom_tool_call_output",
            "call_id": "2",
            "output": [{"type": "input_text", "text": "t"}, {"type": "input_image"}],
        },
        {"role": "system", "content": "later"},
        {"role": "assistant", "content": "end"},
    ]
    made, ignored = messages(items, [ADD, PATCH])
    assert ignored == []
    assert made == [
        {"role": "developer", "content": "d"},
        user("u"),
        {
            "role": "assistant",
            "content": "c",
            "reasoning_content": "r",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a":1}'},
                },
                {
                    "id": "2",
                    "type": "function",
                    "function": {"name": "apply_patch", "arguments": '{"input": "é\\n"}'},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {
            "role": "tool",
            "tool_call_id": "2",
            "content": "t\n[input_image left out: this model reads text only]",
        },
        {"role": "system", "content": "later"},
        {"role": "assistant", "content": "end"},
    ]


def test_items_that_nobody_knows_are_left_out():
    items = [
        user("u"),
        {"type": "compaction", "encrypted_content": "?"},
        {"type": "web_search_call", "id": "ws", "status": "completed"},
        {"type": "of_the_future"},
        {"type": ["a"]},
        {},
        {"type": "apply_patch_call_output", "call_id": "none"},
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAA_of_another_server"},
    ]
    made, ignored = messages(items)
    assert made == [user("u")]
    assert len(ignored) == 6
    assert "input.of_the_future" in ignored


def test_shells_of_clients_are_calls_like_others():
    items = [
        {"type": "local_shell_call", "call_id": "1", "action": {"type": "exec", "command": ["ls"]}},
        {"type": "local_shell_call_output", "id": "1", "output": "a.txt"},
        {"type": "shell_call", "call_id": "2", "action": {"commands": ["ls"]}},
        {"type": "shell_call_output", "call_id": "2", "output": [{"stdout": "a", "stderr": "b"}]},
    ]
    made, _ = messages(items)
    assert [m["role"] for m in made] == ["assistant", "tool", "assistant", "tool"]
    called = made[0]["tool_calls"][0]["function"]
    assert called == {"name": "local_shell", "arguments": '{"command": ["ls"]}'}
    assert (made[1]["content"], made[3]["content"]) == ("a.txt", "ab")


@pytest.mark.parametrize(
    ("items", "field"),
    [
        ([{"role": "wizard", "content": "x"}], "input[0].role"),
        ([{"role": "user", "content": 5}], "input[0].content"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": {}}]}], "input[0].content[0]"),
        ([{"role": "user", "content": ["x"]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([{"type": "function_call", "call_id": "1", "arguments": ""}], "input[0].name"),
        ([{"type": "function_call", "call_id": "1", "name": "x"}], "input[0].arguments"),
        ([{"type": "function_call", "name": "x", "arguments": ""}], "input[0].call_id"),
        ([{"type": "custom_tool_call", "call_id": "1", "name": "x"}], "input[0].input"),
        ([{"type": "function_call_output", "call_id": "1", "output": "x"}], "input[0]"),
        ([{"type": "function_call_output", "call_id": {}, "output": "x"}], "input[0]"),
        ([{"type": "item_reference", "id": "msg_none"}], "input[0].id"),
    ],
)
def test_malformed_items_are_named(items, field):
    assert refused(items) == field


def test_reasoning_comes_from_where_it_is():
    sealed = seal("sealed 🙂")
    part = [{"type": "reasoning_text", "text": "said"}]
    assert reasoning_text({"content": part, "encrypted_content": sealed}) == "said"
    assert reasoning_text({"content": None, "encrypted_content": sealed}) == "sealed 🙂"
    assert reasoning_text({"content": [], "summary": [{"text": "sum"}]}) == "sum"
    assert reasoning_text({"encrypted_content": "gAAAAA"}) is None
    assert reasoning_text({"content": [5, {"text": 5}], "encrypted_content": 5}) == ""


def test_seals_hold():
    for text in ("", "x" * 5000, "🙂\n\ud83d"):
        assert unseal(seal(text)) == text.encode(errors="replace").decode()
    sealed = seal("a thought")
    for i in range(len("tsr1."), len(sealed)):
        other = "A" if sealed[i] != "A" else "B"
        damaged = unseal(sealed[:i] + other + sealed[i + 1 :])
        assert damaged is None or damaged == "a thought"  # bits of padding count for nothing
    assert unseal(sealed[:-4]) is None
    assert unseal("tsr1.é") is None


def test_tools_of_every_kind():
    ignored = []
    tools = read_tools([ADD, PATCH, SPACE, *HOSTED, HOSTED[0]], ignored)
    names = [tool.name for tool in tools]
    assert names == ["add", "apply_patch", "mcp__demo__add", "mcp__demo__apply_patch"]
    assert [(t.namespace, t.own_name) for t in tools[2:]] == [
        ("mcp__demo", "add"),
        ("mcp__demo", "apply_patch"),
    ]
    assert tools[1].custom
    assert tools[1].grammar == ("lark", 'start: "x"')
    assert ignored == [f"tools.{tool['type']}" for tool in HOSTED]
    assert [tool["name"] for tool in shown_tools([ADD, SPACE, *HOSTED])] == ["add", "mcp__demo"]


def test_tools_that_items_bring():
    search = {"type": "tool_search", "execution": "client", "parameters": {"type": "object"}}
    found = {"type": "tool_search_output", "execution": "client", "call_id": "1"}
    items = [
        {"type": "additional_tools", "role": "developer", "tools": [PATCH, ADD]},
        user("u"),
        {"type": "tool_search_call", "execution": "client", "call_id": "1", "arguments": {"q": 1}},
        found | {"tools": [SPACE, ADD]},
        {"type": "tool_search_call", "execution": "client", "call_id": "2", "arguments": {}},
        found | {"tools": [SPACE], "call_id": "2"},
        {"type": "tool_search_call", "execution": "client", "call_id": "3", "arguments": {}},
        found | {"tools": [], "call_id": "3"},
    ]
    ignored = []
    tools = read_tools([search, ADD], ignored, items)
    assert [tool.name for tool in tools] == ["tool_search", "add", "apply_patch"]
    loaded = loaded_tools(items, tools, ignored)
    assert [tool.name for tool in loaded] == ["mcp__demo__add", "mcp__demo__apply_patch"]
    reader = Messages(tools, ignored, loaded)
    reader.read(items)
    assert ignored == []
    calls = [m["tool_calls"][0]["function"] for m in reader.made if "tool_calls" in m]
    assert calls[0] == {"name": "tool_search", "arguments": '{"q": 1}'}
    first, second, third = [m["content"] for m in reader.made if m["role"] == "tool"]
    known, *defined = first.splitlines()
    assert known == "Tool loaded: add"
    shown = [json.loads(line.removeprefix("Tool loaded: ")) for line in defined]
    assert shown == [tool.definition() for tool in loaded]
    assert second.splitlines() == [f"Tool loaded: {tool.name}" for tool in loaded]
    assert third == "No tools found."


def test_names_of_namespaces_never_collide():
    taken = ADD | {"name": "a__add"}
    spaces = [{"type": "namespace", "name": name, "tools": [ADD]} for name in ("a", "a__")]
    tools = read_tools([*spaces, taken], [])
    assert [tool.name for tool in tools] == ["a__add_2", "a__add_3", "a__add"]
    items = [
        user("u"),
        *(
            {"type": "function_call", "call_id": space, "namespace": space, "name": "add"}
            | {"arguments": "{}"}
            for space in ("a", "a__", "gone")
        ),
    ]
    made, _ = messages(items, [*spaces, taken])
    calls = [call["function"]["name"] for call in made[1]["tool_calls"]]
    assert calls == ["a__add_2", "a__add_3", "gone__add"]


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ([{"type": "function"}], "tools[0].name"),
        ([{"type": "function", "name": "x", "parameters": []}], "tools[0].parameters"),
        ([{"type": "custom", "name": "x", "format": {"type": "?"}}], "tools[0].format.type"),
        ([{"type": "namespace", "tools": []}], "tools[0].name"),
        ([{"type": "namespace", "name": "n"}], "tools[0].tools"),
        ([{"type": "namespace", "name": "n", "tools": [{}]}], "tools[0].tools[0].name"),
        ([ADD, ADD], "tools"),
    ],
)
def test_malformed_tools_are_named(tools, field):
    with pytest.raises(RequestError) as error:
        read_tools(tools, [])
    assert error.value.field == field


def choose(given, parallel=None, tools=(ADD, PATCH, SPACE)):
    ignored = []
    found = read_tools(list(tools), ignored)
    choice, left = read_tool_choice(given, parallel, found, ignored)
    return choice, [tool.name for tool in left], ignored


def test_tool_choices():
    every = ["add", "apply_patch", "mcp__demo__add", "mcp__demo__apply_patch"]
    assert choose(None) == (ToolChoice(), every, [])
    assert choose("none")[0].mode == "none"
    assert choose("required", False)[0] == ToolChoice("required", parallel=False)
    one = {"type": "function", "name": "add"}
    assert choose(one)[0] == ToolChoice("required", "add", parallel=False)
    assert choose(one | {"namespace": "mcp__demo"})[0].name == "mcp__demo__add"
    assert choose({"type": "custom", "name": "apply_patch"})[0].name == "apply_patch"
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [one]}
    assert choose(allowed) == (ToolChoice("required"), ["add"], [])
    allowed["tools"] = [{"type": "namespace", "name": "mcp__demo"}]
    assert choose(allowed)[1] == every[2:]
    assert choose({"type": "web_search"}) == (ToolChoice(), every, ["tool_choice"])
    hosted = choose("required", tools=[{"type": "web_search"}])
    assert hosted == (ToolChoice(), [], ["tools.web_search", "tool_choice"])


@pytest.mark.parametrize(
    "given",
    [
        "sometimes",
        {"type": "function", "name": "nobody"},
        {"type": "function", "name": ["add"]},
        {"type": "allowed_tools", "tools": 5},
        {"type": "allowed_tools", "mode": {"type": "function", "name": "add"}, "tools": []},
    ],
)
def test_malformed_choices_are_refused(given):
    with pytest.raises(RequestError) as error:
        choose(given)
    assert error.value.field.startswith("tool_choice")


def test_a_patch_survives_the_way_there_and_back():
    text = '*** Begin Patch\n+"quoted\\"\t🙂\ud83d\n'
    made, _ = messages([{"type": "custom_tool_call", "call_id": "1", "name": "p", "input": text}])
    assert json.loads(made[0]["tool_calls"][0]["function"]["arguments"]) == {"input": text}


def test_what_clients_repeat_takes_no_quadratic_time():
    said = [{"type": "message", "role": "assistant", "content": "x" * 100}]
    spaces = [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}]
    begin = time.process_time()
    made, _ = messages(said * 60_000)
    assert len(made[0]["content"]) == 6_000_000
    with pytest.raises(RequestError, match="at most 1024"):
        read_tools(spaces * 20_000, [])
    assert time.process_time() - begin < 5.0


def test_an_item_is_referred_to_once():
    item = {"type": "message", "role": "user", "content": "x"}
    with pytest.raises(RequestError, match="duplicate item"):
        input_items([{"type": "item_reference", "id": "a"}, {"id": "a"}], lambda _: item)
