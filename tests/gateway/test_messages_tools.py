# SPDX-License-Identifier: MIT
"""Anthropic's tools and options as the model gets them, and the ways they can be wrong."""

import json

import pytest

from tests.gateway.harness import TOKENIZER, gateway
from tokenspeed.errors import RequestError
from tokenspeed.gateway.messages_schema import (
    MessagesRequest,
    Notes,
    output_format,
    template_options,
)
from tokenspeed.gateway.messages_tools import Tools, tool_choice

PATH = "/v1/messages"


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
    for name, fields in {
        "output_config.format": {"output_config": {"format": given}},
        "output_format": {"output_format": given},
    }.items():
        found, field = output_format(MessagesRequest(model="m", messages=[], **fields))
        assert (found.kind, found.value, field) == ("json_schema", schema, name)
    assert output_format(MessagesRequest(model="m", messages=[]))[0] is None
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
            "messages": [{"role": "user", "content": "q"}],
            "tools": [entry("a"), {"type": "web_search_20250305", "name": "web_search"}],
            "thinking": {"type": "disabled"},
            "output_config": {"effort": "xhigh"},
        }
        reply = await g.post(PATH, body)
        prompt = TOKENIZER.decode(g.client.requests[0].prompt_ids)
    assert prompt.startswith("FalseFalsehigh[")
    assert '"name": "a"' in prompt
    assert reply.headers["x-tokenspeed-ignored"] == "tools.1 web_search_20250305"
