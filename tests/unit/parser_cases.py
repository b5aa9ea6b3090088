# SPDX-License-Identifier: MIT
"""What a model might say and how each format writes it: cases for the tests of parsers.

A `Said` is an answer as meant. `WRITERS` has, for each format, what renders it; a format's limits
(no reasoning, nothing after calls, texts that cannot be written) are the writer's.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
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
from tokenspeed.text.parsers.schema_kinds import KINDS, kinds_of
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


def in_groups(said: Said, calls: Callable[[list[Call], bool], str]) -> str:
    """As `in_blocks`, but calls that stand next to each other are written as one, and told
    whether they stand where content begins."""
    parts = []
    for _, group in groupby(said.blocks, lambda block: isinstance(block, Call)):
        blocks = list(group)
        found = [block for block in blocks if isinstance(block, Call)]
        texts = [block for block in blocks if isinstance(block, str)]
        parts.append(calls(found, not parts) if found else "".join(texts))
    return thought(said) + "\n\n".join(parts)


def _kimi(calls: list[Call], first: bool) -> str:
    written = "".join(
        f"<|tool_call_begin|>functions.{call.name}:{i}<|tool_call_argument_begin|>"
        f"{dumps(call.arguments)}<|tool_call_end|>"
        for i, call in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def _deepseek(head: str, before: str, after: str) -> Callable[[list[Call], bool], str]:
    def write(calls: list[Call], first: bool) -> str:
        written = "\n".join(
            f"<｜tool▁call▁begin｜>{head.format(call.name)}{before}{dumps(call.arguments)}{after}"
            "<｜tool▁call▁end｜>"
            for call in calls
        )
        return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"

    return write


def _dsml(section: str, dsml: str = "｜DSML｜") -> Callable[[list[Call], bool], str]:
    def write(calls: list[Call], first: bool) -> str:
        written = "".join(f"{one(call)}\n" for call in calls)
        return f"<{dsml}{section}>\n{written}</{dsml}{section}>"

    def one(call: Call) -> str:
        lines = "".join(
            f'<{dsml}parameter name="{key}" string="{dumps(isinstance(value, str))}">'
            f"{raw(value)}</{dsml}parameter>\n"
            for key, value in call.arguments.items()
        )
        return f'<{dsml}invoke name="{call.name}">\n{lines}</{dsml}invoke>'

    return write


def _harmony(said: Said) -> str:
    messages = [f"<|channel|>analysis<|message|>{said.reasoning}"] if said.reasoning else []
    for block in said.blocks:
        if not isinstance(block, Call):
            messages.append(f"<|channel|>final<|message|>{block}")
            continue
        to = f" to=functions.{block.name}"
        head = f"{to}<|channel|>commentary json", f"<|channel|>commentary{to} <|constrain|>json"
        messages.append(f"{head[len(messages) % 2]}<|message|>{dumps(block.arguments)}<|call|>")
    return "<|start|>assistant".join(
        m if m.endswith("<|call|>") else f"{m}<|end|>" for m in messages
    )


def _object(call: Call, arguments: str) -> str:
    return dumps({"name": call.name, arguments: call.arguments})


def _llama(calls: list[Call], first: bool) -> str:
    tag = "" if first and len(calls) % 2 else "<|python_tag|>"
    return tag + "; ".join(_object(call, "parameters") for call in calls)


def _plain_json(calls: list[Call], first: bool) -> str:
    objects = ", ".join(_object(call, "arguments") for call in calls)
    text = objects if len(calls) == 1 else f"[{objects}]"
    return text if first else f"```json\n{text}\n```"


def _pythonic(calls: list[Call], first: bool) -> str:
    written = ", ".join(
        f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"
        for call in calls
    )
    return f"[{written}]" if first else f"<|python_start|>[{written}]<|python_end|>"


def keyword_keys(said: Said) -> bool:
    return all(key.isidentifier() for call in said.calls for key in call.arguments)


def grouped(
    calls: Callable[[list[Call], bool], str], fits: Callable[[Said], bool] = anything
) -> Writer:
    return Writer(lambda said: in_groups(said, calls), fits)


_NO_DSML = no_ending("</｜DSML｜parameter>", "</｜DSML｜invoke>")
_NO_DSML_41 = no_ending("</｜DSML｜ parameter>", "</｜DSML｜ invoke>")

WRITERS: dict[str, Writer] = {
    "kimi_k2": grouped(_kimi),
    "deepseek_v3": grouped(_deepseek("function<｜tool▁sep｜>{}", "\n```json\n", "\n```")),
    "deepseek_v31": grouped(_deepseek("{}<｜tool▁sep｜>", "", "")),
    "deepseek_v32": grouped(_dsml("function_calls"), _NO_DSML),
    "deepseek_v4": grouped(_dsml("tool_calls"), _NO_DSML),
    "deepseek_v41": grouped(_dsml("calls", "｜DSML｜ "), _NO_DSML_41),
    "harmony": Writer(_harmony),
    "llama3_json": grouped(_llama),
    "json": grouped(_plain_json),
    "pythonic": grouped(_pythonic, keyword_keys),
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
    "I'll look",
    "<", "</", "<b>", "a < b && c > d", "{", "}", "[1, 2]", '"', "'", "\\", "\\n", "\n",
    "\n\n", "  ", "\t", "é", "日本語", "🙂", "\u2028", "|", "｜", "<|", "｜>", "```", "```json\n",
    "function", "name", "arguments", "null", "true", "5", ": ", ", ", "=", ">", "/>", "&lt;",
    "tool",
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
        choices += [{}, True, {"$ref": "#/nowhere"}, {"anyOf": [plain, {"$ref": "#/properties"}]}]
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
    tools: dict[str, Tool] = {}
    for i in range(num_calls + 1):
        talks = writer.talks_before if i == 0 else writer.talks_after
        text = some_text(rng).strip() if talks and rng.random() < 0.6 else ""
        blocks += [text] if text else []
        if i < num_calls:
            blocks.append(_some_call(rng, markers, tools))
    reasoning = some_text(rng).strip() if writer.reasons and rng.random() < 0.6 else ""
    return Said(reasoning, tuple(blocks), tuple(tools.values()))


def _some_call(rng: random.Random, markers: Sequence[str], tools: dict[str, Tool]) -> Call:
    """A call of a new tool, added to `tools`, or of one there is, whose schema gives the types."""
    keys = rng.sample(_KEYS, rng.randint(0, 3))
    call = Call(rng.choice(_NAMES), {key: some_value(rng, markers) for key in keys})
    if call.name in tools:
        keys = [key for key in tools[call.name].parameters["properties"] if rng.random() < 0.7]
        return Call(call.name, {key: _fitting(rng, tools[call.name], key) for key in keys})
    properties = {key: some_schema(rng, value) for key, value in call.arguments.items()}
    tools[call.name] = Tool(call.name, parameters={"type": "object", "properties": properties})
    return call


def _fitting(rng: random.Random, tool: Tool, key: str) -> Any:
    """A value of a type that is read back by whatever schema allows it."""
    kinds = kinds_of([tool], tool.name, key)
    examples = {
        "integer": 7,
        "number": -2.5,
        "boolean": True,
        "object": {"a": [None]},
        "null": None,
    }
    examples |= {"array": [{}, "x"], "string": '<string>\n"quoted"'}
    return examples[rng.choice(sorted(kinds))]


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


def every_cut(
    format_: Format,
    text: str,
    tools: Sequence[Tool] = (),
    starts_in: Channel = "content",
) -> list[Event]:
    """The events of `text`, which are the same for it in two parts, wherever cut, and in many."""
    inputs = Inputs(starts_in, tools, frozenset())
    whole = parse(format_, inputs, steps_of(text, []))
    for cuts in (range(len(text)), *([cut] for cut in range(len(text)))):
        assert parse(format_, inputs, steps_of(text, cuts)) == whole, (text, cuts)
    return whole


def calls_of(events: Iterable[Event]) -> list[tuple[str, str | None, str, bool]]:
    """Name, id, arguments and whether complete, of each call."""
    calls: list[tuple[str, str | None, str, bool]] = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append((event.name, event.id, "", False))
        elif isinstance(event, CallArguments | CallEnd):
            name, call_id, text, _ = calls[-1]
            more = event.text if isinstance(event, CallArguments) else ""
            calls[-1] = (name, call_id, text + more, event == CallEnd(complete=True))
    return calls


def check_cut_off(
    format_: Format, text: str, tools: Sequence[Tool] = (), exact: bool = True
) -> None:
    """An answer cut anywhere has the whole one's calls, the last one as far as it came. Where
    values are raw text (not `exact`), the beginning of a marker at the end is a value's."""
    inputs = Inputs("content", tools, frozenset())
    whole = calls_of(parse(format_, inputs, steps_of(text, [])))
    assert all(complete for *_, complete in whole)
    for end in range(len(text)):
        events = parse(format_, inputs, steps_of(text[:end], []))
        assert parse(format_, inputs, steps_of(text[:end], range(end))) == events, text[:end]
        calls = calls_of(events)
        for got, want in zip(calls, whole, strict=False):
            assert got == want or (got is calls[-1] and not got[3]), text[:end]
        if calls and exact:
            assert whole[len(calls) - 1][2].startswith(calls[-1][2]), text[:end]


def names(events: Iterable[Event]) -> list[str]:
    return [event.name for event in events if isinstance(event, CallStart)]
