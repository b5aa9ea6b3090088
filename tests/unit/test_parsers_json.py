# SPDX-License-Identifier: MIT
"""Calls as JSON that no tag closes: Llama's, and those of models of which nothing is known."""

import pytest

from tests.unit.parser_cases import calls_of, check_cut_off, every_cut, names
from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Format,
    Inputs,
    Piece,
    Reasoning,
)
from tokenspeed.text.conversation import Tool
from tokenspeed.text.parsers import FORMATS, choose
from tokenspeed.text.parsers.llama_json import LLAMA_JSON
from tokenspeed.text.parsers.plain_json import PLAIN_JSON

TOOLS = [Tool("get_weather"), Tool("now"), Tool("new")]
WEATHER = '{"name": "get_weather", "parameters": {"city": "Zürich \\"}; {", "n": [{}]}}'
NOW = '{"name": "now", "parameters": {}}'
ARGUMENTS = '{"city": "Zürich \\"}; {", "n": [{}]}'
BOTH = [
    *(CallStart("get_weather"), CallArguments(ARGUMENTS), CallEnd()),
    *(CallStart("now"), CallArguments("{}"), CallEnd()),
]


@pytest.mark.parametrize(
    "text",
    [
        f"{WEATHER}; {NOW}",
        f"<|python_tag|>{WEATHER}; {NOW}",
        f"<|python_tag|>{WEATHER};{NOW};",
        f"\n\n{WEATHER}\n{NOW}\n",
        f"<|python_start|>{WEATHER}<|python_end|>{NOW}",
        f"[{WEATHER}, {NOW}]",
    ],
)
def test_llamas_calls(text: str) -> None:
    assert every_cut(LLAMA_JSON, text, TOOLS) == BOTH
    check_cut_off(LLAMA_JSON, text, TOOLS)


def test_llamas_marker_makes_any_name_a_call() -> None:
    text = '{"name": "brave_search", "parameters": {"query": "x"}}'
    assert every_cut(LLAMA_JSON, text, TOOLS) == [Content(text)]
    assert names(every_cut(LLAMA_JSON, f"<|python_tag|>{text}")) == ["brave_search"]


def test_llamas_code_is_content() -> None:
    text = '<|python_tag|>print("a; b")'
    assert every_cut(LLAMA_JSON, text, TOOLS) == [Content(text)]
    text = f"<|python_start|>One moment.<|python_end|>{NOW}"
    assert every_cut(LLAMA_JSON, text, TOOLS) == [Content("One moment."), *BOTH[3:]]


@pytest.mark.parametrize(
    "text",
    [
        "[{}, {}]",
        "{}\n{}",
        "```json\n[{},\n{}]\n```",
        "```json\n{}\n```\n\n```json\n{}```",
    ],
)
def test_plain_calls(text: str) -> None:
    parts = text.replace("{}", "%s") % (WEATHER.replace("parameters", "arguments"), NOW)
    assert every_cut(PLAIN_JSON, parts, TOOLS) == BOTH
    check_cut_off(PLAIN_JSON, parts, TOOLS)
    thought = [Reasoning(f"a {NOW} b"), *BOTH]
    assert every_cut(PLAIN_JSON, f"<think>a {NOW} b</think>\n\n{parts}", TOOLS) == thought


def test_a_fence_anywhere_in_content() -> None:
    events = every_cut(PLAIN_JSON, f"Let me look.\n\n```json\n{NOW}\n```\nDone.", TOOLS)
    assert events == [Content("Let me look."), *BOTH[3:], Content("Done.")]


@pytest.mark.parametrize("format_", [PLAIN_JSON, LLAMA_JSON])
@pytest.mark.parametrize(
    "text",
    [
        '{"name": "unknown", "parameters": {}}',
        '{"name": "now", "description": "the time", "parameters": {}}',
        '{"name": "nowhere"}',
        '{"answer": {"name": "now"}}',
        f"I call {NOW}",
        "{",
        "[1, 2]",
        "[]",
        '{"name": 5, "arguments": {}}',
        '```json\n{"a": 1}\n```\n',
        '["now"]',
        "{'name': 'now'}",
    ],
)
def test_content(format_: Format, text: str) -> None:
    assert every_cut(format_, text, TOOLS) == [Content(text)]


def test_without_tools_all_is_content() -> None:
    for text in (NOW, f"```json\n{NOW}\n```", f"[{NOW}]"):
        assert every_cut(PLAIN_JSON, text) == [Content(text)]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "now"}', '{"a": 1}'),
        ('{"name": "now"}', "{}"),
        ('{"name": "now", "arguments": null}', "{}"),
        ('{"name": "now", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"type": "function", "id": "x", "name": "now", "arguments": {"a":1}}', '{"a":1}'),
    ],
)
def test_ways_to_write_a_call(written: str, arguments: str) -> None:
    assert calls_of(every_cut(PLAIN_JSON, written, TOOLS)) == [("now", None, arguments, True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "now", "arguments": {"a": ', [CallArguments('{"a": ')]),
        ('{"name": "now", "arguments": {"a": b}}', [CallArguments('{"a": '), Content("b}}")]),
        (f"[{NOW}, 5]", [CallArguments("{}"), Content(", 5]")]),
        (f"{NOW}; and", [CallArguments("{}"), Content("; and")]),
    ],
)
def test_broken_calls(text: str, expected: list[Event]) -> None:
    events = every_cut(PLAIN_JSON, text, TOOLS)
    assert events[0] == CallStart("now")
    assert [event for event in events[1:] if not isinstance(event, CallEnd)] == expected


def test_content_and_arguments_stream() -> None:
    parser = PLAIN_JSON.make(Inputs("content", TOOLS, frozenset()))
    assert parser.push([Piece('{"n')]) == []
    assert parser.push([Piece("umber")]) == [Content('{"nu'), Content("mber")]
    assert parser.push([Piece('": 5')]) == [Content('": 5')]
    parser = PLAIN_JSON.make(Inputs("content", TOOLS, frozenset()))
    assert parser.push([Piece('{"name": "now", "arguments": {')]) == [
        CallStart("now"),
        CallArguments("{"),
    ]
    assert parser.push([Piece('"a')]) == [CallArguments('"a')]


LLAMA = """{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}"""


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (LLAMA, "llama3_json"),
        (LLAMA.replace("start_header_id", "header_start"), "llama3_json"),
        ("{% for tool in tools %}{{ tool }}{% endfor %}{{ call.arguments | tojson }}", "json"),
        ("{{ '<|start_header_id|>' + message.role }}{{ message.content }}", "think"),
        ("{% if tools %}{{ tools }}{% endif %}", "think"),
    ],
)
def test_who_speaks_so(source: str, name: str) -> None:
    assert choose(source) is FORMATS[name]
