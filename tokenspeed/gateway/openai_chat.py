# SPDX-License-Identifier: MIT
"""POST /v1/chat/completions. Knows the shapes of chat answers, nothing of how tokens come about.

The model's text is the content as it is: tool calls and reasoning in it are not parsed out yet.
"""

import secrets
import time
from typing import Any

import msgspec

from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import TokenLogprobs
from tokenspeed.gateway.app import Call, check_depth, encode_json
from tokenspeed.gateway.generation import Choice, Generation, room_left
from tokenspeed.gateway.openai_schema import ChatRequest, Sampling, check_served, sampling_params
from tokenspeed.gateway.service import Service
from tokenspeed.text.tokenizer import Tokenizer

_DECODER = msgspec.json.Decoder(ChatRequest)
MIN_LOGPROB = -9999.0  # JSON has no infinity


async def chat_completions(service: Service, call: Call) -> None:
    """The handler."""
    request = await call.decode(_DECODER)
    model = service.model_name(request.model)
    service.pool.check_room()
    check_served(request)
    prompt = await _render(service, request)
    limits = service.pool.check_room()
    max_tokens = request.max_completion_tokens
    if max_tokens is not None and max_tokens < 1:
        why = "max_completion_tokens: must be at least 1"
        raise RequestError(why, field="max_completion_tokens")
    params = sampling_params(
        request,
        max_tokens=room_left(
            request.max_tokens if max_tokens is None else max_tokens,
            [prompt],
            limits.max_model_len,
            "messages",
        ),
        logprobs=request.num_logprobs(),
        tokenizer=service.tokenizer,
        vocab_size=limits.vocab_size,
    )
    salt = service.keys.salt(call.tenant, request.cache_salt)
    with Generation(service.pool, service.tokenizer, [prompt], params, salt) as generation:
        dialect = _Chat(request, model, generation, service.tokenizer)
        if request.stream:
            await generation.stream(call, dialect)
        else:
            await generation.finish()
            await call.reply(dialect.whole())


async def _render(service: Service, request: ChatRequest) -> list[int]:
    """The prompt's ids, by the model's template."""
    options = dict(request.chat_template_kwargs or {})
    for name, value in (
        ("documents", request.documents),
        ("reasoning_effort", request.reasoning_effort),
    ):
        if value is not None:
            options[name] = value
    for name in ("messages", "tools", "documents", "chat_template_kwargs"):
        check_depth(getattr(request, name), name)
    generate = request.add_generation_prompt is not False
    return await service.chat_prompt(
        request.messages,
        tools=request.tools,
        add_generation_prompt=generate,
        add_special_tokens=bool(request.add_special_tokens),
        options=options,
    )


class _Chat:
    """The answer's JSON, whole or in chunks. What does not change is encoded once."""

    def __init__(
        self, request: ChatRequest, model: str, generation: Generation, tokenizer: Tokenizer | None
    ) -> None:
        self._request, self._generation, self._tokenizer = request, generation, tokenizer
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        options = request.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        # A chunk that is nothing but text is these two around the text and the choice's number.
        self._front = b"data: " + encode_json(self._head)[:-1] + b',"choices":[{"index":'
        usage = b',"usage":null' if self._usage_at_end else b""
        self._back = b'},"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._plain = not (self._usage_always or request.return_token_ids or request.logprobs)

    def chunk(self, choice: Choice) -> bytes:
        opening = b"" if choice.begun else self._opening(choice)
        if choice.finish_reason is None:
            if not choice.text and self._plain:
                return opening
            if self._plain:
                text = b',"delta":{"content":' + encode_json(choice.text)
                return b"%b%b%d%b%b" % (opening, self._front, choice.index, text, self._back)
        return opening + self._event([self._choice(choice, delta=True)])

    def _opening(self, choice: Choice) -> bytes:
        choice.begun = True
        first: dict[str, Any] = {
            "index": choice.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._event([first], prompt_extras(self._request, choice, self._tokenizer))

    def closing(self) -> bytes:
        if not self._usage_at_end:
            return b""
        return b"data: " + encode_json(self._with_usage([])) + b"\n\n"

    def whole(self) -> bytes:
        made = self._generation.choices
        choices = [self._choice(choice, delta=False) for choice in made]
        extras = prompt_extras(self._request, made[0], self._tokenizer)
        return encode_json(self._with_usage(choices) | extras)

    def _event(self, choices: list[dict[str, Any]], extras: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = self._head | {"choices": choices}
        if self._usage_always:
            body["usage"] = self._generation.usage()
        elif self._usage_at_end:
            body["usage"] = None
        return b"data: " + encode_json(body | (extras or {})) + b"\n\n"

    def _with_usage(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"choices": choices, "usage": self._generation.usage()}

    def _choice(self, choice: Choice, *, delta: bool) -> dict[str, Any]:
        message: dict[str, Any] = {"content": choice.text}
        logprobs = None
        if self._request.logprobs:
            logprobs = {"content": [self._token(p) for p in choice.logprobs]}
        made: dict[str, Any] = {
            "index": choice.index,
            "delta" if delta else "message": message if delta else {"role": "assistant"} | message,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.return_token_ids:
            made["token_ids"] = choice.token_ids
        return made

    def _token(self, position: TokenLogprobs) -> dict[str, Any]:
        """The chosen token with the likeliest ones beside it."""
        all_of_it = [
            self._one(token, logprob)
            for token, logprob in zip(position.token_ids, position.logprobs, strict=True)
        ]
        top = self._request.top_logprobs or 0
        return all_of_it[0] | {"top_logprobs": all_of_it[1 : top + 1]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        as_ids = bool(self._request.return_tokens_as_token_ids)
        raw = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token)
        return {
            "token": token_text(token, self._tokenizer, as_ids=as_ids),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(raw),
        }


def token_text(token: int, tokenizer: Tokenizer | None, *, as_ids: bool) -> str:
    """A token as logprobs show it: its text, or `token_id:N` if that was asked for."""
    if as_ids or tokenizer is None:
        return f"token_id:{token}"
    return tokenizer.token_text(token)


def prompt_extras(request: Sampling, choice: Choice, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What is said once of the prompt, if it was asked for."""
    extras: dict[str, Any] = {}
    if request.return_token_ids:
        extras["prompt_token_ids"] = choice.prompt_ids
    if choice.prompt_logprobs is not None:
        extras["prompt_logprobs"] = _prompt_logprobs(choice.prompt_logprobs, tokenizer)
    return extras


def _prompt_logprobs(
    positions: list[TokenLogprobs | None], tokenizer: Tokenizer | None
) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token a map of id to logprob, rank and text; null for the
    first, which nothing precedes."""
    return [
        None
        if position is None
        else {
            str(token): {
                "logprob": max(logprob, MIN_LOGPROB),
                "rank": rank,
                "decoded_token": token_text(token, tokenizer, as_ids=False),
            }
            for token, logprob, rank in zip(
                position.token_ids, position.logprobs, position.ranks, strict=True
            )
        }
        for position in positions
    ]
