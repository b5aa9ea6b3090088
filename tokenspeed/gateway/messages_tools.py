# SPDX-License-Identifier: MIT
"""Anthropic's tools and tool choice as `Tool` and `ToolChoice`. Knows no messages.

A deferred tool is shown to the model once a `tool_reference` in the history has named it; or at
once, if the client counts on Anthropic's own search to find it, which is not here.
"""

from collections.abc import Sequence
from typing import Any

from tokenspeed.gateway.messages_schema import Notes, refuse
from tokenspeed.gateway.openai_tools import MAX_TOOLS, tool_name
from tokenspeed.text.conversation import Tool, ToolChoice

_CHOICES = ("auto", "any", "tool", "none")


class Tools:
    """The tools of a request. `shown` are the model's; `hosted` names those that run elsewhere."""

    def __init__(self, given: list[Any] | None, notes: Notes) -> None:
        self._own: dict[str, Tool] = {}
        self._deferred: set[str] = set()
        self.hosted: set[str] = set()
        self._search = False
        for i, entry in enumerate(given or ()):
            self._read(entry, f"tools.{i}", notes)
        if len(self._own) > MAX_TOOLS:
            refuse("tools", f"at most {MAX_TOOLS}")

    def shown(self, referred: Sequence[str]) -> tuple[Tool, ...]:
        """Those loaded from the start, then the deferred ones in the order they were `referred`."""
        found = self._own if self._search else dict.fromkeys(referred)
        late = [name for name in found if name in self._deferred]
        first = [name for name in self._own if name not in self._deferred]
        return tuple(self._own[name] for name in (*first, *late))

    def _read(self, entry: Any, at: str, notes: Notes) -> None:
        if not isinstance(entry, dict):
            refuse(at, "must be an object")
        notes.keep(entry.get("cache_control"), at)
        kind = entry.get("type") or "custom"
        if kind != "custom" and "input_schema" not in entry:
            notes.ignore(at, kind)
            self.hosted.add(str(entry.get("name")))
            self._search |= str(kind).startswith("tool_search_tool")
            return
        name = tool_name(entry, at)
        if name in self._own:
            refuse(at, f"tool names must be unique, {name[:100]!r} is not")
        about, schema = entry.get("description"), entry.get("input_schema")
        if not isinstance(schema, dict):
            refuse(f"{at}.input_schema", "must be an object")
        if about is not None and not isinstance(about, str):
            refuse(f"{at}.description", "must be a string")
        self._own[name] = Tool(name, about, schema, strict=entry.get("strict") is True)
        if entry.get("defer_loading") is True:
            self._deferred.add(name)


def tool_choice(
    given: dict[str, Any] | None, tools: Sequence[Tool], hosted: set[str]
) -> ToolChoice:
    """Of `tool_choice`, for the tools that are shown. A hosted tool cannot be forced, only left."""
    if given is None:
        return ToolChoice()
    kind, name = given.get("type"), str(given.get("name"))
    several = given.get("disable_parallel_tool_use") is not True
    if kind not in _CHOICES:
        refuse("tool_choice.type", f"must be one of {', '.join(_CHOICES)}")
    if kind == "none":
        return ToolChoice("none", parallel=several)
    if kind == "auto" or (not tools and hosted) or (kind == "tool" and name in hosted):
        return ToolChoice(parallel=several)
    if not tools:
        refuse("tool_choice", "there are no tools to choose from")
    if kind == "any":
        return ToolChoice("required", parallel=several)
    if not any(tool.name == name for tool in tools):
        refuse("tool_choice.name", f"there is no tool {name[:100]!r}")
    return ToolChoice("required", name, parallel=False)
