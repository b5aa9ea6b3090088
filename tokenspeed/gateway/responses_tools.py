# SPDX-License-Identifier: MIT
"""Tools of the Responses dialect as `Tool`s of unique names, and its `tool_choice`. Runs none.

A namespace's tools get names of their own (`mcp__demo` + `add` = `mcp__demo__add`); the answer
names them as the client did. Tools that only OpenAI's servers can run are left out and noted.
Those with items of their own that the client runs (`ClientTool`) are functions to the model.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenspeed.errors import RequestError
from tokenspeed.gateway.openai_tools import (
    chat_tool_choice,
    check_number,
    custom_tool,
    function_tool,
    unique,
)
from tokenspeed.text.conversation import Tool, ToolChoice

_READERS = {"function": function_tool, "custom": custom_tool}
_ODD = re.compile(r"[^A-Za-z0-9._-]")
_MAX_NOTES = 16
_TEXTS = {"type": "array", "items": {"type": "string"}}
_SHELL = {
    "type": "object",
    "properties": {
        "command": {**_TEXTS, "description": "The program and its arguments"},
        "working_directory": {"type": "string"},
        "timeout_ms": {"type": "integer"},
    },
    "required": ["command"],
}
Given = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ClientTool(Tool):
    """A tool that is called by an item of a type of its own."""

    item: str = ""

    def fields(self, arguments: str) -> Given:
        """The item's own fields, of the call's arguments as the model wrote them."""
        try:
            given = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            given = arguments
        if self.item == "tool_search_call":
            asked = given if isinstance(given, dict) else {"query": str(given)}
            return {"execution": "client", "arguments": asked}
        about = given if isinstance(given, dict) else {"command": given}
        command = about.get("command")
        if command is None:
            command = []
        elif not (isinstance(command, list) and all(isinstance(word, str) for word in command)):
            command = ["bash", "-lc", str(command)]
        rest = {name: about.get(name) for name in ("timeout_ms", "working_directory")}
        return {"action": {"type": "exec", "command": command, "env": {}, **rest}}


def read_tools(
    given: Sequence[Given] | None, ignored: list[str], items: Iterable[Given] = ()
) -> tuple[Tool, ...]:
    """The tools that the model sees; what it does not see goes to `ignored`, once each.

    Those that `items` bring as tools of the conversation come after those `given`.
    """
    made = [tool for i, entry in enumerate(given or ()) for tool in _read(entry, i, ignored)]
    plain = unique(tuple(tool for tool in made if tool.namespace is None))
    made += _new_tools(items, "additional_tools", made, ignored)
    return unique(tuple(_with_free_names(made, {tool.name for tool in plain})))


def loaded_tools(
    items: Iterable[Given], tools: tuple[Tool, ...], ignored: list[str]
) -> tuple[Tool, ...]:
    """What searches have found beside `tools`: the model knows it from their results."""
    found = _new_tools(items, "tool_search_output", tools, ignored)
    return unique((*tools, *_with_free_names(found, {tool.name for tool in tools})))[len(tools) :]


def _new_tools(
    items: Iterable[Given], kind: str, known: Iterable[Tool], ignored: list[str]
) -> list[Tool]:
    """The tools that items of a kind bring and that are not known yet."""
    made: list[Tool] = []
    keys = {(tool.namespace, tool.own_name or tool.name) for tool in known}
    for item in items:
        found = item.get("tools") if item.get("type") == kind else None
        entries = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        for tool in [tool for i, one in enumerate(entries) for tool in _read(one, i, ignored)]:
            if (key := (tool.namespace, tool.own_name or tool.name)) not in keys:
                keys.add(key)
                made.append(tool)
    return made


def _read(entry: Given, index: int, ignored: list[str]) -> list[Tool]:
    """The tools of one entry."""
    kind, at = str(entry.get("type")), f"tools[{index}]"
    if kind in _READERS:
        return [_READERS[kind](entry, at)]
    if kind == "namespace":
        return _of_namespace(entry, at, ignored)
    if kind == "local_shell":
        return [ClientTool(kind, "Runs a command.", _SHELL, item="local_shell_call")]
    if kind == "tool_search" and entry.get("execution") == "client":
        about = function_tool({**entry, "name": kind}, at)
        return [ClientTool(kind, about.description, about.parameters, item="tool_search_call")]
    note(ignored, f"tools.{kind[:40]}")
    return []


def _of_namespace(entry: Given, at: str, ignored: list[str]) -> list[Tool]:
    space, tools = entry.get("name"), entry.get("tools")
    if not isinstance(space, str) or not 0 < len(space) <= 256 or not space.isprintable():
        why = f"{at}.name: must be 1 to 256 printable characters"
        raise RequestError(why, field=f"{at}.name")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestError(f"{at}.tools: must be a list of tools", field=f"{at}.tools")
    made = []
    for j, about in enumerate(tools):
        kind = str(about.get("type", "function"))
        if kind not in _READERS:
            note(ignored, f"tools.{kind[:40]}")
            continue
        tool = _READERS[kind](about, f"{at}.tools[{j}]")
        flat = joined_name(space, tool.name)
        made.append(dataclasses.replace(tool, name=flat, namespace=space, own_name=tool.name))
    return made


def joined_name(space: str, name: str) -> str:
    """What the model calls a namespace's tool."""
    return f"{space}{name}" if space.endswith("__") else f"{space}__{name}"


