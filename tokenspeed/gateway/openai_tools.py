# SPDX-License-Identifier: MIT
"""Tools as OpenAI's dialects send them, as `Tool` and `ToolChoice`. Knows their fields alone."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from tokenspeed.errors import RequestError
from tokenspeed.text.conversation import Tool, ToolChoice

MAX_TOOLS = 1024
_SYNTAXES: dict[str, Literal["lark", "regex"]] = {"lark": "lark", "regex": "regex"}
_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def chat_tools(given: list[dict[str, Any]] | None) -> tuple[Tool, ...]:
    """Of `tools` in /v1/chat/completions. `RequestError` names the tool that is malformed."""
    made = []
    for i, entry in enumerate(given or ()):
        at = f"tools[{i}]"
        kind = entry.get("type", "function")
        if kind not in ("function", "custom"):
            raise RequestError(f"{at}.type: unknown type {str(kind)[:40]!r}", field=f"{at}.type")
        about = entry.get(kind)
        if not isinstance(about, dict):
            raise RequestError(f"{at}.{kind}: must be an object", field=f"{at}.{kind}")
        read = function_tool if kind == "function" else custom_tool
        made.append(read(about, f"{at}.{kind}"))
    return unique(tuple(made))


def chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, with calls of custom tools as the functions that models know them as."""
    return [
        {**message, "tool_calls": [_as_function(call) for call in calls]}
        if isinstance(calls := message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _as_function(call: Any) -> Any:
    about = call.get("custom") if isinstance(call, dict) else None
    if not isinstance(about, dict) or not isinstance(about.get("input"), str):
        return call
    function = {"name": about.get("name"), "arguments": json.dumps({"input": about["input"]})}
    return {"id": call.get("id"), "type": "function", "function": function}


def unique(tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """The same. `RequestError` for two tools of one name, or too many."""
    seen: set[str] = set()
    for tool in tools:
        if tool.name in seen:
            raise RequestError(f"tools: two tools are called {tool.name!r}", field="tools")
        seen.add(tool.name)
    check_number(tools)
    return tools


def check_number(tools: Sequence[object]) -> None:
    """`RequestError` for too many."""
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: at most {MAX_TOOLS}", field="tools")


def function_tool(about: dict[str, Any], at: str) -> Tool:
    """A function: name, description, parameters (a JSON schema), strict."""
    parameters = about.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(f"{at}.parameters: must be an object", field=f"{at}.parameters")
    return Tool(
        tool_name(about, at),
        _description(about, at),
        {"type": "object", "properties": {}} if parameters is None else parameters,
        strict=about.get("strict") is True,
    )


def custom_tool(about: dict[str, Any], at: str) -> Tool:
    """A tool whose input is free text, or text of a grammar."""
    return Tool(
        tool_name(about, at),
        _description(about, at),
        _INPUT,
        custom=True,
        grammar=_grammar(about.get("format"), f"{at}.format"),
    )


def tool_name(about: dict[str, Any], at: str) -> str:
    """The name, which models must be able to write on one line."""
    name = about.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 256 or not name.isprintable():
        why = f"{at}.name: must be 1 to 256 printable characters"
        raise RequestError(why, field=f"{at}.name")
    return name


def _description(about: dict[str, Any], at: str) -> str | None:
    text = about.get("description")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"{at}.description: must be a string", field=f"{at}.description")
    return text


def _grammar(given: Any, at: str) -> tuple[Literal["lark", "regex"], str] | None:
    if given is None or (isinstance(given, dict) and given.get("type", "text") == "text"):
        return None
    if not isinstance(given, dict) or given.get("type") != "grammar":
        raise RequestError(f"{at}.type: must be text or grammar", field=f"{at}.type")
    about = given.get("grammar", given)  # /v1/responses has no level between
    syntax = _SYNTAXES.get(str(about.get("syntax"))) if isinstance(about, dict) else None
    definition = about.get("definition") if isinstance(about, dict) else None
    if syntax is None or not isinstance(definition, str):
        raise RequestError(f"{at}: needs syntax lark or regex, and a definition", field=at)
    return syntax, definition


def chat_tool_choice(
    given: str | dict[str, Any] | None, parallel: bool | None, tools: tuple[Tool, ...]
) -> ToolChoice:
    """Of `tool_choice` and `parallel_tool_calls`; /v1/responses names a function one level up."""
    several = parallel is not False
    if given is None or given == "auto":
        return ToolChoice(parallel=several)
    if given == "none":
        return ToolChoice("none", parallel=several)
    if not tools:
        raise RequestError("tool_choice: there are no tools", field="tool_choice")
    if given == "required":
        return ToolChoice("required", parallel=several)
    if isinstance(given, dict) and given.get("type") in ("function", "custom"):
        about = given.get(given["type"], given)
        name = about.get("name") if isinstance(about, dict) else None
        if any(tool.name == name for tool in tools):
            return ToolChoice("required", str(name), parallel=False)
        raise RequestError(f"tool_choice: no tool {str(name)[:100]!r}", field="tool_choice")
    raise RequestError(
        "tool_choice: must be auto, none, required, or name a function", field="tool_choice"
    )
