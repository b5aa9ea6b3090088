# SPDX-License-Identifier: MIT
"""Kimi K2's answers, as its tool call guidance shows them, and what comes of broken ones."""

import pytest

from tests.unit.parser_cases import calls_of, check_cut_off, every_cut, names, parse
from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Inputs,
    Piece,
    Reasoning,
)
from tokenspeed.text.parsers import choose
from tokenspeed.text.parsers.kimi import KIMI

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
WEATHER = (
    "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "北京"}<|tool_call_end|>'
)
TIME = "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"


def test_parallel_calls_with_ids_of_their_own() -> None:
    text = f"<think>Two calls.</think>I'll look. {SECTION}{WEATHER}{TIME}{END_SECTION}"
    assert every_cut(KIMI, text) == [
        Reasoning("Two calls."),
        Content("I'll look. "),
        CallStart("get_weather", "functions.get_weather:0"),
        CallArguments('{"city": "北京"}'),
        CallEnd(),
        CallStart("now", "functions.now:1"),
        CallArguments("{}"),
        CallEnd(),
    ]


def test_a_call_ends_reasoning() -> None:
    events = every_cut(KIMI, f"Let me look.{SECTION}{TIME}{END_SECTION}", starts_in="reasoning")
    assert events[:2] == [Reasoning("Let me look."), CallStart("now", "functions.now:1")]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("functions.a.b:12", "a.b"),
        ("bash:3", "bash"),
        (" functions.f:0 ", "f"),
        ("f", "f"),
        ("functions.x:y:1", "x:y"),
    ],
)
def test_names_in_ids(written: str, name: str) -> None:
    text = f"{SECTION}{TIME.replace('functions.now:1', written)}{END_SECTION}"
    assert every_cut(KIMI, text)[0] == CallStart(name, written.strip())


def test_a_call_without_arguments() -> None:
    text = f"{SECTION}{TIME.replace('<|tool_call_argument_begin|>{}', '')}{END_SECTION}"
    events = every_cut(KIMI, text)
    assert events == [CallStart("now", "functions.now:1"), CallArguments("{}"), CallEnd()]


def test_broken_arguments_stay_as_they_are() -> None:
    text = f"{SECTION}{WEATHER.replace(': ', ' ')}{TIME}{END_SECTION}after"
    events = every_cut(KIMI, text)
    assert events[1:3] == [CallArguments('{"city" "北京"}'), CallEnd(complete=False)]
    assert names(events) == ["get_weather", "now"]
    assert events[-1] == Content("after")


@pytest.mark.parametrize(
    "call",
    [
        "no call",
        "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>[1]<|tool_call_end|>",
        "<|tool_call_begin|>two words<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "<|tool_call_begin|>functions.:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    ],
)
def test_what_is_no_call_is_content(call: str) -> None:
    events = every_cut(KIMI, f"a {SECTION}{call}")
    assert len(events) == 1
    assert isinstance(events[0], Content)
    assert events[0].text.startswith(f"a {SECTION}{call[:20]}")


def test_cut_anywhere_keeps_what_was_streamed() -> None:
    check_cut_off(KIMI, f"<think>a</think>b{SECTION}{WEATHER}{TIME}{END_SECTION}")


def test_arguments_stream() -> None:
    """Each character goes out with the push that brings it."""
    parser = KIMI.make(Inputs("content", (), frozenset()))
    parser.push([Piece(SECTION + WEATHER.partition("{")[0])])
    start = parser.push([Piece("{")])
    assert start == [CallStart("get_weather", "functions.get_weather:0"), CallArguments("{")]
    for char in '"text": "a b > c":':
        assert parser.push([Piece(char)]) == [CallArguments(char)]


def test_a_token_is_the_only_marker_outside_of_arguments() -> None:
    inputs = Inputs("content", (), frozenset(KIMI.markers))
    spelled = [Piece(f"{SECTION}{TIME}")]
    assert parse(KIMI, inputs, [spelled]) == [Content(f"{SECTION}{TIME}")]
    begin, call_id, arguments, end = SECTION, "functions.f:0", '{"a": "', '"}'
    pieces = [
        Piece(begin, token=True),
        Piece("<|tool_call_begin|>", token=True),
        Piece(call_id),
        Piece("<|tool_call_argument_begin|>", token=True),
        Piece(f"{arguments}<|tool_call_end|>{end}"),
        Piece("<|tool_call_end|>", token=True),
    ]
    assert calls_of(parse(KIMI, inputs, [pieces])) == [
        ("f", "functions.f:0", '{"a": "<|tool_call_end|>"}', True)
    ]


def test_where_an_answer_begins_and_who_speaks_so() -> None:
    assert KIMI.starts_in("<|im_assistant|>assistant<|im_middle|>") == "content"
    assert KIMI.starts_in("<|im_assistant|>assistant<|im_middle|><think>") == "reasoning"
    rendered = "{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}"
    assert choose(rendered) is KIMI
    assert choose("{{ '<|tool_calls_section_begin|>' }}") is KIMI