def _with_free_names(tools: Iterable[Tool], taken: set[str]) -> list[Tool]:
    """Tools of namespaces whose joined name is taken get a number."""
    made = []
    numbers: dict[str, int] = {}  # where to go on: counting from 2 each time is quadratic
    for tool in tools:
        if tool.namespace is not None:
            name, n = tool.name, numbers.get(tool.name, 2)
            while name in taken:
                name, n = f"{tool.name}_{n}", n + 1
            numbers[tool.name] = n
            taken.add(name)
            tool = dataclasses.replace(tool, name=name)
        made.append(tool)
    return made


def by_own_name(tools: Iterable[Tool]) -> dict[tuple[str | None, str], Tool]:
    """Tools by what the client calls them: namespace and name; the first of a name."""
    made: dict[tuple[str | None, str], Tool] = {}
    for tool in tools:
        made.setdefault((tool.namespace, tool.own_name or tool.name), tool)
    return made


def model_name(name: str, space: str | None, tools: Mapping[tuple[str | None, str], Tool]) -> str:
    """What the model calls a tool that the client names so, be it offered still or not."""
    if space is None:
        return name
    tool = tools.get((space, name))
    return joined_name(space, name) if tool is None else tool.name


def found_tools(given: Any, tools: Mapping[tuple[str | None, str], Tool]) -> list[Tool]:
    """Those of `tools` that the result of a search lists, in the order of `tools`."""
    entries = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    keys: list[tuple[Any, Any]] = []
    for entry in entries:
        inner = entry.get("tools") if entry.get("type") == "namespace" else None
        if isinstance(inner, list):
            names = [one.get("name") for one in inner if isinstance(one, dict)]
            keys += [(entry.get("name"), name) for name in names]
        else:
            keys.append((None, entry.get("name")))
    texts = {key for key in keys if all(isinstance(one, str | None) for one in key)}
    if not texts & tools.keys():
        return []
    return [tool for key, tool in tools.items() if key in texts]


def shown_tools(given: list[Given] | None) -> list[Given]:
    """The tools that are served, as a response repeats them: every field that it must have."""
    made = []
    for entry in given or ():
        if entry.get("type") == "function":
            made.append(entry | {name: entry.get(name) for name in ("parameters", "strict")})
        elif entry.get("type") == "namespace":
            made.append({"description": "", **entry})
        elif _read(entry, 0, []):
            made.append(entry)
    return made


def read_tool_choice(
    given: str | Given | None, parallel: bool | None, tools: tuple[Tool, ...], ignored: list[str]
) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """The choice, and the tools that are left of `tools` if only some are allowed.

    A choice of what was left out is no choice: the model answers as it likes.
    """
    if isinstance(given, dict) and given.get("type") == "allowed_tools":
        tools = _allowed(given, tools)
        given = given.get("mode", "auto")
    hosted = isinstance(given, dict) and str(given.get("type")) not in _READERS
    if hosted or (given == "required" and not tools and ignored):
        note(ignored, "tool_choice")
        given = None
    if isinstance(given, dict):
        space = given.get("namespace")
        space = space if isinstance(space, str) else None
        name = model_name(str(given.get("name")), space, by_own_name(tools))
        given = {"type": given["type"], "name": name}
    return chat_tool_choice(given, parallel, tools), tools


def _allowed(given: Given, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    allowed = given.get("tools")
    if not isinstance(allowed, list) or not all(isinstance(one, dict) for one in allowed):
        raise RequestError("tool_choice.tools: must be a list of tools", field="tool_choice.tools")
    check_number(allowed)
    whole = [one.get("name") for one in allowed if one.get("type") == "namespace"]
    names = [(one.get("namespace"), one.get("name")) for one in allowed]
    return tuple(
        tool
        for tool in tools
        if (tool.namespace, tool.own_name or tool.name) in names
        or (tool.namespace is not None and tool.namespace in whole)
    )


def note(ignored: list[str], what: str) -> None:
    """Adds to the list of what was ignored, once; it goes into a header, so it is kept harmless."""
    plain = _ODD.sub("?", what)
    if plain not in ignored and len(ignored) < _MAX_NOTES:
        ignored.append(plain)
