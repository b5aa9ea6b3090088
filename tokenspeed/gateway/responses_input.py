# SPDX-License-Identifier: MIT
"""Items of a Responses request as the messages of a conversation. Knows items, no events, no HTTP.

Reasoning, messages and calls of the assistant that follow one another are one message: they are
what the model said in one answer. Items of kinds that nobody here knows are left out and noted.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenspeed.errors import RequestError
from tokenspeed.gateway.responses_seal import unseal
from tokenspeed.gateway.responses_tools import by_own_name, found_tools, model_name, note
from tokenspeed.text.conversation import Tool

Item = dict[str, Any]
_ROLES = {"user": "user", "system": "system", "developer": "developer", "assistant": "assistant"}
_TEXTS = frozenset({"text", "input_text", "output_text", "summary_text", "reasoning_text"})
_RESULTS = frozenset(
    "function_call_output custom_tool_call_output local_shell_call_output shell_call_output".split()
)
_ACTIONS = {"local_shell_call": "local_shell", "shell_call": "shell"}


def input_items(given: str | list[Item] | None, find: Callable[[str], Item | None]) -> list[Item]:
    """The request's items, references replaced by what they refer to."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    made = []
    referred: set[str] = set()
    for i, item in enumerate(given or ()):
        if item.get("type") == "item_reference" or item.keys() == {"id"}:
            found = find(str(item.get("id")))
            if str(item.get("id")) in referred:
                why = f"input[{i}]: duplicate item {str(item.get('id'))[:80]!r}"
                raise RequestError(why, field=f"input[{i}].id")
            referred.add(str(item.get("id")))
            if found is None:
                why = f"input[{i}]: there is no item {str(item.get('id'))[:80]!r}"
                raise RequestError(why, field=f"input[{i}].id", code="item_not_found")
            item = found
        made.append(item)
    return made


class Messages:
    """Reads items one by one into `made`. Raises `RequestError` naming the item."""

    def __init__(
        self, tools: tuple[Tool, ...], ignored: list[str], loaded: tuple[Tool, ...] = ()
    ) -> None:
        self.made: list[dict[str, Any]] = []
        self._news = {tool.name for tool in loaded}  # tools that have not been defined yet
        self._tools, self._ignored = by_own_name((*tools, *loaded)), ignored
        self._answer: dict[str, Any] | None = None  # the assistant's message that is being built
        self._said: dict[str, list[str]] = {}  # its texts in pieces: one may come in very many
        self._call_ids: set[str] = set()

    def read(self, items: Sequence[Item]) -> None:
        """Adds the items in order."""
        for i, item in enumerate(items):
            self._read(item, f"input[{i}]")
        self._end_answer()

    def _read(self, item: Item, at: str) -> None:
        kind = item.get("type", "message" if "role" in item else None)
        match kind:
            case "message":
                self._message(item, at)
            case "reasoning":
                self._add("reasoning_content", reasoning_text(item) or "")
            case "function_call":
                self._call(item, self._name(item, at), _string(item, "arguments", at), at)
            case "custom_tool_call":
                text = {"input": _string(item, "input", at)}
                self._call(item, self._name(item, at), json.dumps(text, ensure_ascii=False), at)
            case "local_shell_call" | "shell_call":
                self._call(item, _ACTIONS[kind], _action(item.get("action")), at)
            case "tool_search_call" if item.get("execution") == "client":
                arguments = json.dumps(item.get("arguments"), ensure_ascii=False)
                self._call(item, "tool_search", arguments, at)
            case "tool_search_output" if item.get("execution") == "client":
                self._result({**item, "output": self._loaded(item.get("tools"))}, at)
            case "additional_tools":
                pass  # they are among the tools
            case str() if kind in _RESULTS:
                self._result(item, at)
            case _:
                note(self._ignored, f"input.{str(kind)[:40]}")

    def _message(self, item: Item, at: str) -> None:
        role = _ROLES.get(str(item.get("role")))
        if role is None:
            why = f"{at}.role: unknown role {str(item.get('role'))[:40]!r}"
            raise RequestError(why, field=f"{at}.role")
        text = content_text(item.get("content"), f"{at}.content")
        if role == "assistant":
            self._add("content", text)
        else:
            self._end_answer()
            self._answer = None
            self.made.append({"role": role, "content": text})

    def _add(self, key: str, text: str) -> None:
        """To what the assistant says in this place."""
        if text:
            self._assistant()
            self._said.setdefault(key, []).append(text)

    def _end_answer(self) -> None:
        """Nothing of what the assistant said so far is in pieces any more."""
        for key, pieces in self._said.items():
            answer = self._assistant()
            answer[key] = (answer.get(key) or "") + "".join(pieces)
        self._said = {}

    def _assistant(self) -> dict[str, Any]:
        if self._answer is None:
            self._answer = {"role": "assistant", "content": None}
            self.made.append(self._answer)
        return self._answer

    def _call(self, item: Item, name: str, arguments: str, at: str) -> None:
        call_id = item.get("call_id") or item.get("id")
        if not isinstance(call_id, str):
            raise RequestError(f"{at}.call_id: must be a string", field=f"{at}.call_id")
        self._call_ids.add(call_id)
        about = {"name": name, "arguments": arguments}
        calls = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": about})

    def _name(self, item: Item, at: str) -> str:
        space = item.get("namespace")
        own = _string(item, "name", at)
        return model_name(own, space if isinstance(space, str) else None, self._tools)

    def _result(self, item: Item, at: str) -> None:
        call_id = item.get("call_id") or item.get("id")
        if not isinstance(call_id, str) or call_id not in self._call_ids:
            why = f"No tool call found for function call output with call_id {str(call_id)[:80]}."
            raise RequestError(f"{at}: {why}", field=at)
        self._end_answer()
        self._answer = None
        text = content_text(item.get("output"), f"{at}.output", images=True)
        self.made.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _loaded(self, given: Any) -> str:
        """What a search of tools tells the model: definitions, each where it comes first."""
        lines = []
        for tool in found_tools(given, self._tools):
            what = tool.name
            if what in self._news:
                self._news.remove(what)
                what = json.dumps(tool.definition(), ensure_ascii=False, sort_keys=True)
            lines.append(f"Tool loaded: {what}")
        return "\n".join(lines) or "No tools found."


