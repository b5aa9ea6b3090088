# SPDX-License-Identifier: MIT
"""`ChatTemplate`: messages to prompt text, by the model's own Jinja template. Knows no ids.

The environment is the one of `transformers` (immutable sandbox, `tojson`, `raise_exception`,
`strftime_now`, loop controls, the `generation` tag). A template is data from a model folder and is
not trusted: output size is bounded here, time by `text/template_worker.py`, which renders in a
process that can be killed. Client-supplied templates are refused.
"""

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenspeed.errors import ModelLoadError, RequestError
from tokenspeed.text.template_sources import folder_sources, given_source

MAX_OUTPUT_CHARS = 32 << 20
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; a prompt is not changed by it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _ConversationError(Exception):
    """The template called `raise_exception`: the conversation is at fault, not the server."""


def _raise_exception(message: object) -> None:
    raise _ConversationError(str(message)[:500])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As `transformers` does: plain JSON, without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


class ChatTemplate:
    """Renders in this process. `sources` maps names to templates; `tool_use` serves requests that
    bring tools, `default` the others."""

    def __init__(self, sources: dict[str, str], special_tokens: dict[str, str]) -> None:
        self.sources = sources
        self.special_tokens = special_tokens
        self._env = _environment()
        self._compiled: dict[str, jinja2.Template] = {}
        try:
            # Parsed only: compiling folds constants, which a hostile template can make endless.
            for text in sources.values():
                self._env.parse(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelLoadError(f"the chat template is malformed: {error}") from None

    @classmethod
    def from_folder(
        cls, path: str | Path, special_tokens: dict[str, str], given: str | None = None
    ) -> "ChatTemplate":
        """The template of a model folder, or the one `given` as a file name or as Jinja text.

        A folder without a template gives one that refuses every conversation.
        """
        if given is not None:
            return cls({"default": given_source(given)}, special_tokens)
        return cls(folder_sources(Path(path)), special_tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """Prompt text. Raises `RequestError` for a conversation the template cannot render."""
        source = self._choose(tools)
        names = self.special_tokens | extra  # a template's own options may rename no message
        names |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            template = self._compiled.get(source) or self._env.from_string(source)
            self._compiled[source] = template
            try:
                return _bounded(template.generate(names | {"messages": normalize(messages)}))
            except TypeError:
                # Some templates join a call's arguments as text where most want the object.
                plain = normalize(messages, parse_arguments=False)
                return _bounded(template.generate(names | {"messages": plain}))
        except RequestError:
            raise
        except _ConversationError as error:
            raise _refused(f"the chat template refused the conversation: {error}") from None
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:300]}"
            raise _refused(f"the chat template could not render the conversation: {why}") from None

    def _choose(self, tools: list[dict[str, Any]] | None) -> str:
        sources = self.sources
        found = (sources.get("tool_use") if tools else None) or sources.get("default")
        if found is None:
            raise _refused("this model has no chat template: use /v1/completions or give one")
        return found


def _refused(message: str) -> RequestError:
    return RequestError(message, field="messages", code="invalid_messages")


def _bounded(pieces: Iterator[str]) -> str:
    kept, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_OUTPUT_CHARS:
            raise _refused(f"the rendered prompt is longer than {MAX_OUTPUT_CHARS} characters")
        kept.append(piece)
    return "".join(kept)


def normalize(
    messages: list[dict[str, Any]], *, parse_arguments: bool = True
) -> list[dict[str, Any]]:
    """Messages as templates expect them. Raises `RequestError` naming the message.

    Text parts are joined by newlines into one string; the arguments of past tool calls become
    objects; reasoning is offered under both of its names.
    """
    return [_normalize(message, i, parse_arguments) for i, message in enumerate(messages)]


def _normalize(message: dict[str, Any], index: int, parse_arguments: bool) -> dict[str, Any]:
    where = f"messages[{index}]"
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError(f"{where}.role: unknown role {str(role)[:40]!r}", field=f"{where}.role")
    made = dict(message)
    made["content"] = _text(message.get("content"), where)
    if role == "assistant":
        thought = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(thought, str):
            made["reasoning"] = made["reasoning_content"] = thought
        if message.get("tool_calls"):
            made["tool_calls"] = _tool_calls(message["tool_calls"], where, parse_arguments)
            return made
        made.pop("tool_calls", None)
    made["content"] = made["content"] or ""
    return made


def _text(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}.content: must be text", field=f"{where}.content")
    texts = []
    for i, part in enumerate(content):
        at = f"{where}.content[{i}]"
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise RequestError(
                f"{at}: this model reads text only, not {str(kind)[:40]!r}",
                field=at,
                code="unsupported_content",
            )
        if kind == "refusal" and isinstance(part, dict):
            text = part.get("refusal")
        if not isinstance(text, str):
            raise RequestError(f"{at}.text: must be a string", field=f"{at}.text")
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str, parse_arguments: bool) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls: must be a list", field=f"{where}.tool_calls")
    made = []
    for i, call in enumerate(calls):
        at = f"{where}.tool_calls[{i}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{at}: needs a name and arguments", field=at)
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str) and parse_arguments:
            # A model may have written broken JSON; its own words are the truth about the past.
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        elif not isinstance(arguments, str) and not parse_arguments:
            arguments = json.dumps(arguments, ensure_ascii=False)
        made.append({**call, "function": {**function, "arguments": arguments}})
    return made
