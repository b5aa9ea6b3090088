# SPDX-License-Identifier: MIT
"""Anthropic's system prompt and messages as OpenAI's chat messages. Knows no answers.

Neighbours of one role are one turn. Tool results become messages of their own, before what the
user says with them. System messages stay where they are.
"""

from collections.abc import Iterator
from typing import Any

from tokenspeed.gateway.app import encode_json
from tokenspeed.gateway.messages_schema import Notes, refuse
from tokenspeed.gateway.messages_tools import Tools

Block = tuple[str, dict[str, Any]]  # where it stands, and the block
Message = dict[str, Any]
_ROLES = ("user", "assistant", "system")
_HOSTED = ("server_tool_use", "mcp_tool_use", "mcp_tool_result")  # and *_tool_result
_SAYS_SO = 40  # characters in which a failed call's text should say that it failed


class Input:
    """Reads a request's messages, and loads the tools that they refer to."""

    def __init__(self, notes: Notes, tools: Tools) -> None:
        self.messages: list[Message] = []
        self._notes, self._tools = notes, tools
        self._open: set[str] = set()  # calls of the last assistant turn that have no result yet
        self._answered: set[str] = set()

    def read(self, system: str | list[Any] | None, messages: list[Any]) -> None:
        """All of it. Raises `RequestError` naming the message and the block."""
        if not messages:
            refuse("messages", "at least one message is required")
        if system:
            self._system(list(_blocks(system, "system")))
        for role, at, blocks in _turns(messages):
            for where, block in blocks:
                self._notes.keep(block.get("cache_control"), where)
            if role == "assistant":
                self._assistant(blocks)
            elif role == "user":
                self._user(blocks, at)
            else:
                self._system(blocks)
        if not self.messages:
            refuse("messages", "at least one message must say something")
        if self.goes_on:
            self._check_final()

    @property
    def goes_on(self) -> bool:
        """Whether the answer is to go on with the last message."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def _check_final(self) -> None:
        if self._open:
            refuse("messages", "`tool_use` blocks must be followed by their `tool_result` blocks")
        text = self.messages[-1]["content"]
        if not text or text != text.rstrip():
            why = "a last message of the assistant must have text, and no white space at its end"
            refuse("messages", why)

    def _system(self, blocks: list[Block]) -> None:
        parts = [self._text(block, at) for at, block in blocks]
        if any(parts):
            self.messages.append({"role": "system", "content": _content(parts)})

    def _assistant(self, blocks: list[Block]) -> None:
        thoughts, texts, calls = [], [], []
        self._open, self._answered = set(), set()
        for at, block in blocks:
            kind = block.get("type")
            if kind == "text":
                texts.append(self._text(block, at))
            elif kind == "thinking":
                thoughts.append(_string(block, "thinking", at))
            elif kind == "tool_use":
                calls.append(self._call(block, at))
            elif kind in _HOSTED or str(kind).endswith("_tool_result"):
                self._notes.ignore(at, kind)
            elif kind != "redacted_thinking":
                _unknown(block, at)
        message: Message = {"role": "assistant", "content": "".join(texts)}
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)

    def _call(self, block: dict[str, Any], at: str) -> dict[str, Any]:
        call_id, name = _string(block, "id", at), _string(block, "name", at)
        if not call_id or call_id in self._open:
            refuse(f"{at}.id", "`tool_use` ids must be unique and not empty")
        if not isinstance(block.get("input"), dict):
            refuse(f"{at}.input", "must be an object")
        self._open.add(call_id)
        arguments = encode_json(block["input"]).decode()
        about = {"name": name, "arguments": arguments}
        return {"id": call_id, "type": "function", "function": about}

    def _user(self, blocks: list[Block], at: str) -> None:
        parts, num_before = [], len(self.messages)
        for where, block in blocks:
            if block.get("type") == "tool_result":
                self._result(block, where)
            else:
                parts.append(self._shown(block, where))
        if any(parts):
            self.messages.append({"role": "user", "content": _content(parts)})
        if len(self.messages) == num_before:
            refuse(at, "user messages must have non-empty content")

    def _result(self, block: dict[str, Any], at: str) -> None:
        call_id = _string(block, "tool_use_id", at)
        if call_id in self._answered:
            refuse(at, f"each tool_use must have a single result, {call_id[:100]!r} has two")
        if call_id not in self._open:
            refuse(
                at,
                "each `tool_result` block must have a corresponding `tool_use` block in the"
                f" previous message, there is none with the id {call_id[:100]!r}",
            )
        self._open.remove(call_id)
        self._answered.add(call_id)
        parts = []
        for where, inner in _blocks(block.get("content") or "", f"{at}.content"):
            self._notes.keep(inner.get("cache_control"), where)
            parts.append(self._shown(inner, where, of_a_tool=True))
        if block.get("is_error") is True and "error" not in "".join(parts)[:_SAYS_SO].lower():
            parts.insert(0, "Error:")
        message = {"role": "tool", "tool_call_id": call_id, "content": _content(parts)}
        self.messages.append(message)

    def _shown(self, block: dict[str, Any], at: str, *, of_a_tool: bool = False) -> str:
        """A block as text."""
        kind = block.get("type")
        if kind == "text":
            return self._text(block, at)
        if kind == "document":
            return self._document(block, at)
        if kind == "search_result":
            inner = _blocks(block.get("content") or "", f"{at}.content")
            head = [_string(block, "title", at), _string(block, "source", at)]
            return "\n".join([*head, *(self._text(one, where) for where, one in inner)])
        if kind == "tool_reference" and of_a_tool:
            return self._tools.load(_string(block, "tool_name", at))
        if kind == "image" and of_a_tool:
            # What a tool returned stays in the history: refusing it would end the session.
            self._notes.ignore(at, kind)
            return "[An image, which this model cannot see.]"
        if kind == "image":
            refuse(at, "this model reads text only, images are not supported")
        return _unknown(block, at)

    def _document(self, block: dict[str, Any], at: str) -> str:
        """Plain text as it is; other media are refused."""
        source = block.get("source")
        kind = source.get("type") if isinstance(source, dict) else None
        if not isinstance(source, dict) or kind not in ("text", "content"):
            refuse(f"{at}.source", "this model reads text only: type text or content")
        if kind == "text":
            text = _string(source, "data", f"{at}.source")
        else:
            inner = _blocks(source.get("content") or "", f"{at}.source.content")
            text = "\n".join(self._text(one, where) for where, one in inner)
        head = [block[key] for key in ("title", "context") if isinstance(block.get(key), str)]
        return "\n".join([*head, text])

    def _text(self, block: dict[str, Any], at: str) -> str:
        """A text block, where nothing else may stand."""
        if block.get("type") != "text":
            _unknown(block, at)
        self._notes.keep(block.get("cache_control"), at)
        return _string(block, "text", at)


def _turns(messages: list[Any]) -> Iterator[tuple[str, str, list[Block]]]:
    """Role, place and blocks of each turn: neighbours of a role in one, but for the system's."""
    last: tuple[str, str, list[Block]] | None = None
    for i, message in enumerate(messages):
        at = f"messages.{i}"
        if not isinstance(message, dict):
            refuse(at, "must be an object")
        role = message.get("role")
        if role not in _ROLES:
            refuse(f"{at}.role", f"must be one of {', '.join(_ROLES)}")
        blocks = list(_blocks(message.get("content"), f"{at}.content"))
        if not blocks and role != "assistant":  # a model may have had nothing to say
            refuse(at, f"{role} messages must have non-empty content")
        if last is not None and last[0] == role != "system":
            last[2].extend(blocks)
            continue
        if last is not None:
            yield last
        last = (role, at, blocks)
    if last is not None:
        yield last


def _blocks(content: Any, at: str) -> Iterator[Block]:
    """Content as blocks: a text is one, if it is not empty."""
    if isinstance(content, str):
        if content:
            yield at, {"type": "text", "text": content}
        return
    if not isinstance(content, list):
        refuse(at, "must be a string or a list of blocks")
    for i, block in enumerate(content):
        where = f"{at}.{i}"
        if not isinstance(block, dict):
            refuse(where, "must be an object")
        yield where, block


def _content(parts: list[str]) -> str | list[dict[str, Any]]:
    """Text, or several of them; empty ones say nothing."""
    kept = [part for part in parts if part]
    if len(kept) > 1:
        return [{"type": "text", "text": part} for part in kept]
    return kept[0] if kept else ""


def _string(block: dict[str, Any], key: str, at: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        refuse(f"{at}.{key}", "must be a string")
    return value


def _unknown(block: dict[str, Any], at: str) -> str:
    refuse(f"{at}.type", f"{str(block.get('type'))[:100]!r} is not a block that can stand here")
