# SPDX-License-Identifier: MIT
"""POST /v1/chat/completions. Knows the shapes of chat answers, nothing of how tokens come about.

Reasoning comes under both of its names; custom tools get their input as text.
"""

import secrets
import time
from typing import Any

import msgspec

from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import TokenLogprobs
from tokenspeed.gateway.app import Call, check_depth, encode_json
from tokenspeed.gateway.chat_deltas import Deltas, whole_call
from tokenspeed.gateway.generation import Choice
from tokenspeed.gateway.openai_schema import ChatRequest, Sampling, check_served, sampling_params
from tokenspeed.gateway.openai_stream import DONE, OpenAIStream, usage_of
from tokenspeed.gateway.openai_structured import output_field, output_format_of
from tokenspeed.gateway.openai_tools import chat_messages, chat_tool_choice, chat_tools
from tokenspeed.gateway.receipt import wants_receipt
from tokenspeed.gateway.service import Service
from tokenspeed.gateway.turn import Turn, TurnRequest, open_turn
from tokenspeed.text.conversation import Conversation
from tokenspeed.text.tokenizer import Tokenizer

_DECODER = msgspec.json.Decoder(ChatRequest)
MIN_LOGPROB = -9999.0  # JSON has no infinity


async def chat_completions(service: Service, call: Call) -> None:
    """The handler."""
    request = await call.decode(_DECODER)
    model = service.model_name(request.model)
    limits = service.pool.check_room()
    asked = _turn_request(service, request, call, limits.vocab_size)
    async with open_turn(service, asked) as turn:
        dialect = _Chat(request, model, turn, service.tokenizer)
        if request.stream:
            await turn.generation.stream(call, dialect)
        else:
            await turn.generation.finish()
            await call.reply(dialect.whole())


def _turn_request(
    service: Service, request: ChatRequest, call: Call, vocab_size: int
) -> TurnRequest:
    check_served(request)
    for name in ("messages", "tools", "documents", "chat_template_kwargs"):
        check_depth(getattr(request, name), name)
    options = dict(request.chat_template_kwargs or {})
    for name in ("documents", "reasoning_effort"):
        if (value := getattr(request, name)) is not None:
            options[name] = value
    max_tokens = request.max_completion_tokens
    if max_tokens is not None and not 1 <= max_tokens < 2**31:
        why = f"max_completion_tokens: must be in [1, 2147483647], got {max_tokens}"
        raise RequestError(why, field="max_completion_tokens")
    tools = chat_tools(request.tools)
    return TurnRequest(
        conversation=Conversation(
            chat_messages(request.messages),
            tools,
            options,
            add_generation_prompt=request.add_generation_prompt is not False,
            add_special_tokens=bool(request.add_special_tokens),
        ),
        params=sampling_params(
            request,
            max_tokens=request.max_tokens if max_tokens is None else max_tokens,
            logprobs=request.num_logprobs(),
            tokenizer=service.tokenizer,
            vocab_size=vocab_size,
        ),
        caller=call.caller(request.hints()),
        tool_choice=chat_tool_choice(request.tool_choice, request.parallel_tool_calls, tools),
        output_format=output_format_of(request.response_format, request.structured_outputs),
        output_field=output_field(request.structured_outputs),
        cache_salt=request.cache_salt,
        receipt=wants_receipt(call.scope["headers"], request.cache_receipt),
    )


class _Chat(OpenAIStream):
    """The answer's JSON, whole or in chunks. What does not change is encoded once."""

    def __init__(
        self, request: ChatRequest, model: str, turn: Turn, tokenizer: Tokenizer | None
    ) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._turn = turn
        self._generation, self._conversation = turn.generation, turn.request.conversation
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        if request.service_tier is not None:
            self._head["service_tier"] = turn.request.caller.urgency.tier
        options = request.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        # A chunk that is nothing but a delta is these two around it and the choice's number.
        self._front = b"data: " + encode_json(self._head)[:-1] + b',"choices":[{"index":'
        usage = b',"usage":null' if self._usage_at_end else b""
        self._back = b',"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._plain = not (self._usage_always or request.return_token_ids or request.logprobs)
        self._deltas = [Deltas(self._conversation) for _ in turn.answers]

    def chunk(self, choice: Choice) -> bytes:
        parts = [] if choice.begun else [self._opening(choice)]
        deltas = self._deltas[choice.index].of(choice.answer.take() if choice.answer else [])
        last = None
        if choice.finish_reason is not None or not self._plain:
            last = deltas.pop() if deltas else {}
        for delta in deltas:
            if self._plain:
                data = encode_json(delta)
                parts.append(b'%b%d,"delta":%b%b' % (self._front, choice.index, data, self._back))
            else:
                parts.append(self._event([self._bare(choice, delta)]))
        if last is not None:
            parts.append(self._event([self._choice(choice, "delta", last)]))
        return b"".join(parts)

    def _opening(self, choice: Choice) -> bytes:
        choice.begun = True
        first = self._bare(choice, {"role": "assistant", "content": ""})
        return self._event([first], prompt_extras(self._request, choice, self._tokenizer))

    def closing(self) -> bytes:
        if not self._usage_at_end:
            return DONE
        return b"data: " + encode_json(self._with_usage([])) + b"\n\n" + DONE

    def whole(self) -> bytes:
        made = self._generation.choices
        choices = [self._choice(choice, "message", self._message(choice)) for choice in made]
        extras = prompt_extras(self._request, made[0], self._tokenizer)
        return encode_json(self._with_usage(choices) | extras)

    def _message(self, choice: Choice) -> dict[str, Any]:
        """The whole message of a choice."""
        answer = choice.answer
        if answer is None:
            raise RuntimeError("a chat's choice has an answer")
        message: dict[str, Any] = {"role": "assistant", "content": answer.text("content")}
        if (thought := answer.text("reasoning")) is not None:
            message |= {"reasoning": thought, "reasoning_content": thought}
        if calls := answer.calls:
            message["tool_calls"] = [whole_call(block, self._conversation) for block in calls]
        elif message["content"] is None:
            message["content"] = ""
        return message

    def _event(self, choices: list[dict[str, Any]], extras: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = self._head | {"choices": choices}
        if self._usage_always:
            body["usage"] = usage_of(self._generation)
        elif self._usage_at_end:
            body["usage"] = None
        return b"data: " + encode_json(body | (extras or {})) + b"\n\n"

    def _with_usage(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = usage_of(self._generation)
        if (receipt := self._turn.receipt) is not None:
            usage["cache_receipt"] = receipt
        return self._head | {"choices": choices, "usage": usage}

    def _bare(self, choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _choice(self, choice: Choice, key: str, message: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs:
            logprobs = {"content": [self._token(p) for p in choice.logprobs]}
        made: dict[str, Any] = {
            "index": choice.index,
            key: message,
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
