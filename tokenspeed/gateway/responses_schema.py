# SPDX-License-Identifier: MIT
"""The request of OpenAI's Responses dialect. Knows its fields, reads no items and serves nothing.

A field that nobody knows is ignored. One that would change the answer and is not served is refused
by name, unless agents send it as a matter of course: then it is named in `x-tokenspeed-ignored`.
"""

from typing import Annotated, Any

import msgspec

from tokenspeed.engine.messages import Retention
from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.gateway.openai_schema import Refused, Sampling, check_served, sampling_params
from tokenspeed.text.conversation import OutputFormat
from tokenspeed.text.tokenizer import Tokenizer

_ITEM = {"type": "object", "required": ["role", "content"]}
Input = Annotated[
    str | list[dict[str, Any]],
    msgspec.Meta(
        extra_json_schema={
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        **_ITEM,
                        "properties": {"role": {"enum": ["user"]}, "content": {"type": "string"}},
                    },
                },
            ]
        }
    ),
]
_HOUR = 3600.0
_RETENTIONS = {"in_memory": 0.0, "in-memory": 0.0, "24h": 24 * _HOUR}
_LIFETIMES = {"30m": _HOUR / 2, "12h": 12 * _HOUR}
_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}  # templates know three
_MAX_METADATA = 16
_MAX_TOKENS = 2**31 - 1
ENCRYPTED = "reasoning.encrypted_content"


class ReasoningOptions(msgspec.Struct):
    """How much the model may think. No summaries are made: the reasoning itself is given."""

    effort: str | None = None
    summary: str | None = None


class TextOptions(msgspec.Struct):
    """What the text must look like."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class CacheOptions(msgspec.Struct):
    """How long the prompt's cache entry must at least live: 30m or 12h."""

    ttl: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses."""

    input: Input | None = None
    model: str | None = None
    instructions: str | list[dict[str, Any]] | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: CacheOptions | None = None
    include: list[str] | None = None
    service_tier: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    max_tool_calls: int | None = None
    # Not OpenAI's, but served as they are in /v1/chat/completions:
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_receipt: bool | None = None
    priority: int | None = None
    forced_output_ids: list[int] | None = None
    # Refused while they are not served:
    conversation: Refused = None
    prompt: Refused = None

    @property
    def kept(self) -> bool:
        """Whether the response can be asked for later."""
        return self.store is not False

    @property
    def seals_reasoning(self) -> bool:
        return ENCRYPTED in (self.include or ())

    def check(self) -> None:
        """Raises `RequestError` for the first field that is out of range or not served."""
        if self.input is None and self.previous_response_id is None:
            raise RequestError("input: is missing", field="input")
        for name in ("conversation", "prompt"):
            if getattr(self, name) is not None:
                raise _unsupported(name)
        if self.top_logprobs or "message.output_text.logprobs" in (self.include or ()):
            raise _unsupported("top_logprobs" if self.top_logprobs else "include")
        if self.truncation not in (None, "auto", "disabled"):
            raise RequestError("truncation: must be auto or disabled", field="truncation")
        if self.background and self.store is False:
            raise RequestError("background: needs store: true", field="background")
        _check_metadata(self.metadata)

    def template_options(self) -> dict[str, Any]:
        """What the chat template is told beside messages and tools."""
        options = dict(self.chat_template_kwargs or {})
        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort == "none":
            options |= {"enable_thinking": False, "thinking": False}
        if effort is not None:
            options["reasoning_effort"] = _EFFORTS.get(effort, effort)
        return options

    def retention(self) -> Retention:
        """How long the client wants its prompt kept. Raises `RequestError` for another word."""
        asked, ttl = self.prompt_cache_retention, None
        if self.prompt_cache_options is not None:
            ttl = self.prompt_cache_options.ttl
        if asked is not None and asked not in _RETENTIONS:
            why = f"prompt_cache_retention: must be one of {', '.join(_RETENTIONS)}"
            raise RequestError(why, field="prompt_cache_retention")
        if ttl is not None and ttl not in _LIFETIMES:
            why = f"prompt_cache_options.ttl: must be one of {', '.join(_LIFETIMES)}"
            raise RequestError(why, field="prompt_cache_options.ttl")
        seconds = max(_RETENTIONS.get(asked or "", 0.0), _LIFETIMES.get(ttl or "", 0.0))
        return Retention(seconds)

    def output_format(self) -> OutputFormat | None:
        """Of `text.format`; None for plain text."""
        given = self.text.format if self.text is not None else None
        kind = "text" if given is None else given.get("type")
        if given is None or kind == "text":
            return None
        if kind == "json_object":
            return OutputFormat("json_object")
        schema = given.get("schema")
        if kind != "json_schema" or not isinstance(schema, dict):
            why = "text.format: must be text, json_object, or json_schema with a schema"
            raise RequestError(why, field="text.format")
        return OutputFormat("json_schema", schema)

    def params(self, tokenizer: Tokenizer | None, vocab_size: int) -> SamplingParams:
        """Checked parameters, with this dialect's names in the errors."""
        most = self.max_output_tokens
        if most is not None and not 1 <= most <= _MAX_TOKENS:
            why = f"max_output_tokens: must be in [1, {_MAX_TOKENS}]"
            raise RequestError(why, field="max_output_tokens")
        sampling = Sampling(**{name: getattr(self, name) for name in _SAMPLING})
        check_served(sampling)
        return sampling_params(
            sampling,
            max_tokens=most,
            logprobs=None,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
        )


_SAMPLING = (
    "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed stop"
    " ignore_eos cache_salt forced_output_ids"
).split()


def _unsupported(name: str) -> RequestError:
    why = f"{name}: this value is not supported"
    return RequestError(why, field=name, code="unsupported_parameter")


def _check_metadata(given: dict[str, str] | None) -> None:
    if given is None:
        return
    long = any(len(key) > 64 or len(value) > 512 for key, value in given.items())
    if len(given) > _MAX_METADATA or long:
        why = f"metadata: at most {_MAX_METADATA} pairs of 64 and 512 characters"
        raise RequestError(why, field="metadata")
