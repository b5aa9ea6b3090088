# SPDX-License-Identifier: MIT
"""What a model might say and how each format writes it: cases for the tests of parsers.

A `Said` is an answer as meant. `WRITERS` has, for each format, what renders it; a format's limits
(no reasoning, nothing after calls, texts that cannot be written) are the writer's.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenspeed.text.channels import (
    CallArguments,
    CallEnd,
    CallStart,
    Channel,
    Content,
    Event,
    Format,
    Inputs,
    Piece,
    Reasoning,
    joined,
)
from tokenspeed.text.conversation import Tool
from tokenspeed.text.parsers.schema_kinds import KINDS
from tokenspeed.text.parsers.typed import converted


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Said:
    """`blocks` are content and calls in order; no two texts stand next to each other."""

    reasoning: str
    blocks: tuple[str | Call, ...]
    tools: tuple[Tool, ...] = ()

    @property
    def calls(self) -> list[Call]:
        return [block for block in self.blocks if isinstance(block, Call)]


def anything(said: Said) -> bool:
    return True


@dataclass(frozen=True)
class Writer:
    """`fits`: whether the format can write it so that it is read back the same."""

    write: Callable[[Said], str]
    fits: Callable[[Said], bool] = anything
    reasons: bool = True
    talks_before: bool = True  # content before calls
    talks_after: bool = True  # content between and after calls
    parallel: bool = True  # several calls
    starts_in: Channel = "content"


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def raw(value: Any) -> str:
    """As templates of tags write a value: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else dumps(value)


def thought(said: Said) -> str:
    return f"<think>\n{said.reasoning}\n</think>\n\n" if said.reasoning else ""


def in_blocks(said: Said, call: Callable[[Call], str]) -> str:
    """Reasoning in tags, then content and calls with line breaks between."""
    return thought(said) + "\n".join(
        call(block) if isinstance(block, Call) else block for block in said.blocks
    )


def _hermes(call: Call) -> str:
    members = {"name": call.name, "arguments": call.arguments}
    order = sorted(members, reverse=len(call.name) % 3 > 0)
    return f"<tool_call>\n{dumps({key: members[key] for key in order})}\n</tool_call>"


def _qwen_xml(call: Call) -> str:
    parameters = "".join(
        f"<parameter={key}>\n{raw(value)}\n</parameter>\n" for key, value in call.arguments.items()
    )
    return f"<tool_call>\n<function={call.name}>\n{parameters}</function>\n</tool_call>"


def _glm(call: Call) -> str:
    if not call.arguments:
        return f"<tool_call>{call.name}</tool_call>"
    parameters = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{raw(value)}</arg_value>\n"
        for key, value in call.arguments.items()
    )
    return f"<tool_call>{call.name}\n{parameters}</tool_call>"


def _minimax(call: Call) -> str:
    parameters = "".join(
        f'<parameter name="{key}">{raw(value)}</parameter>\n'
        for key, value in call.arguments.items()
    )
    return (
        f'<minimax:tool_call>\n<invoke name="{call.name}">\n{parameters}'
        "</invoke>\n</minimax:tool_call>"
    )


def no_ending(*closers: str) -> Callable[[Said], bool]:
    """That no value of raw text holds what would end it."""

    def fits(said: Said) -> bool:
        values = [raw(value) for call in said.calls for value in call.arguments.values()]
        return not any(closer in value for closer in closers for value in values)

    return fits


def only_text(said: Said) -> bool:
    return not said.calls


WRITERS: dict[str, Writer] = {
    "hermes": Writer(lambda said: in_blocks(said, _hermes)),
    "qwen3_xml": Writer(
        lambda said: in_blocks(said, _qwen_xml), no_ending("</parameter>", "</function>")
    ),
    "glm45": Writer(lambda said: in_blocks(said, _glm), no_ending("</arg_value>")),
    "minimax_m2": Writer(
        lambda said: in_blocks(said, _minimax), no_ending("</parameter>", "</invoke>")
    ),
    "think": Writer(lambda said: in_blocks(said, _hermes), only_text),
}

_WORDS = (
    "I'll look", "<", "</", "<b>", "a < b && c > d", "{", "}", "[1, 2]", '"', "'", "\\", "\\n", "\n",
    "\n\n", "  ", "\t", "é", "日本語", "🙂", "\u2028", "|", "｜", "<|", "｜>", "```", "```json\n",
    "function", "name", "arguments", "null", "true", "5", ": ", ", ", "=", ">", "/>", "&lt;", "tool",
    "def f(x):\n    return x<3\n", "<tool", "<thin", "think>", "call>", "\r\n", "0", "-", ".",
)  # fmt: skip
_NAMES = ("read_file", "f", "mcp__github__list-issues", "get.weather", "Bash", "run2")
_KEYS = ("path", "a", "old_string", "x-y", "line_no", "日本")


def some_text(rng: random.Random, more: Sequence[str] = (), most: int = 8) -> str:
    """Text of words that look like markup, sometimes with one of `more` among them."""
    words = [rng.choice(_WORDS) for _ in range(rng.randint(0, most))]
    if more and rng.random() < 0.2:
        words.insert(rng.randint(0, len(words)), rng.choice(more))
    return "".join(words)