def content_text(content: Any, at: str, *, images: bool = False) -> str:
    """The text of a message or of a tool's output: a string, or parts of text, a line for each.

    With `images` a part that is no text is named in its place: a tool showed it, and the
    conversation must go on. Elsewhere it is refused.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError(f"{at}: must be text or a list of parts", field=at)
    return "\n".join(_part(part, f"{at}[{i}]", images) for i, part in enumerate(content))


def _part(part: Any, at: str, images: bool) -> str:
    kind = "none"
    if isinstance(part, dict):
        kind = str(part.get("type", "text" if "text" in part else "part"))
    if kind == "refusal":
        return _string(part, "refusal", at)
    if kind in _TEXTS:
        return _string(part, "text", at)
    if images and isinstance(part, dict):
        if isinstance(part.get("stdout"), str) or isinstance(part.get("stderr"), str):
            return f"{part.get('stdout') or ''}{part.get('stderr') or ''}"  # of a shell call
        return f"[{kind[:40]} left out: this model reads text only]"
    why = f"{at}: this model reads text only, not {kind[:40]!r}"
    raise RequestError(why, field=at, code="unsupported_content")


def reasoning_text(item: Item) -> str | None:
    """What was thought: the content, or what is sealed in the item, or its summary."""
    content = item.get("content")
    if isinstance(content, list) and content:
        return _plain(content)
    sealed = item.get("encrypted_content")
    if isinstance(sealed, str) and (text := unseal(sealed)) is not None:
        return text
    summary = item.get("summary")
    return _plain(summary) if isinstance(summary, list) and summary else None


def _action(given: Any) -> str:
    """The arguments of a shell's call, as the model wrote them."""
    about = given if isinstance(given, dict) else {}
    kept = {k: v for k, v in about.items() if k not in ("type", "env") and v is not None}
    return json.dumps(kept, ensure_ascii=False)


def _plain(parts: list[Any]) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _string(item: Item, name: str, at: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{at}.{name}: must be a string", field=f"{at}.{name}")
    return value
