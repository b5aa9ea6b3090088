# SPDX-License-Identifier: MIT
"""Answers of Qwen, GLM and MiniMax as they come, the broken ones too."""

from typing import Any

import pytest

from tests.unit.parser_cases import parse, steps_of
from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Channel,
    Content,
    Event,
    Inputs,
    Piece,
    Reasoning,
)
from tokenspeed.text.conversation import Tool
from tokenspeed.text.parsers import FORMATS, choose

PROPERTIES: dict[str, Any] = {
    "path": {"type": "string"},
    "line": {"type": "integer"},
    "edits": {"type": "array"},
    "mode": {"type": ["string", "null"]},
}
TOOLS = (Tool("edit", parameters={"type": "object", "properties": PROPERTIES}), Tool("ls"))


def read(name: str, text: str, starts_in: Channel = "content") -> list[Event]:
    """The events, the same for the whole text and for each character alone."""
    inputs = Inputs(starts_in, TOOLS, frozenset())
    whole = parse(FORMATS[name], inputs, steps_of(text, []))
    assert parse(FORMATS[name], inputs, steps_of(text, range(len(text)))) == whole
    return whole


def call(name: str, arguments: str, complete: bool = True) -> list[Event]:
    parts: list[Event] = [CallArguments(arguments)] if arguments else []
    return [CallStart(name), *parts, CallEnd(complete)]


HERMES = """<think>
Let me see "<b>" & ünï.
</think>

I'll look.
<tool_call>
{"name": "edit", "arguments": {"path": "a </tool_call> <think> b", "edits": [{"a": [1, 2]}]}}
</tool_call>
<tool_call>
{"arguments": {"path": "日本"}, "name": "ls"}
</tool_call>
Done?
<tool_call>{"name": "ls"}</tool_call>
"""


def test_hermes() -> None:
    edit = '{"path": "a </tool_call> <think> b", "edits": [{"a": [1, 2]}]}'
    assert read("hermes", HERMES) == [
        Reasoning('Let me see "<b>" & ünï.'),
        Content("I'll look."),
        *call("edit", edit),
        *call("ls", '{"path": "日本"}'),
        Content("Done?"),
        *call("ls", "{}"),
    ]


QWEN = """Let me edit.
</think>

<tool_call>
<function=edit>
<parameter=path>
  x = "<parameter=path>\\n"
</parameter>
<tag>
</parameter>
<parameter=line>
12
</parameter>
<parameter=edits>
[{"old": "a</parameter>b"}]
</parameter>
<parameter=mode>
null
</parameter>
</function>
</tool_call>
<tool_call>
<function=ls>
</function>
</tool_call>"""


def test_qwen_xml() -> None:
    edit = (
        '{"path": "  x = \\"<parameter=path>\\\\n\\"\\n</parameter>\\n<tag>", "line": 12, '
        '"edits": [{"old": "a</parameter>b"}], "mode": null}'
    )
    assert read("qwen3_xml", QWEN, "reasoning") == [
        Reasoning("Let me edit."),
        *call("edit", edit),
        *call("ls", "{}"),
    ]


def test_qwen_without_what_belongs_there() -> None:
    bare = "See <function=x>, and:\n<function=edit>\n<parameter=path>\na\n</parameter>\n</function>"
    whole = '{"path": "a"}'
    assert read("qwen3_xml", bare) == [Content("See <function=x>, and:"), *call("edit", whole)]
    assert read("qwen3_xml", bare + "\n</tool_call> ok")[-1] == Content(" ok")
    no_end = "<tool_call><function=edit><parameter=path>\na\n</function>\n</tool_call>"
    assert read("qwen3_xml", no_end) == call("edit", whole)
    no_function = "<tool_call><function=edit><parameter=path>a</parameter></tool_call>!"
    assert read("qwen3_xml", no_function) == [*call("edit", whole), Content("!")]