def some_value(rng: random.Random, markers: Sequence[str], depth: int = 0) -> Any:
    kind = rng.random()
    if depth < 3 and kind < 0.15:
        return [some_value(rng, markers, depth + 1) for _ in range(rng.randint(0, 3))]
    if depth < 3 and kind < 0.3:
        keys = rng.sample(_KEYS, rng.randint(0, 3))
        return {key: some_value(rng, markers, depth + 1) for key in keys}
    if kind < 0.5:
        return rng.choice([0, -7, 12345678901234567890, 1.5, -2e-7, True, False, None])
    return some_text(rng, markers)


def some_schema(rng: random.Random, value: Any) -> Any:
    """A schema that allows `value`, and under which it is read back as what it is."""
    names = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object"}
    kind = "null" if value is None else names.get(type(value), "array")
    loose = not isinstance(value, str) or converted(value, KINDS) == dumps(value)
    nullable = not isinstance(value, str) or value.strip().lower() != "null"
    plain: dict[str, Any] = {"type": kind}
    choices: list[Any] = [plain]
    if nullable:
        choices += [{"anyOf": [plain, {"type": "null"}]}, {"type": [kind, "null"]}]
        choices += [plain | {"nullable": True}]
    if loose:
        choices += [{}, True, {"$ref": "#"}, {"anyOf": [plain, {"$ref": "#/properties"}]}]
    return rng.choice(choices)


def some_said(rng: random.Random, format_: Format, writer: Writer) -> Said:
    """What `writer` can write. Texts hold no marker of the format; strings in calls do."""
    while True:
        said = _some_said(rng, format_.markers, writer)
        texts = [said.reasoning, *(block for block in said.blocks if isinstance(block, str))]
        if writer.fits(said) and not any(
            mark in text for mark in format_.markers for text in texts
        ):
            return said


def _some_said(rng: random.Random, markers: Sequence[str], writer: Writer) -> Said:
    num_calls = rng.choice([0, 1, 1, 2, 3]) if writer.parallel else rng.choice([0, 1])
    blocks: list[str | Call] = []
    for i in range(num_calls + 1):
        talks = writer.talks_before if i == 0 else writer.talks_after
        text = some_text(rng).strip() if talks and rng.random() < 0.6 else ""
        blocks += [text] if text else []
        if i < num_calls:
            keys = rng.sample(_KEYS, rng.randint(0, 3))
            arguments = {key: some_value(rng, markers) for key in keys}
            blocks.append(Call(rng.choice(_NAMES), arguments))
    reasoning = some_text(rng).strip() if writer.reasons and rng.random() < 0.6 else ""
    return Said(reasoning, tuple(blocks), _tools(rng, blocks))


def _tools(rng: random.Random, blocks: Iterable[str | Call]) -> tuple[Tool, ...]:
    """Tools for the calls; where two calls of a name disagree, the schema says nothing of types."""
    schemas: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[str, str], Any] = {}
    for call in blocks:
        if not isinstance(call, Call):
            continue
        properties = schemas.setdefault(call.name, {})
        for key, value in call.arguments.items():
            if (call.name, key) in seen:
                both = [seen[call.name, key], value]
                properties[key] = (
                    {"type": "string"} if all(isinstance(v, str) for v in both) else {}
                )
            else:
                properties[key] = some_schema(rng, value)
            seen[call.name, key] = value
    return tuple(
        Tool(name, parameters={"type": "object", "properties": properties})
        for name, properties in schemas.items()
    )


def one_value_a_key(said: Said) -> Said:
    """The same, but every call of a name has the arguments of the first."""
    first: dict[str, Call] = {}
    blocks = [
        first.setdefault(block.name, block) if isinstance(block, Call) else block
        for block in said.blocks
    ]
    return replace(said, blocks=tuple(blocks))


def expected(said: Said) -> list[Event | Call]:
    """The events to come, a call's events as the call."""
    reasoning: list[Event | Call] = [Reasoning(said.reasoning)] if said.reasoning else []
    return reasoning + [Content(b) if isinstance(b, str) else b for b in said.blocks]


def with_calls(events: Sequence[Event]) -> list[Event | Call]:
    """Events with each whole call made one."""
    made: list[Event | Call] = []
    name, parts = "", [""]
    for event in events:
        if isinstance(event, CallStart):
            name, parts = event.name, []
        elif isinstance(event, CallArguments):
            parts.append(event.text)
        elif isinstance(event, CallEnd):
            assert event.complete, (name, parts)
            made.append(Call(name, json.loads("".join(parts))))
        else:
            made.append(event)
    return made


def parse(format_: Format, inputs: Inputs, steps: Iterable[Sequence[Piece]]) -> list[Event]:
    """The events of an answer that came in these steps; checks the order that is promised."""
    parser = format_.make(inputs)
    events: list[Event] = []
    for step in steps:
        events += parser.push(step)
    events += parser.finish()
    check_order(events)
    return joined(events)


def check_order(events: Sequence[Event]) -> None:
    in_call = False
    for event in events:
        assert isinstance(event, CallArguments | CallEnd) == in_call, events
        in_call = isinstance(event, CallStart | CallArguments)
    assert not in_call


def steps_of(text: str, cuts: Sequence[int]) -> list[list[Piece]]:
    """`text` cut at `cuts`, a piece a step."""
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    return [[Piece(text[a:b])] for a, b in zip([0, *ends], ends, strict=False)]
