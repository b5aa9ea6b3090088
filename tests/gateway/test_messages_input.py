# SPDX-License-Identifier: MIT
"""Anthropic's messages and tools as the model's conversation, and every way they can be wrong."""

import json

import pytest

from tests.gateway.harness import TOKENIZER, gateway
from tests.gateway.scripted import Scripted
from tokenspeed.errors import RequestError
from tokenspeed.gateway.messages_input import Input
from tokenspeed.gateway.messages_schema import (
    MessagesRequest,
    Notes,
    output_format,
    template_options,
)
from tokenspeed.gateway.messages_tools import Tools, tool_choice

PATH = "/v1/messages"
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"b": 1, "a": "é"}}
DONE = {"type": "tool_result", "tool_use_id": "t1", "content": "42"}


def text(said, **more):
    return {"type": "text", "text": said, **more}


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def read(*messages, system=None, tools=()):
    notes = Notes()
    made = Input(notes, Tools(list(tools), notes))
    made.read(system, list(messages))
    return made, notes


def rendered(*messages, system=None):
    return read(*messages, system=system)[0].messages


def test_a_whole_exchange():
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    hidden = {"type": "redacted_thinking", "data": "zzz"}
    assert rendered(
        user(text("q")),
        assistant(thought, hidden, text("I "), text("look."), USE),
        user(DONE, text("and?")),
        system="Be brief.",
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"b":1,"a":"é"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        {"role": "user", "content": "and?"},
    ]


def test_neighbours_of_a_role_are_one_turn_and_system_messages_stay():
    made = rendered(
        {"role": "user", "content": "a"},
        user(text("b"), text("")),
        {"role": "system", "content": "reminder"},
        {"role": "system", "content": [text("another", cache_control={"type": "ephemeral"})]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        assistant(text("e"), USE),
        {"role": "system", "content": "late"},
        user(text("before"), DONE),
        user(text("f")),
        system=[text("one"), text(""), text("two")],
    )
    assert [(m["role"], m["content"]) for m in made] == [
        ("system", [text("one"), text("two")]),
        ("user", [text("a"), text("b")]),
        ("system", "reminder"),
        ("system", "another"),
        ("user", "c"),
        ("assistant", "de"),
        ("system", "late"),
        ("tool", "42"),
        ("user", [text("before"), text("f")]),
    ]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"content": "out"}, "out"),
        ({}, ""),
        ({"content": ""}, ""),
        ({"content": []}, ""),
        ({"content": [text("a"), text("b")]}, [text("a"), text("b")]),
        ({"content": "no such file", "is_error": True}, [text("Error:"), text("no such file")]),
        ({"content": "Error: no such file", "is_error": True}, "Error: no such file"),
        ({"is_error": True}, "Error:"),
        ({"content": [{"type": "tool_reference", "tool_name": "g"}]}, "Tool loaded: g"),
        (
            {"content": [{"type": "image", "source": {}}]},
            "[An image, which this model cannot see.]",
        ),
        (
            {
                "content": [
                    {
                        "type": "search_result",
                        "title": "T",
                        "source": "s",
                        "content": [text("x"), text("y")],
                    }
                ]
            },
            "T\ns\nx\ny",
        ),
    ],
)
def test_results_of_tools(result, expected):
    block = {"type": "tool_result", "tool_use_id": "t1"} | result
    assert rendered(user(text("q")), assistant(USE), user(block))[-1]["content"] == expected


def test_documents_of_text():
    plain = {"type": "text", "media_type": "text/plain", "data": "body"}
    inner = {"type": "content", "content": [text("x"), text("y")]}
    made = rendered(
        user(
            {"type": "document", "source": plain, "title": "T", "context": "C"},
            {"type": "document", "source": inner, "title": None},
        )
    )
    assert made[0]["content"] == [text("T\nC\nbody"), text("x\ny")]


