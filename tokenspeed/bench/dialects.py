# SPDX-License-Identifier: MIT
"""The dialects as a client sees them: a request's body, what an event says, how usage counts.

Knows shapes of JSON. Knows no HTTP, no clock and no records.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request in no dialect yet. `forced_ids`: the answer's ids; needs a server that allows
    it. `token_counts`: every event shall say how many tokens there are so far. `cancel_after`:
    how many the client reads before it hangs up."""

    messages: tuple[Json, ...]
    max_tokens: int
    model: str
    user: str = ""
    session: str = ""
    parent: str | None = None  # the session that started this one
    ignore_eos: bool = True
    forced_ids: tuple[int, ...] | None = None
    token_counts: bool = True
    cancel_after: int | None = None


@dataclass(slots=True)
class Delta:
    """What one event says. `carries`: text, reasoning or a tool's arguments are in it.

    `num_tokens`: of the answer so far, where the event tells. `usage`: fields as they were sent.
    """

    text: str = ""
    carries: bool = False
    num_tokens: int | None = None
    usage: Json = field(default_factory=dict)
    ended: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; None where the endpoint does not tell. `prompt` is all of it."""

    prompt: int | None
    cached: int | None
    output: int | None


class Dialect(Protocol):
    """Where requests go, what they look like, and how answers are read."""

    path: str

    def body(self, ask: Ask) -> Json: ...
    def read(self, event: Json) -> Delta: ...
    def usage(self, given: Json) -> Usage: ...


class Chat:
    """OpenAI's chat completions, with what vLLM and llama-server add."""

    path = "/v1/chat/completions"

    def body(self, ask: Ask) -> Json:
        options = {"include_usage": True}
        if ask.token_counts:
            options["continuous_usage_stats"] = True
        return {
            "model": ask.model,
            "messages": list(ask.messages),
            "max_tokens": ask.max_tokens,
            "stream": True,
            "stream_options": options,
            **_further(ask),
            **({"user": ask.user} if ask.user else {}),
        }

    def read(self, event: Json) -> Delta:
        if event.get("error"):
            return Delta(error=_message(event["error"]))
        made = Delta(usage=event.get("usage") or {})
        if (timings := event.get("timings")) and "cache_n" in timings:
            made.usage = made.usage | {"cache_n": timings["cache_n"]}
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            calls = [call.get("function") or {} for call in delta.get("tool_calls") or ()]
            made.text = delta.get("content") or ""
            made.carries = bool(
                made.text
                or delta.get("reasoning_content")
                or delta.get("reasoning")
                or any(call.get("arguments") for call in calls)
            )
            made.ended = choice.get("finish_reason") is not None
            made.num_tokens = made.usage.get("completion_tokens")
        return made

    def usage(self, given: Json) -> Usage:
        details = given.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens", given.get("cache_n"))
        return Usage(given.get("prompt_tokens"), cached, given.get("completion_tokens"))


class Completions(Chat):
    """OpenAI's text completions: the messages' texts are the prompt, nobody said them."""

    path = "/v1/completions"

    def body(self, ask: Ask) -> Json:
        body = super().body(ask)
        body["prompt"] = "\n".join(one["content"] for one in body.pop("messages"))
        return body

    def read(self, event: Json) -> Delta:
        choices = event.get("choices") or ()
        shaped = [one | {"delta": {"content": one.get("text")}} for one in choices]
        return super().read(event | {"choices": shaped})


class Responses:
    """OpenAI's Responses."""

    path = "/v1/responses"
    _CARRY = frozenset(
        f"response.{what}.delta"
        for what in (
            "output_text",
            "refusal",
            "reasoning_text",
            "reasoning_summary_text",
            "function_call_arguments",
            "custom_tool_call_input",
        )
    )

    def body(self, ask: Ask) -> Json:
        return {
            "model": ask.model,
            "input": list(ask.messages),
            "max_output_tokens": ask.max_tokens,
            "stream": True,
            "store": False,
            **_further(ask),
            **({"user": ask.user} if ask.user else {}),
        }

    def read(self, event: Json) -> Delta:
        kind = event.get("type")
        if kind in self._CARRY:
            text = event.get("delta") or ""
            shown = text if kind == "response.output_text.delta" else ""
            return Delta(text=shown, carries=bool(text))
        if kind in ("response.completed", "response.incomplete"):
            return Delta(usage=event["response"].get("usage") or {}, ended=True)
        if kind == "response.failed":
            return Delta(error=_message(event["response"].get("error")))
        return Delta(error=_message(event)) if kind == "error" else Delta()

    def usage(self, given: Json) -> Usage:
        details = given.get("input_tokens_details") or {}
        return Usage(
            given.get("input_tokens"), details.get("cached_tokens"), given.get("output_tokens")
        )


class Messages:
    """Anthropic's Messages. There, `ignore_eos` has no name: an answer may end early."""

    path = "/v1/messages"
    _TEXTS = ("text", "thinking", "partial_json")

    def body(self, ask: Ask) -> Json:
        body = {
            "model": ask.model,
            "messages": list(ask.messages),
            "max_tokens": ask.max_tokens,
            "stream": True,
            **({"metadata": {"user_id": ask.user}} if ask.user else {}),
        }
        return body | _forced(ask)

    def read(self, event: Json) -> Delta:
        kind = event.get("type")
        if kind == "content_block_delta":
            delta = event["delta"]
            carries = any(delta.get(name) for name in self._TEXTS)
            return Delta(text=delta.get("text") or "", carries=carries)
        if kind == "message_start":
            return Delta(usage=event["message"].get("usage") or {})
        if kind == "message_delta":
            return Delta(usage=event.get("usage") or {})
        if kind == "error":
            return Delta(error=_message(event.get("error")))
        return Delta(ended=kind == "message_stop")

    def usage(self, given: Json) -> Usage:
        cached = given.get("cache_read_input_tokens")
        if (rest := given.get("input_tokens")) is None:
            return Usage(None, cached, given.get("output_tokens"))
        prompt = rest + (given.get("cache_creation_input_tokens") or 0) + (cached or 0)
        return Usage(prompt, cached, given.get("output_tokens"))


DIALECTS: dict[str, Dialect] = {
    "chat": Chat(),
    "responses": Responses(),
    "messages": Messages(),
    "completions": Completions(),
}


def dialect_of(name: str) -> Dialect:
    """Raises `ValueError` for a name that is none."""
    if name not in DIALECTS:
        raise ValueError(f"dialect: must be one of {', '.join(DIALECTS)}, got {name!r}")
    return DIALECTS[name]


def _further(ask: Ask) -> Json:
    return ({"ignore_eos": True} if ask.ignore_eos else {}) | _forced(ask)


def _forced(ask: Ask) -> Json:
    return {} if ask.forced_ids is None else {"forced_output_ids": list(ask.forced_ids)}


def _message(error: Any) -> str:
    """An error's words, whatever shape it has."""
    if isinstance(error, dict):
        return str(error.get("message") or error.get("code") or error)
    return str(error)
