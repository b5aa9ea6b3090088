# SPDX-License-Identifier: MIT
"""Calls as Python's, as Llama 4 writes them, and Python's literals as JSON."""

import ast
import json
import random
from typing import Any

import pytest

from tests.unit.parser_cases import calls_of, check_cut_off, every_cut, names, some_value
from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Inputs,
    Piece,
    Reasoning,
)
from tokenspeed.text.conversation import Tool
from tokenspeed.text.parsers import choose
from tokenspeed.text.parsers.python_text import PythonValue
from tokenspeed.text.parsers.pythonic import PYTHONIC

WEATHER = Tool("get_weather", parameters={"properties": {"city": {}, "metric": {}}})
TOOLS = [WEATHER, Tool("now"), Tool("mcp.get-user_info")]
TEXT = """[get_weather(city="San Francisco", metric='celsius'), now(), mcp.get-user_info(
    user_id=7890, tags=['a', "it's"], deep={"k": [True, None, {}], 2: (1, -2.5e3)},)]"""
DEEP = '{"user_id": 7890, "tags": ["a", "it\'s"], '
DEEP += '"deep": {"k": [true, null, {}], "2": [1, -2.5e3]}}'


def read(text: str, cuts: list[int]) -> tuple[str, bool, str]:
    """The JSON text of a literal, whether it is broken, and what of the text is left."""
    value, buffer, made = PythonValue(), "", ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        part, at = value.push(buffer + text[start:end], 0)
        made, buffer = made + part, (buffer + text[start:end])[at:]
    assert value.done or value.broken
    return made, value.broken, value.rest + buffer


def check_literal(text: str, expected: Any) -> None:
    text += ")"
    whole = read(text, [])
    assert whole[1:] == (False, ")")
    assert json.loads(whole[0]) == expected
    for cuts in ([*range(1, len(text))], *([cut] for cut in range(1, len(text)))):
        assert read(text, cuts) == whole, (text, cuts)


