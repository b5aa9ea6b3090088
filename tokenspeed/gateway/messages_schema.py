# SPDX-License-Identifier: MIT
"""The requests of Anthropic's dialect and what its plain fields mean. Knows no blocks, no answers.

A field that nobody knows is ignored. Messages name a field as Anthropic does: messages.0.content.1.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn

import msgspec

from tokenspeed.errors import RequestError
from tokenspeed.gateway.identity import seconds_of
from tokenspeed.text.conversation import OutputFormat
from tokenspeed.text.detokenizer import MAX_STOP_CHARS, MAX_STOPS

_COUNT = msgspec.Meta(ge=0, le=2**31 - 1)
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_THINKS = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}
_HOSTED = ("mcp_servers", "container", "fallbacks")
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_IGNORED = 20


class MessagesRequest(msgspec.Struct, kw_only=True):
    """POST /v1/messages, and /v1/messages/count_tokens, which needs no `max_tokens`."""

    model: str
    messages: list[Any]
    max_tokens: Annotated[int, _COUNT] | None = None
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None  # of a beta; now within output_config
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, _COUNT] | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
    cache_control: dict[str, Any] | None = None
    cache_receipt: bool | None = None
    service_tier: str | None = None
    # Not Anthropic's, but served as they are in /v1/chat/completions:
    priority: int | None = None
    forced_output_ids: list[int] | None = None
    # Of Anthropic's own hosts. Ignored, and the answer's headers say so:
    mcp_servers: list[Any] | None = None
    container: Any = None
    context_management: dict[str, Any] | None = None
    fallbacks: Any = None


@dataclass
class Notes:
    """What was found on the way through a request: how long to keep it, and what was left out."""

    retention_s: float = 0.0
    ignored: list[str] = field(default_factory=list)

    def ignore(self, at: str, what: object = "") -> None:
        """`what` is a client's word and is shown only if it is plain."""
        known = _WORD.fullmatch(what) if isinstance(what, str) else None
        self.ignored.append(f"{at} {what}" if known else at)

    def keep(self, given: Any, at: str) -> None:
        """Reads a `cache_control`; the longest of a request counts."""
        if given is None:
            return
        ttl = given.get("ttl") if isinstance(given, dict) else None
        seconds = seconds_of("5m" if ttl is None else str(ttl))
        if not isinstance(given, dict) or given.get("type") != "ephemeral" or seconds is None:
            refuse(
                f"{at}.cache_control".lstrip("."),
                "must be of type ephemeral, with a ttl such as 5m or 1h",
            )
        self.retention_s = max(self.retention_s, float(seconds))

    def header(self) -> dict[str, str]:
        """The header that tells what was ignored, if anything was."""
        shown = self.ignored[:MAX_IGNORED]
        if len(self.ignored) > MAX_IGNORED:
            shown.append(f"{len(self.ignored) - MAX_IGNORED} more")
        return {"x-tokenspeed-ignored": ", ".join(shown)} if shown else {}


def refuse(at: str, why: str) -> NoReturn:
    """Raises the 400 that names a field."""
    raise RequestError(f"{at}: {why}", field=at)


def note_hosted(request: MessagesRequest, notes: Notes) -> None:
    """Fields that ask for what only Anthropic's own hosts have."""
    for name in _HOSTED:
        if getattr(request, name):
            notes.ignore(name)
    edits = (request.context_management or {}).get("edits", [])
    if not isinstance(edits, list) or not all(map(_keeps_all, edits)):
        notes.ignore("context_management")


def _keeps_all(edit: Any) -> bool:
    """Whether an edit of the history leaves it as it is, which is what happens here."""
    return isinstance(edit, dict) and edit.get("keep") == "all"


def template_options(request: MessagesRequest, notes: Notes) -> dict[str, Any]:
    """What `thinking` and `output_config.effort` mean to chat templates, under all of its names.

    Words to come are ignored: they are about how well, not about what.
    """
    options: dict[str, Any] = {}
    if request.thinking is not None:
        kind = str(request.thinking.get("type"))
        if kind in _THINKS:
            options = dict.fromkeys(("enable_thinking", "thinking"), _THINKS[kind])
        else:
            notes.ignore("thinking", kind)
    effort = (request.output_config or {}).get("effort")
    if str(effort) in _EFFORTS:
        options["reasoning_effort"] = _EFFORTS[str(effort)]
    elif effort is not None:
        notes.ignore("output_config.effort", effort)
    return options


def output_format(request: MessagesRequest) -> tuple[OutputFormat | None, str]:
    """Of `output_config.format`, or `output_format` as it was called first; and which of them."""
    at, given = "output_config.format", (request.output_config or {}).get("format")
    if given is None:
        at, given = "output_format", request.output_format
    if given is None:
        return None, at
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        refuse(f"{at}.type", "must be json_schema")
    if not isinstance(given.get("schema"), dict):
        refuse(f"{at}.schema", "must be an object")
    return OutputFormat("json_schema", given["schema"]), at


def stop_sequences(given: Sequence[str] | None) -> list[str] | None:
    """Checked here, so that a mistake is named as the client named it."""
    if given and (
        len(given) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARS for text in given)
    ):
        why = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters"
        refuse("stop_sequences", why)
    return list(given) if given else None
