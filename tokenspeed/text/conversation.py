# SPDX-License-Identifier: MIT
"""What every dialect makes of a client's request: messages, tools and what may come out.

Plain data in the terms of chat templates. Knows no dialect, no ids and no HTTP.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["auto", "none", "required"]
FormatKind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as the model sees it. A custom tool's one argument is the text `input`.

    `name` is unique in a request. `namespace` and `own_name` say what the client called it if it
    stood in a namespace; the answer must name it so.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False
    custom: bool = False
    grammar: tuple[Literal["lark", "regex"], str] | None = None  # of a custom tool's input
    namespace: str | None = None
    own_name: str | None = None

    def definition(self) -> dict[str, Any]:
        """As chat templates take it."""
        about: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            about["description"] = self.description
        return {"type": "function", "function": about | {"parameters": self.parameters}}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools may, must or must not be called; `name` is the only one that may be."""

    mode: Mode = "auto"
    name: str | None = None
    parallel: bool = True  # several calls in one answer


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What the answer's content must look like.

    `value`: a schema for json_schema, a list of texts for choice, xgrammar's structural tag as
    JSON text for structural_tag, else text; None for json_object.
    """

    kind: FormatKind
    value: Any = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in OpenAI's chat form, before `chat_template.normalize`.

    An assistant's message may have `reasoning_content`, `content` and `tool_calls`; arguments are
    JSON text. A tool's message has `tool_call_id`. System messages stand where the client put them.
    `loaded` are tools whose definitions stand in messages, so that what came before stays cached.
    """

    messages: list[dict[str, Any]]
    tools: tuple[Tool, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)  # for the template
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    loaded: tuple[Tool, ...] = ()
    continue_final: bool = False  # the answer goes on with the last message, the assistant's

    @property
    def callable(self) -> tuple[Tool, ...]:
        """All that the model may call."""
        return self.tools + self.loaded

    def tool(self, name: str) -> Tool | None:
        """The tool that the model calls so."""
        return next((tool for tool in self.callable if tool.name == name), None)