GLM = """
<think>Two calls.</think>
Here:
<tool_call>edit
<arg_key>path</arg_key>
<arg_value> a</arg_value>b
</arg_value>
<arg_key>line</arg_key>
<arg_value>3</arg_value>
</tool_call>
<tool_call>ls</tool_call><tool_call>ls
</tool_call>"""


def test_glm() -> None:
    assert read("glm45", GLM) == [
        Reasoning("Two calls."),
        Content("Here:"),
        *call("edit", '{"path": " a</arg_value>b\\n", "line": 3}'),
        *call("ls", "{}"),
        *call("ls", "{}"),
    ]


MINIMAX = """I edit.
</think>

<minimax:tool_call>
<invoke name="edit">
<parameter name="path">a.py
</parameter>
<parameter name="edits">["<invoke name=\\"x\\">"]</parameter>
</invoke>
<invoke name="ls">
</invoke>
</minimax:tool_call>
"""


def test_minimax() -> None:
    assert read("minimax_m2", MINIMAX, "reasoning") == [
        Reasoning("I edit."),
        *call("edit", '{"path": "a.py\\n", "edits": ["<invoke name=\\"x\\">"]}'),
        *call("ls", "{}"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "events"),
    [
        ("hermes", "<tool_call>{", [Content("<tool_call>{")]),
        ("hermes", "<tool_call>none</tool_call>", [Content("<tool_call>none</tool_call>")]),
        ("hermes", '<tool_call>{"name": 5}</tool_call>', None),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', None),
        ("hermes", '<tool_call>{"name": "ls", "argum', call("ls", "", False)),
        (
            "hermes",
            '<tool_call>{"name": "ls", "arguments": {"a": "b',
            call("ls", '{"a": "b', False),
        ),
        ("hermes", '<tool_call>{"name": "ls", "arguments": {"a": 1}', call("ls", '{"a": 1}')),
        (
            "hermes",
            '<tool_call>{"name": "ls", "arguments": {"a": 1}\n</tool_call>x',
            [*call("ls", '{"a": 1}'), Content("x")],
        ),
        (
            "hermes",
            '<tool_call>{"name": "ls", "arguments": {\'a\': 1}}</tool_call>x',
            [*call("ls", "{'a': 1}}", False), Content("x")],
        ),
        (
            "hermes",
            '<tool_call>{"name": "ls", "arguments": "{\\"a\\": 1}"}',
            call("ls", '{"a": 1}'),
        ),
        ("hermes", '<tool_call>{"name": "ls", "arguments": null}', call("ls", "{}")),
        ("hermes", '<tool_call>{"name": "ls", "arguments": [1]}', call("ls", "[1]", False)),
        (
            "hermes",
            '<tool_call>{"name": "ls", "arguments": {"a": "x\ny"}}</tool_call>',
            call("ls", '{"a": "x\\ny"}'),
        ),
        ("qwen3_xml", "<tool_call>\n<function=ls>\n<par", call("ls", "", False)),
        (
            "qwen3_xml",
            "<tool_call>\n<function=edit>\n<parameter=line>\n12",
            call("edit", '{"line": ', False),
        ),
        (
            "qwen3_xml",
            "<tool_call>\n<function=edit>\n<parameter=path>\nab\n",
            call("edit", '{"path": "ab', False),
        ),
        ("qwen3_xml", "<tool_call>\nfoo</tool_call>", [Content("<tool_call>\nfoo</tool_call>")]),
        (
            "qwen3_xml",
            "<tool_call><function=ls>junk</function></tool_call>",
            [*call("ls", "", False), Content("junk</function>")],
        ),
        ("glm45", '<tool_call>{"name": "ls"}</tool_call>', None),
        ("glm45", "<tool_call>ls", [Content("<tool_call>ls")]),
        ("glm45", "<tool_call>ls\n<arg_key>a<b", None),
        ("minimax_m2", "<minimax:tool_call>x", [Content("<minimax:tool_call>x")]),
        ("minimax_m2", '<minimax:tool_call><invoke name="ls">', call("ls", "", False)),
    ],
)
def test_broken_calls(name: str, text: str, events: list[Event] | None) -> None:
    if events is None:
        parts = [e for e in read(name, text) if isinstance(e, CallEnd)]
        assert not any(part.complete for part in parts)
    else:
        assert read(name, text) == events


