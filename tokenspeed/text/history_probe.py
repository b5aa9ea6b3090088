# SPDX-License-Identifier: MIT
"""Conversations by which templates are tried: a turn, something before it, something after it."""

from dataclasses import dataclass
from typing import Any

from tokenspeed.text.conversation import Tool

STUB_TOOL = Tool("f", "", {"type": "object", "properties": {"text": {"type": "string"}}})
TOOLS = (
    Tool("first", "One.", {"type": "object", "properties": {"text": {"type": "string"}}}),
    Tool("second", "Two.", {"type": "object", "properties": {}}),
)


@dataclass(frozen=True, slots=True)
class Case:
    """What follows the message `at` is looked at."""

    messages: list[dict[str, Any]]
    at: int
    needs_tools: bool


def _call(number: int, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": {"text": f"word {number}"}}
    return {"id": f"call_{number}", "type": "function", "function": function}


def _result(number: int, name: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "name": name, "content": "done it"}


_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "Please go on."}
_TEXT = {"role": "assistant", "content": "Here you are.", "reasoning_content": "A thought."}
_ONE = {"role": "assistant", "content": "Soon.", "tool_calls": [_call(1, "first")]}
_TWO = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "More thoughts.",
    "tool_calls": [_call(2, "first"), _call(3, "second")],
}
_ROUND: list[dict[str, Any]] = [_USER, _ONE, _result(1, "first")]
_BEFORE: tuple[list[dict[str, Any]], ...] = (
    [_USER, _TEXT, _USER],
    [_SYSTEM, _USER, _TEXT, *_ROUND, _TEXT, _USER],
    [_SYSTEM, _USER, _TEXT, _SYSTEM, _USER],
)
_AFTER_TEXT: tuple[list[dict[str, Any]], ...] = (
    [_USER],
    [],
    [_SYSTEM, _USER],
    [_USER, _SYSTEM],
    [_USER, _TEXT, _USER],
    _ROUND,
)
_AFTER_ONE: tuple[list[dict[str, Any]], ...] = (
    [_result(1, "first")],
    [_result(1, "first"), _SYSTEM],
    [_result(1, "first"), _USER],
    [_USER],
)
_AFTER_TWO: tuple[list[dict[str, Any]], ...] = (
    [_result(2, "first"), _result(3, "second")],
    [_result(2, "first"), _result(3, "second"), _USER],
    [_result(2, "first"), _result(3, "second"), _ONE, _result(1, "first")],
)


def _cases() -> list[Case]:
    made = []
    for before in _BEFORE:
        for turn, afters in ((_TEXT, _AFTER_TEXT), (_ONE, _AFTER_ONE), (_TWO, _AFTER_TWO)):
            for after in afters:
                messages = [*before, turn, *after]
                needs_tools = any("tool_calls" in message for message in messages)
                made.append(Case(messages, len(before), needs_tools))
    return made


CASES = tuple(_cases())