def test_blocks_of_hosted_tools_are_left_out_and_named():
    made, notes = read(
        user(text("q")),
        assistant(
            {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
            text("found"),
        ),
        user(text("more")),
    )
    assert made.messages[1] == {"role": "assistant", "content": "found"}
    assert notes.header() == {
        "x-tokenspeed-ignored": "messages.1.content.0 server_tool_use,"
        " messages.1.content.1 web_search_tool_result"
    }


def test_ids_may_be_used_again_in_a_later_turn():
    """Some models number their calls anew in every turn."""
    made = rendered(user(text("q")), *[assistant(USE), user(DONE)] * 2)
    assert [m["role"] for m in made] == ["user", "assistant", "tool", "assistant", "tool"]


def test_the_longest_cache_control_counts():
    five, hour = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}
    inner = DONE | {"content": [text("x", cache_control=hour)]}
    turns = [user(text("q", cache_control=five)), assistant(USE)]
    assert read(*turns, user(DONE))[1].retention_s == 300
    assert read(*turns, user(inner))[1].retention_s == 3600
    assert read(user(text("q")), system=[text("s", cache_control=hour)])[1].retention_s == 3600
    assert read(user(text("q")))[1].retention_s == 0


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
PDF = {"type": "document", "source": {"type": "base64", "data": ""}}
WRONG = [
    ([], "messages"),
    ([5], "messages.0"),
    ([{"content": "x"}], "messages.0.role"),
    ([{"role": "developer", "content": "x"}], "messages.0.role"),
    ([{"role": ["user"], "content": "x"}], "messages.0.role"),
    ([{"role": "user"}], "messages.0.content"),
    ([{"role": "user", "content": 5}], "messages.0.content"),
    ([{"role": "user", "content": ""}], "messages.0"),
    ([user()], "messages.0"),
    ([user(text(""))], "messages.0"),
    ([{"role": "system", "content": ""}], "messages.0"),
    ([user(5)], "messages.0.content.0"),
    ([user({})], "messages.0.content.0.type"),
    ([user({"type": "hologram"})], "messages.0.content.0.type"),
    ([user(text("a"), {"type": ["text"]})], "messages.0.content.1.type"),
    ([user(USE)], "messages.0.content.0.type"),
    ([user({"type": "tool_reference", "tool_name": "f"})], "messages.0.content.0.type"),
    ([user({"type": "text"})], "messages.0.content.0.text"),
    ([user(text("a", cache_control=5))], "messages.0.content.0.cache_control"),
    ([user(text("a", cache_control={"type": "x"}))], "messages.0.content.0.cache_control"),
    (
        [user(text("a", cache_control={"type": "ephemeral", "ttl": "soon"}))],
        "messages.0.content.0.cache_control",
    ),
    ([user(IMAGE)], "messages.0.content.0"),
    ([user(PDF)], "messages.0.content.0.source"),
    ([user({"type": "document"})], "messages.0.content.0.source"),
    ([user(text("q")), assistant({"type": "thinking"})], "messages.1.content.0.thinking"),
    ([user(text("q")), assistant(IMAGE)], "messages.1.content.0.type"),
    ([user(text("q")), assistant(USE | {"id": ""})], "messages.1.content.0.id"),
    ([user(text("q")), assistant(USE | {"input": "{}"})], "messages.1.content.0.input"),
    ([user(text("q")), assistant(USE | {"name": None})], "messages.1.content.0.name"),
    ([user(text("q")), assistant(USE, USE)], "messages.1.content.1.id"),
    ([user(text("q")), assistant(USE), assistant(USE)], "messages.2.content.0.id"),
    ([user(DONE)], "messages.0.content.0"),
    ([user(text("q")), assistant(USE), user(DONE, DONE)], "messages.2.content.1"),
    (
        [user(text("q")), assistant(USE), user(DONE | {"tool_use_id": "t2"})],
        "messages.2.content.0",
    ),
    (
        [user(text("q")), assistant(USE), user(DONE), assistant(text("a")), user(DONE)],
        "messages.4.content.0",
    ),
    (
        [user(text("q")), assistant(USE), user(DONE | {"content": [USE]})],
        "messages.2.content.0.content.0.type",
    ),
    (
        [user(text("q")), assistant(USE), user(DONE | {"content": 5})],
        "messages.2.content.0.content",
    ),
    ([user(text("q")), assistant(USE)], "messages"),
    ([user(text("q")), assistant(text("so "))], "messages"),
    ([user(text("q")), assistant({"type": "thinking", "thinking": "hm"})], "messages"),
    ([{"role": "system", "content": [text("")]}], "messages"),
]


