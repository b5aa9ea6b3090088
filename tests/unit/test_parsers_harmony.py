# SPDX-License-Identifier: MIT
"""gpt-oss' answers, as the harmony response format shows them, and headers that models garble."""

import pytest

from tests.unit.parser_cases import check_cut_off, every_cut
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
from tokenspeed.text.parsers.harmony import HARMONY

ANALYSIS = "<|channel|>analysis<|message|>Need to use function get_weather.<|end|>"
ARGUMENTS = '{"location":"San Francisco"}'
REASONED = Reasoning("Need to use function get_weather.")
CALLED = [CallStart("get_weather"), CallArguments(ARGUMENTS), CallEnd()]


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.get_weather <|constrain|>json",
        "<|channel|>commentary to=functions.get_weather<|constrain|>json",
        " to=functions.get_weather<|channel|>commentary json",
        " to=functions.get_weather<|channel|>commentary <|constrain|>json",
        "<|channel|>analysis to=functions.get_weather code",
        "<|channel|>commentary to=get_weather",
    ],
)
@pytest.mark.parametrize("end", ["", "<|call|>", "<|end|>"])
def test_a_call(header: str, end: str) -> None:
    text = f"{ANALYSIS}<|start|>assistant{header}<|message|>{ARGUMENTS}{end}"
    assert every_cut(HARMONY, text, [Tool("get_weather")]) == [REASONED, *CALLED]
    first = f"{header}<|message|>{ARGUMENTS}{end}"
    assert every_cut(HARMONY, first, [Tool("get_weather")]) == CALLED


def test_a_final_answer_with_a_preamble() -> None:
    text = (
        f"{ANALYSIS}<|start|>assistant<|channel|>commentary<|message|>**Plan**: look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        '<|start|>assistant<|channel|>final <|constrain|>json<|message|>{"a": 1}\n<|return|>'
    )
    expected = [REASONED, Content("**Plan**: look."), Reasoning("Hm."), Content('{"a": 1}\n')]
    assert every_cut(HARMONY, text) == expected


def test_messages_of_a_channel_are_paragraphs() -> None:
    text = "<|channel|>commentary<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b"
    assert every_cut(HARMONY, text) == [Content("a\n\nb")]


def test_calls_and_text_in_turn() -> None:
    call = f"<|channel|>commentary to=functions.get_weather<|message|>{ARGUMENTS}<|call|>"
    final = "<|start|>assistant<|channel|>final<|message|>é🙂"
    assert every_cut(HARMONY, f"{call}<|start|>assistant{call}{final}") == [
        *CALLED,
        *CALLED,
        Content("é🙂"),
    ]
    check_cut_off(HARMONY, f"{ANALYSIS}<|start|>assistant{call}<|start|>assistant{call}{final}")


def test_markers_in_strings_of_arguments() -> None:
    body = '{"text": "<|end|><|start|>assistant<|channel|>final<|message|>"}'
    text = f"<|channel|>commentary to=functions.f<|message|>{body}<|call|>"
    assert every_cut(HARMONY, text) == [CallStart("f"), CallArguments(body), CallEnd()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello there", [Content("Hello there")]),
        ("to be or not", [Content("to be or not")]),
        ("as", []),  # the start of "assistant"
        ("assistant<|channel|>final<|message|>x", [Content("x")]),
        ("<|channel|>commentary?<|message|>x", [Content("x")]),
        ("<|channel|>?? 2<|end|>" + ANALYSIS, [Content("<|channel|>?? 2"), REASONED]),
        ("<|channel|>commentary to=functions.f <|constrain|>js", []),
        ("<|channel|>analysis to=python code<|message|>1+1<|call|>", [Reasoning("1+1")]),
        ("<|channel|>commentary to=functions.f<|message|>no JSON<|call|>", [Content("no JSON")]),
        ("<|channel|>final<|message|>a" + ANALYSIS, [Content("a"), REASONED]),
    ],
)
def test_garbled_headers(text: str, expected: list[Event]) -> None:
    assert every_cut(HARMONY, text) == expected


def test_prompts_that_end_in_a_message() -> None:
    header = "<|start|>assistant<|channel|>"
    assert HARMONY.starts_in("<|start|>assistant") == "content"
    assert HARMONY.starts_in(f"{header}analysis<|message|>") == "reasoning"
    assert HARMONY.starts_in(f"{header}final<|message|>") == "content"
    text = "Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    expected = [Reasoning("Hm."), Content("Yes.")]
    assert every_cut(HARMONY, text, starts_in="reasoning") == expected
    assert every_cut(HARMONY, "Yes.<|return|>") == [Content("Yes.")]


def test_arguments_stream() -> None:
    parser = HARMONY.make(Inputs("content", (), frozenset(HARMONY.markers)))
    names = ("<|channel|>", "commentary to=functions.f ", "<|constrain|>", "json", "<|message|>")
    parser.push([Piece(text, token=text.startswith("<")) for text in names])
    assert parser.push([Piece('{"a')]) == [CallStart("f"), CallArguments('{"a')]
    assert parser.push([Piece('": 1')]) == [CallArguments('": 1')]
    assert parser.push([Piece("}")]) == [CallArguments("}"), CallEnd()]
    assert parser.finish() == []


def test_who_speaks_so() -> None:
    assert choose('{{- "<|start|>assistant<|channel|>final<|message|>" + content }}') is HARMONY
