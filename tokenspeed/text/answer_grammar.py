# SPDX-License-Identifier: MIT
"""What a request asks of an answer -> the structural tag of the whole answer, reasoning included.

    reasoning, free -> content of some form, or calls in the syntax of the model's format

Knows formats' syntaxes (`text/call_syntax.py`) and the vocabulary's markers; compiles nothing. A
marker that the vocabulary has as a token is asked for as that token, as the parsers want it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenspeed.errors import RequestError
from tokenspeed.text.call_syntax import SYNTAXES, CallSyntax
from tokenspeed.text.channels import Channel, Format
from tokenspeed.text.conversation import OutputFormat, Tool, ToolChoice
from tokenspeed.text.grammar import GrammarSpec
from tokenspeed.text.json_schema import check_size, narrowed
from tokenspeed.text.output_format import content_tag
from tokenspeed.text.regexes import check_regex

Tag = dict[str, Any]

THINK, END_THINK = "<think>", "</think>"
_ANY_OBJECT: Tag = {"type": "object"}
_INPUT: Tag = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class AnswerGrammar:
    """Makes specifications for one model. `added`: the vocabulary's added tokens by text."""

    format: Format
    added: Mapping[str, int]

    def spec(
        self,
        tools: Sequence[Tool] = (),
        choice: ToolChoice | None = None,
        output: OutputFormat | None = None,
        starts_in: Channel | None = None,
        *,
        field: str = "response_format",
        loose: bool = False,
    ) -> GrammarSpec | None:
        """The grammar of an answer; None if anything goes. `starts_in` None: it has no channels.

        `loose`: arguments of tools that are not strict are any object. `RequestError` for what the
        model's format or the compiler cannot do.
        """
        choice = choice or ToolChoice()
        forced = choice.mode == "required" or choice.name is not None
        if choice.mode == "none":
            tools = ()
        if forced:
            tag = self._forced_calls(tools, choice, loose)
            return self._spec([*self._reasoning(starts_in), tag], "tool_choice")
        if output is not None:
            content = self._content(output, field, starts_in)
            if tools and self.format.name in SYNTAXES:
                content = _either([content, _all(self._calls(tools, choice, loose=loose))])
            return self._spec([*self._reasoning(starts_in), content], field)
        if any(tool.strict or tool.grammar for tool in tools):
            return self._spec([self._free_with_calls(tools, choice)], "tools")
        return None

    def _spec(self, tags: list[Tag], field: str) -> GrammarSpec:
        tag = _all(tags)
        check_size(tag, field)
        syntax = SYNTAXES.get(self.format.name)
        inner = () if syntax is None else syntax.inner
        tokens = {mark: self.added[mark] for mark in inner if mark in self.added}
        return GrammarSpec(tag, tokens, field)

    def _content(self, output: OutputFormat, field: str, starts_in: Channel | None) -> Tag:
        tag = content_tag(output, field, self.added)
        if self.format.name == "harmony" and starts_in is not None:
            return _all([*self._literal("<|channel|>final<|message|>"), tag])
        return tag

    def _reasoning(self, starts_in: Channel | None) -> list[Tag]:
        """What stands before the part that is asked for: anything up to where reasoning ends."""
        if starts_in is None:
            return []
        if self.format.name == "harmony":
            return self._analysis(starts_in)
        rest = [*self._any_until(END_THINK), {"type": "regex", "pattern": r"\n{0,2}"}]
        if starts_in == "reasoning":
            return rest
        if THINK not in self.added:
            return []
        return [{"type": "optional", "content": _all([*self._literal(THINK), *rest])}]

    def _analysis(self, starts_in: Channel) -> list[Tag]:
        rest = [*self._any_until("<|end|>"), *self._literal("<|start|>assistant")]
        message = [*self._literal("<|channel|>analysis<|message|>"), *rest]
        more = {"type": "star", "content": _all(message)}
        return [*rest, more] if starts_in == "reasoning" else [more]

    def _any_until(self, end: str) -> list[Tag]:
        if end not in self.added:
            return [{"type": "any_text", "excludes": [end]}, _text(end)]
        markers = [self.added[mark] for mark in self.format.markers if mark in self.added]
        free = {"type": "any_tokens", "exclude_tokens": sorted(markers)}
        return [free, *self._literal(end)]

    def _literal(self, text: str) -> list[Tag]:
        """The text, its markers as tokens."""
        known = sorted((mark for mark in self.added if mark and mark in text), key=len)
        if not known:
            return [_text(text)] if text else []
        pattern = "(" + "|".join(map(re.escape, reversed(known))) + ")"
        return [
            {"type": "token", "token": self.added[part]} if part in self.added else _text(part)
            for part in re.split(pattern, text)
            if part
        ]

    def _syntax(self, field: str) -> CallSyntax:
        syntax = SYNTAXES.get(self.format.name)
        if syntax is None:
            raise RequestError(
                f"{field}: calls in the answer format `{self.format.name}` of this model cannot be"
                " enforced",
                field=field,
                code="unsupported_parameter",
            )
        return syntax

    def _forced_calls(self, tools: Sequence[Tool], choice: ToolChoice, loose: bool) -> Tag:
        if choice.name is not None:
            tools = [tool for tool in tools if tool.name == choice.name]
        if not tools:
            what = "required" if choice.name is None else repr(choice.name)
            raise RequestError(f"tool_choice: no tool for {what}", field="tool_choice")
        self._syntax("tool_choice")
        return _all(self._calls(tools, choice, loose=loose))

    def _free_with_calls(self, tools: Sequence[Tool], choice: ToolChoice) -> Tag:
        """Anything, reasoning too, but where a call begins, it is one."""
        syntax = self._syntax("tools")
        calls = _all(self._calls(tools, choice, loose=True)[len(self._literal(syntax.trigger)) :])
        first, *rest = self._literal(syntax.trigger)
        body = _all([*rest, calls])
        if self.format.name == "harmony":  # other messages begin so, too
            names = [tool.name for tool in tools]
            rules = [[f"to=functions.{n}", _all(self._after_name(tools, n))] for n in names]
            return {"type": "dispatch", "rules": rules, "loop": False}
        if first["type"] == "token":
            return {"type": "token_dispatch", "rules": [[first["token"], body]], "loop": True}
        return {"type": "dispatch", "rules": [[first["value"], body]], "loop": True}

    def _after_name(self, tools: Sequence[Tool], name: str) -> list[Tag]:
        tool = next(tool for tool in tools if tool.name == name)
        syntax = self._syntax("tools")
        return [*self._literal(syntax.suffix), self._arguments(tool, 0, syntax, loose=True)]

    def _calls(self, tools: Sequence[Tool], choice: ToolChoice, *, loose: bool) -> list[Tag]:
        """One call of any of the tools, or several."""
        syntax = self._syntax("tools")
        call = _either(
            [
                self._call(tool, index, syntax, loose=loose and not tool.strict)
                for index, tool in enumerate(tools)
            ]
        )
        tags = [*self._literal(syntax.trigger), *self._literal(syntax.opening + syntax.prefix)]
        tags.append(call)
        if syntax.between is not None and choice.parallel and choice.name is None:
            more = [*self._literal(syntax.between + syntax.prefix), call]
            tags.append({"type": "star", "content": _all(more)})
        return [*tags, *self._literal(syntax.closing)]

    def _call(self, tool: Tool, index: int, syntax: CallSyntax, *, loose: bool) -> Tag:
        name = json.dumps(tool.name, ensure_ascii=False)[1:-1]
        before, number, after = syntax.suffix.partition("#")
        tags = self._literal((name if syntax.style == "json" else tool.name) + before)
        if number:
            tags.append({"type": "regex", "pattern": "[0-9]{1,4}"})
        tags += self._literal(after)
        tags.append(self._arguments(tool, index, syntax, loose=loose))
        return _all([*tags, *self._literal(syntax.tail)])

    def _arguments(self, tool: Tool, index: int, syntax: CallSyntax, *, loose: bool) -> Tag:
        field = f"tools[{index}]"
        if tool.grammar is not None:
            return self._custom_input(tool.grammar, field, syntax)
        if tool.custom:
            schema: Any = _INPUT
        elif loose and not tool.strict:
            schema = _ANY_OBJECT
        else:
            schema = _object_schema(tool, field, raw_texts=syntax.style != "json")
        return {"type": "json_schema", "json_schema": schema, "style": syntax.style}

    def _custom_input(self, grammar: tuple[str, str], field: str, syntax: CallSyntax) -> Tag:
        kind, text = grammar
        if kind == "regex":
            check_regex(text, field)
        json_style = syntax.style == "json"
        body = {"type": "foreign", "syntax": kind, "text": text, "quoted": json_style}
        if json_style:
            return _all([_text('{"input": '), body, _text("}")])
        before, after = (self._literal(part) for part in syntax.parameter)
        return _all([*before, body, *after])


def _object_schema(tool: Tool, field: str, *, raw_texts: bool) -> Any:
    """The tool's schema; any object where it cannot be enforced and need not be."""
    try:
        schema = narrowed(tool.parameters or _ANY_OBJECT, field, raw_texts=raw_texts)
        if isinstance(schema, bool) or schema.get("type", "object") != "object":
            raise RequestError(f"{field}: a tool's parameters are an object", field=field)
        return schema
    except RequestError:
        if tool.strict:
            raise
        return _ANY_OBJECT


def _text(text: str) -> Tag:
    return {"type": "const_string", "value": text}


def _all(tags: Sequence[Tag]) -> Tag:
    return tags[0] if len(tags) == 1 else {"type": "sequence", "elements": list(tags)}


def _either(tags: Sequence[Tag]) -> Tag:
    return tags[0] if len(tags) == 1 else {"type": "or", "elements": list(tags)}