@pytest.mark.parametrize(("messages", "at"), WRONG)
def test_mistakes_name_their_place(messages, at):
    with pytest.raises(RequestError) as found:
        read(*messages)
    assert found.value.field == at
    assert str(found.value).startswith(f"{at}: ")


async def test_the_answer_goes_on_with_the_assistants_last_message():
    body = {
        "model": "m",
        "max_tokens": 9,
        "messages": [
            {"role": "user", "content": "JSON please"},
            {"role": "assistant", "content": '{"a":'},
        ],
    }
    async with gateway(echo=Scripted(" 1}")) as g:
        reply = await g.post(PATH, body)
        counted = await g.post(f"{PATH}/count_tokens", body)
        prompt = TOKENIZER.decode(g.echo.prompts[0], skip_special_tokens=False)
    assert reply.json()["content"] == [text(" 1}")]
    assert prompt.endswith('<|end|><|assistant|>{"a":')
    assert counted.json()["input_tokens"] == reply.json()["usage"]["input_tokens"]
    async with gateway(template="{{ messages[0].content }}") as g:
        reply = await g.post(PATH, body)
    assert reply.status_code == 400
    assert "cannot go on" in reply.json()["error"]["message"]


async def test_mistakes_are_400_in_the_dialect():
    async with gateway() as g:
        for messages, _ in WRONG:
            body = {"model": "m", "max_tokens": 1, "messages": messages}
            for path, stream in ((PATH, False), (PATH, True), (f"{PATH}/count_tokens", False)):
                reply = await g.post(path, body | {"stream": stream})
                error = reply.json()
                assert reply.status_code == 400, reply.text
                assert error["type"] == "error"
                assert error["error"]["type"] == "invalid_request_error"
                assert error["request_id"] == reply.headers["request-id"]


def options(**fields):
    notes = Notes()
    request = MessagesRequest(model="m", messages=[], **fields)
    return template_options(request, notes), notes.ignored


def test_thinking_and_effort_are_the_templates_options():
    on, off = ({"enable_thinking": value, "thinking": value} for value in (True, False))
    assert options() == ({}, [])
    assert options(thinking={"type": "enabled", "budget_tokens": 1024}) == (on, [])
    assert options(thinking={"type": "adaptive"}) == (on, [])
    assert options(thinking={"type": "disabled"}) == (off, [])
    assert options(thinking={"type": ["x"]}) == ({}, ["thinking"])
    assert options(output_config={"effort": "low"}) == ({"reasoning_effort": "low"}, [])
    assert options(output_config={"effort": "max"}) == ({"reasoning_effort": "high"}, [])
    assert options(output_config={"effort": "ultra"}) == ({}, ["output_config.effort ultra"])
    assert options(output_config={"effort": {"a": 1}}) == ({}, ["output_config.effort"])


def test_output_format():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    given = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": given}}, {"output_format": given}):
        found = output_format(MessagesRequest(model="m", messages=[], **fields))
        assert (found.kind, found.value) == ("json_schema", schema)
    assert output_format(MessagesRequest(model="m", messages=[])) is None
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, 5):
        with pytest.raises(RequestError, match="output_config"):
            output_format(MessagesRequest(model="m", messages=[], output_config={"format": wrong}))


def entry(name, **more):
    return {"name": name, "description": name.upper(), "input_schema": {"type": "object"}, **more}


def test_deferred_tools_are_shown_where_they_are_referred_to():
    late = [entry("x", defer_loading=True), entry("y", defer_loading=True, strict=True)]
    tools = Tools([entry("a"), *late, entry("b")], Notes())
    assert [tool.name for tool in tools.shown] == ["a", "b"]
    assert tools.loaded == ()
    said = [tools.load(name) for name in ("y", "gone", "y", "x", "a")]
    assert [tool.name for tool in tools.shown] == ["a", "b"]
    assert [(tool.name, tool.strict) for tool in tools.loaded] == [("y", True), ("x", False)]
    about = {"name": "y", "description": "Y", "parameters": {"type": "object"}}
    head, _, definition = said[0].partition(": ")
    assert head == "Tool loaded"
    assert json.loads(definition) == {"type": "function", "function": about}
    assert said[1:3] == ["Tool loaded: gone", "Tool loaded: y"]
    assert said[4] == "Tool loaded: a"