@pytest.mark.parametrize(
    "text",
    [
        "'a'", '"it\'s"', "''", '""', '"\\\\"', "'\\x41\\u00e9\\U0001F600\\101\\7'", "'a\\\nb'",
        "'''a'b''c\n'''", '""""quoted" end"""', '""""""', "r'\\d+\\''", "u'x'", "'a' \"b\"",
        "'\\N'"[:-1] + "ew'", "True", "False", "None", "0", "-1", "1_000", "0x1F", "0b11", ".5",
        "5.", "-1.5e-3", "12345678901234567890", "[]", "[1,]", "{}", "{'a': 1,}", "[[[]], {}]",
        "{'a': {'b': [1, {'c': None}]}}", "['a', 'b' 'c']", "{'é🙂': '\\t\\r\\n\\a'}", "'\\q'",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid escape")
def test_literals(text: str) -> None:
    if "\\N" in text:
        check_literal(text, "\\New")
        return
    check_literal(text, ast.literal_eval(text))


def test_literals_that_json_writes_otherwise() -> None:
    check_literal("(1, 'a')", [1, "a"])
    check_literal("{1: 2, True: 3, None: 4, 1.5: 5}", {"1": 2, "true": 3, "null": 4, "1.5": 5})
    check_literal("'a' \"b\"\n'c'", "abc")
    check_literal("[true, false, null]", [True, False, None])
    check_literal("'\\ud83d\\ude00'", "😀")
    check_literal("'\\uZZZZ\\xg'", "\\uZZZZ\\xg")


@pytest.mark.parametrize(
    "text",
    [
        "foo", "[1 2]", "{1}", "{'a' 1}", "{[1]: 2}", "f'x'", "nan", "-inf", "1+2", "-", "[,]",
        "{,}", "[1,,2]", "{'a':}", "[1}", "=", "#", "9" * 500 + ".", "[" * 300, "lambda: 0",
    ],
)  # fmt: skip
def test_what_is_no_literal(text: str) -> None:
    text += ")"
    whole = read(text, [])
    assert whole[1]
    for cuts in ([*range(1, len(text))], *([cut] for cut in range(1, len(text), 7))):
        value, buffer = PythonValue(), ""
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            _, at = value.push(buffer + text[start:end], 0)
            buffer = (buffer + text[start:end])[at:]
        assert (value.broken, value.rest + buffer) == whole[1:]


def test_literals_of_any_values() -> None:
    rng = random.Random(0)
    for _ in range(150):
        value = some_value(rng, PYTHONIC.markers)
        check_literal(repr(value), value)


def test_parallel_calls() -> None:
    events = every_cut(PYTHONIC, TEXT, TOOLS)
    assert calls_of(events) == [
        ("get_weather", None, '{"city": "San Francisco", "metric": "celsius"}', True),
        ("now", None, "{}", True),
        ("mcp.get-user_info", None, DEEP, True),
    ]
    check_cut_off(PYTHONIC, TEXT, TOOLS)
    with_space = every_cut(PYTHONIC, f"\n <think>[now()]</think> {TEXT}\nfine", TOOLS)
    assert with_space == [Reasoning("[now()]"), *events, Content("fine")]


def test_arguments_by_position() -> None:
    found = calls_of(every_cut(PYTHONIC, "[get_weather('Bern', True)]", TOOLS))
    assert found == [("get_weather", None, '{"city": "Bern", "metric": true}', True)]
    events = every_cut(PYTHONIC, "[get_weather(r'a', None, 3)]", TOOLS)
    assert events[1:] == [
        CallArguments('{"city": "a", "metric": null'),
        CallEnd(complete=False),
        Content("3)]"),
    ]


def test_markers_make_any_name_a_call() -> None:
    for open_, close in (("python_start", "python_end"), ("tool_call_start", "tool_call_end")):
        text = f"Well: <|{open_}|>[any(a=1)]<|{close}|>ok"
        events = every_cut(PYTHONIC, text)
        assert events[0] == Content("Well: ")
        assert calls_of(events) == [("any", None, '{"a": 1}', True)]
        assert events[-1] == Content("ok")
    text = "<|python_start|>One moment.<|python_end|>[now()]"
    assert every_cut(PYTHONIC, text, TOOLS)[0] == Content("One moment.")


@pytest.mark.parametrize(
    "text",
    [
        "[unknown(a=1)]", "[now]", "[text](https://a.b)", "[1, 2]", "[]", "now()", "a [now()]", "[",
        "[now", "[now(", "[now (a=1)]", "[ now", "[get_weather(1 + 1",
    ],
)  # fmt: skip
def test_content(text: str) -> None:
    tools = [Tool("now")]
    assert every_cut(PYTHONIC, text, tools) == [Content(text)]


def test_without_tools_all_is_content() -> None:
    assert every_cut(PYTHONIC, "[now()]") == [Content("[now()]")]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("[now(a=foo)] b", [CallArguments('{"a": '), CallEnd(False), Content("foo)] b")]),
        ("[now(a=[1 2])]", [CallArguments('{"a": [1'), CallEnd(False), Content("2])]")]),
        ("[now(a='x", [CallArguments('{"a": "x'), CallEnd(False)]),
        ("[now(a=1", [CallArguments('{"a": '), CallEnd(False)]),
        ("[now(a=1 b=2)]", [CallArguments('{"a": 1'), CallEnd(False), Content("b=2)]")]),
        ("[now(), nope(a=1)]", [CallArguments("{}"), CallEnd(), Content(", nope(a=1)]")]),
    ],
)
def test_broken_calls(text: str, rest: list[Event]) -> None:
    assert every_cut(PYTHONIC, text, TOOLS) == [CallStart("now"), *rest]


def test_strings_stream() -> None:
    parser = PYTHONIC.make(Inputs("content", TOOLS, frozenset()))
    assert parser.push([Piece("[now(a=")]) == [CallStart("now"), CallArguments('{"a": ')]
    parser.push([Piece('"""x')])
    for char in "a {b} 'c":
        assert parser.push([Piece(char)]) == [CallArguments(char)]
    assert names(parser.push([Piece('""")]')])) == []


@pytest.mark.parametrize(
    "source",
    [
        "{{- tool_call.name + '(' -}}",
        '{{ tool_call.function.name ~ "(" }}',
        "<|tool_list_start|>",
    ],
)
def test_who_speaks_so(source: str) -> None:
    assert choose(source) is PYTHONIC
