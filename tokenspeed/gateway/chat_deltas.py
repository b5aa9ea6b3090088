# SPDX-License-Identifier: MIT
"""Events of an answer as the deltas of /v1/chat/completions. Knows their shapes, no transport."""

from collections.abc import Sequence
from typing import Any

from tokenspeed.gateway.answer import Block
from tokenspeed.text.channels import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from tokenspeed.text.conversation import Conversation
from tokenspeed.text.custom_input import InputText, input_text


class Deltas:
    """One choice's deltas, in order; neighbours of a kind are one."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._index = -1  # of the call in work
        self._input: InputText | None = None  # of a custom tool
        self._made: list[dict[str, Any]] = []

    def of(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """The deltas of these events."""
        self._made = []
        for event in events:
            match event:
                case Content(text):
                    self._text("content", text)
                case Reasoning(text):
                    self._text("reasoning", text)
                case CallStart(name, call_id):
                    self._start(name, call_id)
                case CallArguments(text):
                    self._arguments(text if self._input is None else self._input.push(text))
                case CallEnd() if self._input is not None:
                    self._arguments(self._input.finish())
        return self._made

    def _text(self, key: str, text: str) -> None:
        if self._made and key in self._made[-1]:
            text = self._made[-1][key] + text
        else:
            self._made.append({})
        self._made[-1][key] = text
        if key == "reasoning":
            self._made[-1]["reasoning_content"] = text

    def _start(self, name: str, call_id: str | None) -> None:
        self._index += 1
        tool = self._conversation.tool(name)
        self._input = InputText() if tool is not None and tool.custom else None
        kind, key = _KINDS[self._input is not None]
        call = {"index": self._index, "id": call_id, "type": kind, kind: {"name": name, key: ""}}
        self._made.append({"tool_calls": [call]})

    def _arguments(self, text: str) -> None:
        if not text:
            return
        kind, key = _KINDS[self._input is not None]
        last = (
            self._made[-1]["tool_calls"][0]
            if self._made and "tool_calls" in self._made[-1]
            else None
        )
        if last is None or last["index"] != self._index:
            last = {"index": self._index, kind: {key: ""}}
            self._made.append({"tool_calls": [last]})
        last[kind][key] += text


_KINDS = {False: ("function", "arguments"), True: ("custom", "input")}


def whole_call(block: Block, conversation: Conversation) -> dict[str, Any]:
    """A call in a whole message."""
    tool = conversation.tool(block.name)
    if tool is not None and tool.custom:
        about = {"name": block.name, "input": input_text(block.text)}
        return {"id": block.call_id, "type": "custom", "custom": about}
    about = {"name": block.name, "arguments": block.text}
    return {"id": block.call_id, "type": "function", "function": about}
