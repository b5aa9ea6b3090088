# SPDX-License-Identifier: MIT
"""Grammars of whole answers: what they allow, the model's own parser reads as what was asked."""

import json
import random
from typing import Any

import pytest
import torch

from tokenspeed.errors import RequestError
from tokenspeed.execution.grammars import GrammarState, pack_vocabulary, tokenizer_info
from tokenspeed.text.answer_grammar import AnswerGrammar
from tokenspeed.text.call_syntax import SYNTAXES
from tokenspeed.text.channels import (
    CallArguments,
    CallStart,
    Channel,
    Content,
    Event,
    Inputs,
    Piece,
    joined,
)
from tokenspeed.text.conversation import OutputFormat, Tool, ToolChoice
from tokenspeed.text.grammar_worker import compile_spec
from tokenspeed.text.parsers import FORMATS

xgrammar = pytest.importorskip("xgrammar")

WEATHER = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Paris", "New York"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
            "deep": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    strict=True,
)
PATCH = Tool("patch", custom=True, grammar=("lark", 'start: "a\\"" /[b-d\\n]{1,3}/ "z"'))
TOOLS = (WEATHER, PATCH)
REQUIRED = ToolChoice("required")
ENDS = {"harmony": "<|end|>"}
LITTLE = set(b'abc"}]<')
SPACE = set(b" \t\n")


