# SPDX-License-Identifier: MIT
"""Anthropic's tools and tool choice as `Tool` and `ToolChoice`. Knows no messages.

A deferred tool is shown to the model once a `tool_reference` has named it, and where it did so:
what came before stays in the cache. Where Anthropic's own search should find it, which is not here,
or where no other tools are, it is shown from the start.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenspeed.gateway.messages_schema import Notes, refuse
from tokenspeed.gateway.openai_tools import MAX_TOOLS, tool_name
from tokenspeed.text.conversation import Tool, ToolChoice

_CHOICES = ("auto", "any", "tool", "none")


class Tools:
    """The tools of a request. `hosted` names those that only run elsewhere."""

    def __init__(self, given: list[Any] | None, notes: Notes) -> None:
        self._first: dict[str, Tool] = {}
        self._deferred: dict[str, Tool] = {}
        self._loaded: dict[str, Tool] = {}
        self.hosted: set[str] = set()
        search = False
        for i, entry in enumerate(given or ()):
            self._read(entry, f"tools.{i}", notes)
            search |= str(entry.get("type")).startswith("tool_search_tool")
        if search or not self._first:
            self._first |= self._deferred
            self._deferred = {}
        if len(self._first) + len(self._deferred) > MAX_TOOLS:
            refuse("tools", f"at most {MAX_TOOLS}")

    @property
    def shown(self) -> tuple[Tool, ...]:
        """Those that the model knows from the start."""
        return tuple(self._first.values())

    @property
    def loaded(self) -> tuple[Tool, ...]:
        """Those that it came to know in the history."""
        return tuple(self._loaded.values())

    def load(self, name: str) -> str:
        """What a `tool_reference` says to the model. Tools that are gone are said to be loaded,
        too: they were."""
        tool = self._deferred.get(name)
        if tool is None or name in self._loaded:
            return f"Tool loaded: {name}"
        self._loaded[name] = tool
        return f"Tool loaded: {json.dumps(tool.definition(), ensure_ascii=False, sort_keys=True)}"

    def _read(self, entry: Any, at: str, notes: Notes) -> None:
        if not isinstance(entry, dict):
            refuse(at, "must be an object")
        notes.keep(entry.get("cache_control"), at)
        kind = entry.get("type") or "custom"
        if kind != "custom" and "input_schema" not in entry:
            notes.ignore(at, kind)
            self.hosted.add(str(entry.get("name")))
            return
        name = tool_name(entry, at)
        if name in self._first or name in self._deferred:
            refuse(at, f"tool names must be unique, {name[:100]!r} is not")
        about, schema = entry.get("description"), entry.get("input_schema")
        if not isinstance(schema, dict):
            refuse(f"{at}.input_schema", "must be an object")
        if about is not None and not isinstance(about, str):
            refuse(f"{at}.description", "must be a string")
        group = self._deferred if entry.get("defer_loading") is True else self._first
        group[name] = Tool(name, about, schema, strict=entry.get("strict") is True)


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
