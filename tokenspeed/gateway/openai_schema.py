# SPDX-License-Identifier: MIT
"""The requests of the OpenAI dialect, with vLLM's further fields. Knows fields, serves nothing.

Types are checked by msgspec, ranges by `SamplingParams`. A field that nobody knows is ignored; a
known one that would change the answer and is not served yet is refused by name, never dropped.
"""

import re
from typing import Annotated, Any

import msgspec

from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.gateway.identity import Hints
from tokenspeed.gateway.openai_structured import GUIDED, refuse_guided
from tokenspeed.text.detokenizer import check_stop
from tokenspeed.text.tokenizer import Tokenizer

# Only for the OpenAPI document: what can come in is wider and is checked where it is used.
Refused = Annotated[Any, msgspec.Meta(extra_json_schema={"type": "null"})]
Messages = Annotated[
    list[dict[str, Any]],
    msgspec.Meta(
        extra_json_schema={
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {
                    "role": {"enum": ["system", "user", "assistant"]},
                    "content": {"type": "string"},
                },
            },
        }
    ),
]

_SALT = re.compile(r"[A-Za-z0-9._:=+/-]{1,256}")
_TOKEN_ID = re.compile(r"-?[0-9]{1,19}")
_MASK = 2**64 - 1


class StreamOptions(msgspec.Struct):
    """When a stream says how many tokens there were: at its end, or in every event."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(msgspec.Struct, kw_only=True):
    """The fields that both endpoints share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    seed: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    user: Any = None
    safety_identifier: Any = None
    metadata: Any = None
    prompt_cache_key: Any = None
    priority: int | None = None
    service_tier: str | None = None
    forced_output_ids: list[int] | None = None
    # Refused while they are not served:
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    logits_processors: Refused = None
    guided_json: Refused = None
    guided_regex: Refused = None
    guided_choice: Refused = None
    guided_grammar: Refused = None
    prompt_embeds: Refused = None
    truncate_prompt_tokens: int | None = None
    spaces_between_special_tokens: bool | None = None
    repetition_detection: Refused = None
    kv_transfer_params: Refused = None
    vllm_xargs: Refused = None

    def hints(self) -> Hints:
        """What the body says of who sends it."""
        return Hints(
            user=self.user,
            safety_identifier=self.safety_identifier,
            metadata=self.metadata,
            prompt_cache_key=self.prompt_cache_key,
            priority=self.priority,
            service_tier=self.service_tier,
        )

    def refusals(self) -> dict[str, bool]:
        """Which fields ask for something that is not served."""
        names = (
            "use_beam_search",
            "logits_processors",
            "prompt_embeds",
            "repetition_detection",
            "kv_transfer_params",
            "vllm_xargs",
        )
        return {name: bool(getattr(self, name)) for name in names} | {
            "best_of": self.best_of not in (None, self.n or 1),
            "length_penalty": self.length_penalty not in (None, 1.0),
            "truncate_prompt_tokens": self.truncate_prompt_tokens is not None,
            "spaces_between_special_tokens": self.spaces_between_special_tokens is False,
        }


class ChatRequest(Sampling, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    # Refused while they are not served:
    continue_final_message: bool | None = None
    cache_receipt: bool | None = None
    chat_template: str | None = None
    echo: bool | None = None
    functions: Refused = None
    function_call: Refused = None
    thinking_token_budget: int | None = None
    modalities: list[str] | None = None
    audio: Refused = None
    web_search_options: Refused = None

    def refusals(self) -> dict[str, bool]:
        names = (
            "continue_final_message",
            "chat_template",
            "echo",
            "functions",
            "function_call",
            "audio",
            "web_search_options",
        )
        return Sampling.refusals(self) | {
            **{name: bool(getattr(self, name)) for name in names},
            "thinking_token_budget": self.thinking_token_budget is not None,
            "modalities": self.modalities not in (None, [], ["text"]),
        }

    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs: true", field="top_logprobs")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise RequestError("top_logprobs: must not be negative", field="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def check_served(request: Sampling) -> None:
    """Raises 400 for the first field that asks for what is not served, and for a malformed salt."""
    for name in GUIDED:
        if getattr(request, name):
            raise refuse_guided(name)
    for name, refused in request.refusals().items():
        if refused:
            raise RequestError(
                f"{name}: this value is not supported", field=name, code="unsupported_parameter"
            )
    if request.cache_salt is not None and not _SALT.fullmatch(request.cache_salt):
        raise RequestError(
            "cache_salt: 1 to 256 characters out of A-Z a-z 0-9 . _ : = + / -", field="cache_salt"
        )


_SAME_NAME = (
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "allowed_token_ids",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "seed",
    "prompt_logprobs",
    "forced_output_ids",
)


def sampling_params(
    request: Sampling,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> SamplingParams:
    """Checked parameters. Raises `RequestError` naming the field; null means the default."""
    given = {name: getattr(request, name) for name in _SAME_NAME}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in (*given.items(), ("max_tokens", max_tokens), ("logprobs", logprobs)):
        if isinstance(value, int) and abs(value) > _MASK:
            raise RequestError(f"{name}: the number is too large", field=name)
    if request.logit_bias is not None:
        given["logit_bias"] = _logit_bias(request.logit_bias)
    if request.stop:
        given["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
        check_stop(given["stop"])
    if request.bad_words:
        given["bad_words_token_ids"] = _bad_words(request.bad_words, tokenizer)
    if tokenizer is None and "stop" in given:
        raise RequestError("stop: this server has no tokenizer", field="stop")
    params = SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)
    check_token_ids(params, vocab_size)
    return params


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raises `RequestError` naming the first field that has an id which the model does not know."""
    for name, ids in params.token_ids().items():
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            raise RequestError(
                f"{name}: token ids must be in [0, {vocab_size})",
                field=name,
                code="invalid_token_id",
            )


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    if not all(map(_TOKEN_ID.fullmatch, given)):
        raise RequestError("logit_bias: keys must be token ids", field="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _bad_words(words: list[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Each word as it stands at the start of a text and as it follows a space."""
    if tokenizer is None:
        raise RequestError("bad_words: this server has no tokenizer", field="bad_words")
    if len(words) > 512 or any(not 0 < len(word) <= 256 for word in words):
        raise RequestError("bad_words: at most 512 words of 1 to 256 characters", field="bad_words")
    sequences = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids:
                sequences[tuple(ids)] = ids
    return list(sequences.values())