class Model:
    """Says anything that its grammar allows, a little in a hurry; bytes and markers are tokens."""

    def __init__(self, name: str, *, marked: bool) -> None:
        self.format = FORMATS[name]
        # Tags with names in them are no vocabulary's tokens.
        whole = [mark for mark in self.format.markers if not mark.endswith("=")]
        whole = [mark for mark in whole if "DSML" not in mark and "invoke" not in mark]
        marks = [mark for mark in whole if "parameter" not in mark and "function" not in mark]
        names = [*marks, "｜DSML｜"] if marked else []
        self.added = {mark: 256 + i for i, mark in enumerate(names)}
        self.names = {token: mark for mark, token in self.added.items()}
        self.tokens = [bytes([i]) for i in range(256)]
        self.tokens += [b"\xff" + mark.encode() for mark in self.added] + [b"\xff"]
        self.end = len(self.tokens) - 1
        self.info = tokenizer_info(pack_vocabulary(self.tokens, [self.end]))

    def grammar(self, *arguments: Any) -> Any:
        spec = AnswerGrammar(self.format, self.added).spec(*arguments)
        assert spec is not None
        made = {"format": spec.format, "tokens": dict(spec.tokens)}
        data = compile_spec(made, self.info).decode()
        return xgrammar.CompiledGrammar.deserialize_json(data, self.info)

    def say(self, grammar: Any, seed: int, begin: list[int] | None = None) -> list[Piece]:
        rng, state = random.Random(seed), GrammarState(grammar, [self.end], begin or [])
        assert not state.failed
        said = list(begin or [])
        mask = torch.empty((1, -(-len(self.tokens) // 32)), dtype=torch.int32)
        while len(said) < 3000:
            mask.fill_(-1)
            state.fill(mask, 0)
            bits = mask[0].tolist()
            fits = [t for t in range(len(self.tokens)) if bits[t // 32] >> (t % 32) & 1]
            assert fits, bytes(t for t in said if t < 256)
            if self.end in fits and rng.random() < 0.9:
                break
            terse = [t for t in fits if t not in SPACE] or fits
            if len(terse) > 100:
                terse = [t for t in terse if t > 255 or t in LITTLE]
            token = rng.choice(terse)
            if token == self.end:
                break
            state.record(token)
            assert not state.failed
            said.append(token)
        else:
            pytest.fail("the grammar has no end")
        return self.pieces(said)

    def ids(self, text: str) -> list[int]:
        return [self.added[text]] if text in self.added else list(text.encode())

    def pieces(self, said: list[int]) -> list[Piece]:
        made, run = [], b""
        for token in [*said, self.end]:
            if token < 256:
                run += bytes([token])
                continue
            made += [Piece(run.decode(errors="replace"))] if run else []
            made += [Piece(self.names[token], token=True)] if token in self.names else []
            run = b""
        return made

    def read(self, pieces: list[Piece], starts_in: Channel) -> list[Event]:
        tokens = frozenset(self.added) & frozenset(self.format.markers)
        parser = self.format.make(Inputs(starts_in, TOOLS, tokens))
        return joined(parser.push(pieces) + parser.finish())


def calls_of(events: list[Event]) -> list[tuple[str, Any]]:
    found: list[list[str]] = []
    for event in events:
        if isinstance(event, CallStart):
            found.append([event.name, ""])
        elif isinstance(event, CallArguments):
            found[-1][1] += event.text
    return [(name, json.loads(arguments)) for name, arguments in found]


def content_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def check_calls(events: list[Event]) -> None:
    calls = calls_of(events)
    assert calls
    assert content_of(events).strip() == ""
    for name, arguments in calls:
        if name == "get_weather":
            assert arguments["city"] in ("Paris", "New York")
            assert arguments["days"] in range(10)
            assert all(type(one) is bool for one in arguments.get("deep", []))
        else:
            assert name == "patch"
            assert list(arguments) == ["input"]
            assert arguments["input"][:2] + arguments["input"][-1] == 'a"z'
            assert set(arguments["input"][2:-1]) <= set("bcd\n")


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", SYNTAXES)
def test_required_calls(name: str, marked: bool) -> None:
    model = Model(name, marked=marked)
    grammar = model.grammar(TOOLS, REQUIRED, None, "reasoning")
    begin = [*b"why", *model.ids(ENDS.get(name, "</think>"))]
    if name == "harmony":
        begin += [*model.ids("<|start|>"), *b"assistant"]
        begin += [*model.ids("<|channel|>"), *b"commentary"]
    for seed in range(4):
        check_calls(model.read(model.say(grammar, seed, begin), "reasoning"))


@pytest.mark.parametrize("name", ["hermes", "qwen3_xml", "kimi_k2", "harmony"])
def test_a_named_call(name: str) -> None:
    model = Model(name, marked=True)
    grammar = model.grammar(TOOLS, ToolChoice("required", "get_weather"), None, "content")
    begin = [*model.ids("<|channel|>"), *b"commentary"] if name == "harmony" else []
    events = model.read(model.say(grammar, 1, begin), "content")
    check_calls(events)
    assert [name for name, _ in calls_of(events)] == ["get_weather"]


@pytest.mark.parametrize("name", ["hermes", "think", "harmony", "deepseek_v31"])
def test_content_of_a_form(name: str) -> None:
    model = Model(name, marked=True)
    output = OutputFormat("choice", ["yes", "no"])
    grammar = model.grammar((), None, output, "reasoning")
    begin = [*b"why", *model.ids(ENDS.get(name, "</think>"))]
    if name == "harmony":
        begin += [*model.ids("<|start|>"), *b"assistant", *model.ids("<|channel|>"), *b"final"]
    for seed in range(4):
        events = model.read(model.say(grammar, seed, begin), "reasoning")
        assert content_of(events) in ("yes", "no")


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", ["hermes", "qwen3_xml", "kimi_k2", "glm45"])
def test_strict_tools_are_free_to_be_called(name: str, marked: bool) -> None:
    model = Model(name, marked=marked)
    grammar = model.grammar(TOOLS, None, None, "content")
    assert content_of(model.read(model.say(grammar, 0, [*b"Hello"]), "content"))[:5] == "Hello"
    begin = [*b"Look", *model.ids(SYNTAXES[name].trigger)]
    state = GrammarState(grammar, [model.end], begin)
    state.record(ord("?"))
    assert state.failed  # what begins a call is one
    events = model.read(model.say(grammar, 3, begin), "content")
    assert calls_of(events)[0][0] in ("get_weather", "patch")


def test_content_or_calls() -> None:
    model = Model("hermes", marked=True)
    grammar = model.grammar((WEATHER,), None, OutputFormat("choice", ["no"]), "content")
    assert GrammarState(grammar, [model.end], [*b"no"]).complete
    assert not GrammarState(grammar, [model.end], model.ids("<tool_call>")).failed
    assert GrammarState(grammar, [model.end], [*b"yes"]).failed


def test_what_needs_no_grammar() -> None:
    answers = AnswerGrammar(FORMATS["hermes"], {})
    assert answers.spec() is None
    assert answers.spec((Tool("f"),)) is None
    assert answers.spec(TOOLS, ToolChoice("none")) is None


@pytest.mark.parametrize(
    ("name", "tools", "choice", "code"),
    [
        ("think", TOOLS, REQUIRED, "unsupported_parameter"),
        ("hermes", (), REQUIRED, "invalid_value"),
        ("hermes", TOOLS, ToolChoice("required", "other"), "invalid_value"),
        ("hermes", (Tool("f", parameters={"not": {}}, strict=True),), REQUIRED, "invalid_grammar"),
    ],
)
def test_what_cannot_be_enforced(
    name: str, tools: tuple[Tool, ...], choice: ToolChoice, code: str
) -> None:
    with pytest.raises(RequestError) as caught:
        AnswerGrammar(FORMATS[name], {}).spec(tools, choice)
    assert caught.value.code == code


def test_a_tool_that_is_not_strict_may_have_any_schema() -> None:
    odd = Tool("odd", parameters={"type": "object", "not": {"required": ["x"]}})
    grammar = Model("hermes", marked=False).grammar((odd,), REQUIRED, None, None)
    said = b'<tool_call>\n{"name": "odd", "arguments": {"y":[1,{}]}}\n</tool_call>'
    assert GrammarState(grammar, [256], list(said)).complete