def test_deferred_tools_that_nobody_could_find_are_shown_from_the_start():
    late = [entry("x", defer_loading=True), entry("y", defer_loading=True)]
    search = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
    for given, names in (([search, entry("a"), *late], ["a", "x", "y"]), (late, ["x", "y"])):
        tools = Tools(given, Notes())
        assert [tool.name for tool in tools.shown] == names
        assert tools.load("x") == "Tool loaded: x"
        assert tools.loaded == ()


def test_hosted_tools_are_ignored_by_name():
    given = [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        entry("mine", type="custom", strict=True),
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "computer_20250124", "name": "computer", "display_width_px": 1},
        {"type": "evil\r\nx-a: b", "name": "z"},
    ]
    notes = Notes()
    tools = Tools(given, notes)
    assert [tool.name for tool in tools.shown] == ["mine"]
    assert tools.hosted == {"web_search", "bash", "str_replace_based_edit_tool", "computer", "z"}
    assert notes.ignored == [
        "tools.0 web_search_20250305",
        "tools.2 bash_20250124",
        "tools.3 text_editor_20250728",
        "tools.4 computer_20250124",
        "tools.5",
    ]


@pytest.mark.parametrize(
    ("given", "at"),
    [
        (5, "tools.0"),
        ({}, "tools.0.name"),
        ({"name": "a"}, "tools.0.input_schema"),
        (entry("a", input_schema=[]), "tools.0.input_schema"),
        (entry("a\nb"), "tools.0.name"),
        (entry("x" * 300), "tools.0.name"),
        (entry("a", description=5), "tools.0.description"),
        (entry("a", cache_control=[]), "tools.0.cache_control"),
    ],
)
def test_malformed_tools_are_named(given, at):
    with pytest.raises(RequestError) as found:
        Tools([given], Notes())
    assert found.value.field == at


def test_two_tools_of_one_name():
    with pytest.raises(RequestError, match="unique"):
        Tools([entry("a"), entry("a")], Notes())


def test_tool_choice():
    tools = Tools([entry("a")], Notes()).shown

    def chosen(given, shown=tools, hosted=frozenset()):
        made = tool_choice(given, shown, set(hosted))
        return made.mode, made.name, made.parallel

    off = {"disable_parallel_tool_use": True}
    assert chosen(None) == ("auto", None, True)
    assert chosen({"type": "auto"} | off) == ("auto", None, False)
    assert chosen({"type": "any"}) == ("required", None, True)
    assert chosen({"type": "any"} | off) == ("required", None, False)
    assert chosen({"type": "tool", "name": "a"}) == ("required", "a", False)
    assert chosen({"type": "none"}) == ("none", None, True)
    # What cannot be called cannot be forced; the client gets an answer without it.
    search = {"type": "tool", "name": "web_search"}
    assert chosen(search, (), {"web_search"}) == ("auto", None, True)
    assert chosen({"type": "any"}, (), {"web_search"}) == ("auto", None, True)
    for wrong in ({}, {"type": "some"}, {"type": ["any"]}, {"type": "tool", "name": "b"}, search):
        with pytest.raises(RequestError, match="tool_choice"):
            chosen(wrong)
    with pytest.raises(RequestError, match="no tools"):
        chosen({"type": "any"}, ())


async def test_the_template_sees_options_and_tools():
    template = "{{ thinking }}{{ enable_thinking }}{{ reasoning_effort }}{{ tools | tojson }}"
    async with gateway(template=template) as g:
        body = {
            "model": "m",
            "max_tokens": 1,
            "messages": [user(text("q"))],
            "tools": [entry("a"), {"type": "web_search_20250305", "name": "web_search"}],
            "thinking": {"type": "disabled"},
            "output_config": {"effort": "xhigh"},
        }
        reply = await g.post(PATH, body)
        prompt = TOKENIZER.decode(g.client.requests[0].prompt_ids)
    assert prompt.startswith("FalseFalsehigh[")
    assert '"name": "a"' in prompt
    assert reply.headers["x-tokenspeed-ignored"] == "tools.1 web_search_20250305"
