# SPDX-License-Identifier: MIT
"""DeepSeek's answers: V3 and R1, V3.1, and DSML, as templates and encoding documents show them."""

import json

import pytest

from tests.unit.parser_cases import calls_of, check_cut_off, every_cut, names, parse
from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Format,
    Inputs,
    Piece,
    Reasoning,
)
from tokenspeed.text.conversation import Tool
from tokenspeed.text.parsers import choose
from tokenspeed.text.parsers.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from tokenspeed.text.parsers.deepseek_dsml import DEEPSEEK_V4, DEEPSEEK_V32, DEEPSEEK_V41

V3 = """<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"location": "Paris", "note": "```"}
```<｜tool▁call▁end｜>
<｜tool▁call▁begin｜>function<｜tool▁sep｜>now
```json
{}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"""
V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"location": "Paris", "note": "```"}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DSML = """<｜DSML｜tool_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="location" string="true">杭州 "5" </b></｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
<｜DSML｜parameter name="options" string="false">{"units": ["C", null]}</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="now">
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""
WEATHER = {"location": '杭州 "5" </b>', "days": 3, "options": {"units": ["C", None]}}
DSMLS = [
    (DEEPSEEK_V4, DSML),
    (DEEPSEEK_V32, DSML),
    (DEEPSEEK_V4, DSML.replace("tool_calls", "function_calls")),
    (DEEPSEEK_V32, DSML.replace("tool_calls", "function_calls")),
    (DEEPSEEK_V41, DSML.replace("tool_calls", "calls").replace("DSML｜", "DSML｜ ")),
]


@pytest.mark.parametrize(("format_", "calls"), [(DEEPSEEK_V3, V3), (DEEPSEEK_V31, V31)])
def test_parallel_calls_after_reasoning(format_: Format, calls: str) -> None:
    events = every_cut(format_, f"\nI need the\nweather.\n</think>\n\nOne moment.\n\n{calls}\nDone")
    assert events[0] == Content("\nI need the\nweather.\n\n\nOne moment.")  # no reasoning begun
    text = f"I need the\nweather.\n</think>\n\nOne moment.\n\n{calls}"
    assert every_cut(format_, text, starts_in="reasoning") == [
        Reasoning("I need the\nweather."),
        Content("One moment."),
        CallStart("get_weather"),
        CallArguments('{"location": "Paris", "note": "```"}'),
        CallEnd(),
        CallStart("now"),
        CallArguments("{}"),
        CallEnd(),
    ]
    check_cut_off(format_, calls)


def test_each_reads_the_other() -> None:
    """V3.1's quantised and distilled offspring mix both ways."""
    assert every_cut(DEEPSEEK_V3, V31) == every_cut(DEEPSEEK_V31, V3)


def test_calls_without_arguments() -> None:
    for head in ("function<｜tool▁sep｜>now\n", "now<｜tool▁sep｜>"):
        events = every_cut(DEEPSEEK_V3, f"<｜tool▁call▁begin｜>{head}<｜tool▁call▁end｜>")
        assert events == [CallStart("now"), CallArguments("{}"), CallEnd()]


def test_no_separator_no_call() -> None:
    text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁call▁end｜>"
    assert every_cut(DEEPSEEK_V31, text) == [Content(text)]


@pytest.mark.parametrize(("format_", "calls"), DSMLS)
def test_dsml(format_: Format, calls: str) -> None:
    events = every_cut(format_, f"Hm.\n</think>Yes: \n\n{calls}", starts_in="reasoning")
    assert events[:3] == [Reasoning("Hm."), Content("Yes: "), CallStart("get_weather")]
    found = calls_of(events)
    assert [json.loads(arguments) for _, _, arguments, _ in found] == [WEATHER, {}]
    assert names(events) == ["get_weather", "now"]
    assert all(complete for *_, complete in found)
    check_cut_off(format_, calls, exact=False)


def test_dsml_strings_stream() -> None:
    parser = DEEPSEEK_V4.make(Inputs("content", (), frozenset()))
    parser.push([Piece(DSML.partition("州")[0])])
    for char in "州 x":
        assert parser.push([Piece(char)]) == [CallArguments(char)]


def test_dsml_says_what_is_a_string_not_the_schema() -> None:
    tools = [Tool("f", parameters={"properties": {"a": {"type": "integer"}, "b": {}}})]
    text = (
        '<｜DSML｜tool_calls><｜DSML｜invoke name="f">'
        '<｜DSML｜parameter name="a" string="true">5</｜DSML｜parameter>'
        '<｜DSML｜parameter name="b" string="false">5</｜DSML｜parameter>'
        '<｜DSML｜parameter name="c" string="false">no JSON</｜DSML｜parameter>'
        "</｜DSML｜invoke></｜DSML｜tool_calls>"
    )
    ((_, _, arguments, complete),) = calls_of(every_cut(DEEPSEEK_V4, text, tools))
    assert complete
    assert json.loads(arguments) == {"a": "5", "b": 5, "c": "no JSON"}
    untold = text.replace(' string="true"', "").replace(' string="false"', "")
    ((_, _, arguments, _),) = calls_of(every_cut(DEEPSEEK_V4, untold, tools))
    assert json.loads(arguments) == {"a": 5, "b": 5, "c": "no JSON"}


def test_dsml_object_for_all_parameters() -> None:
    text = '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n{"a": "</｜DSML｜invoke>"}\n'
    text += "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    assert every_cut(DEEPSEEK_V4, text) == [
        CallStart("f"),
        CallArguments('{"a": "</｜DSML｜invoke>"}'),
        CallEnd(),
    ]


def test_dsml_where_its_middle_is_a_token() -> None:
    """The vocabulary has `｜DSML｜`, which is a part of the markers and none itself."""
    pieces = []
    for i, part in enumerate(DSML.split("｜DSML｜")):
        pieces += [Piece("｜DSML｜", token=True)] if i else []
        pieces.append(Piece(part))
    inputs = Inputs("content", (), frozenset({"<think>", "</think>"}))
    found = calls_of(parse(DEEPSEEK_V4, inputs, [[piece] for piece in pieces]))
    assert [json.loads(arguments) for _, _, arguments, _ in found] == [WEATHER, {}]


V3_TEMPLATE = "'<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n'"
V31_TEMPLATE = "tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments']"


@pytest.mark.parametrize(
    ("source", "format_"),
    [
        (V3_TEMPLATE, DEEPSEEK_V3),
        (V31_TEMPLATE, DEEPSEEK_V31),
        ('{% set dsml = "｜DSML｜" %}<{{ dsml }}function_calls>{{ m.tool_calls }}', DEEPSEEK_V32),
        ('{% set dsml = "｜DSML｜" %}<{{ dsml }}tool_calls>{{ m.tool_calls }}', DEEPSEEK_V4),
        ("<｜DSML｜tool_calls>", DEEPSEEK_V4),
        ('{% set dsml = "｜DSML｜" %}<{{ dsml }} calls>{{ m.tool_calls }}', DEEPSEEK_V41),
        ("<｜DSML｜ calls>", DEEPSEEK_V41),
    ],
)
def test_who_speaks_so(source: str, format_: Format) -> None:
    assert choose(source) is format_


def test_where_an_answer_begins() -> None:
    for format_ in (DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_V32, DEEPSEEK_V4, DEEPSEEK_V41):
        assert format_.starts_in("<｜Assistant｜><think>\n") == "reasoning"
        assert format_.starts_in("<｜Assistant｜></think>") == "content"
        assert format_.starts_in("<｜Assistant｜>") == "content"