def test_thinking() -> None:
    assert read("think", "a\n</think>\n\nb", "reasoning") == [Reasoning("a"), Content("b")]
    assert read("think", "<think>\na</think>b", "reasoning") == [Reasoning("a"), Content("b")]
    assert read("think", "a </think> b") == [Content("a  b")]
    assert read("think", "say <think>x</think> y") == [Content("say <think>x</think> y")]
    assert read("think", "\n  code\n") == [Content("\n  code\n")]
    assert read("think", "cut\n", "reasoning") == [Reasoning("cut")]
    assert read("think", "<think>\n\n</think>\n\nhi") == [Content("hi")]


def test_a_call_ends_reasoning() -> None:
    text = 'Now\n<tool_call>{"name": "ls"}</tool_call>\n</think>\nok'
    assert read("hermes", text, "reasoning") == [Reasoning("Now"), *call("ls", "{}"), Content("ok")]
    named = "The <tool_call> tag</think>ok"
    assert read("hermes", named, "reasoning") == [Reasoning("The <tool_call> tag"), Content("ok")]
    again = '<tool_call>{"name": "ls"}</tool_call><think>hm</think>ok'
    assert read("hermes", again) == [*call("ls", "{}"), Reasoning("hm"), Content("ok")]


def test_arguments_stream() -> None:
    text = "<tool_call>\n<function=edit>\n<parameter=path>\nabc"
    parser = FORMATS["qwen3_xml"].make(Inputs("content", TOOLS, frozenset()))
    events = [parser.push([Piece(char)]) for char in text]
    assert events[-3:] == [[CallArguments('"a')], [CallArguments("b")], [CallArguments("c")]]
    parser = FORMATS["hermes"].make(Inputs("content", TOOLS, frozenset()))
    start = '<tool_call>{"name": "ls", "arguments": {"a": "'
    assert CallStart("ls") in parser.push([Piece(start)])
    assert parser.push([Piece("x")]) == [CallArguments("x")]


def test_markers_count_only_as_tokens() -> None:
    inputs = Inputs("content", TOOLS, frozenset({"<tool_call>", "</tool_call>"}))
    spelled = '<tool_call>{"name": "ls"}</tool_call>'
    assert parse(FORMATS["hermes"], inputs, [[Piece(spelled)]]) == [Content(spelled)]
    pieces = [Piece("<tool_call>", True), Piece('{"name": "ls"}'), Piece("</tool_call>", True)]
    assert parse(FORMATS["hermes"], inputs, [pieces]) == call("ls", "{}")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("hermes", "{{ '<tool_call>\\n{\"name\": \"' + tool_call.name + '\", \"arguments\": ' }}"),
        ("qwen3_xml", "{{ '<tool_call>\\n<function=' + name }}{{ '>\\n<parameter=' + key + '>' }}"),
        ("glm45", "<tool_call>{{ name }}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>"),
        ("minimax_m2", "{% set begin = '<minimax:tool_call>' %}{{ '<invoke name=\"' }}</think>"),
        ("think", "{{ content.split('</think>')[-1] }}"),
    ],
)  # fmt: skip
def test_templates_speak(name: str, source: str) -> None:
    assert choose(source).name == name


@pytest.mark.parametrize("name", ["hermes", "qwen3_xml", "glm45", "minimax_m2", "think"])
def test_where_answers_begin(name: str) -> None:
    starts_in = FORMATS[name].starts_in
    assert starts_in("<|im_start|>assistant\n<think>\n") == "reasoning"
    assert starts_in("<|im_start|>assistant\n<think>\n\n</think>\n\n") == "content"
    assert starts_in("what is <think>?<|im_end|>\n<|im_start|>assistant\n") == "content"
