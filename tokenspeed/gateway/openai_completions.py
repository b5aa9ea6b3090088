# SPDX-License-Identifier: MIT
"""POST /v1/completions: text or ids in, text out. Knows the shapes of completion answers."""

import asyncio
import secrets
import time
from typing import Any

import msgspec

from tokenspeed.engine.messages import Retention
from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import TokenLogprobs
from tokenspeed.gateway.app import Call, encode_json
from tokenspeed.gateway.engine_pool import Sent
from tokenspeed.gateway.generation import Choice, Generation, room_left
from tokenspeed.gateway.openai_chat import MIN_LOGPROB, prompt_extras, token_text
from tokenspeed.gateway.openai_schema import Sampling, check_served, sampling_params
from tokenspeed.gateway.openai_stream import DONE, OpenAIStream, usage_of
from tokenspeed.gateway.openai_structured import output_field, output_format_of
from tokenspeed.gateway.service import Service
from tokenspeed.text.tokenizer import Tokenizer

MAX_PROMPTS = 256
_DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(Sampling, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    # Refused while it is not served:
    suffix: str | None = None

    def refusals(self) -> dict[str, bool]:
        return Sampling.refusals(self) | {"suffix": bool(self.suffix)}


_DECODER = msgspec.json.Decoder(CompletionRequest)


async def completions(service: Service, call: Call) -> None:
    """The handler."""
    request = await call.decode(_DECODER)
    model = service.model_name(request.model)
    service.pool.check_room()
    check_served(request)
    if request.echo and request.logprobs is not None:
        raise RequestError(
            "echo: with logprobs it is not supported; ask for prompt_logprobs",
            field="echo",
            code="unsupported_parameter",
        )
    caller = call.caller(request.hints())
    prompts = await _prompts(service, request)
    caller.record.prompted = time.monotonic()
    limits = service.pool.check_room()
    asked = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    params = sampling_params(
        request,
        max_tokens=room_left(asked, prompts, limits.max_model_len, "prompt"),
        logprobs=request.logprobs,
        tokenizer=service.tokenizer,
        vocab_size=limits.vocab_size,
    )
    output = output_format_of(request.response_format, request.structured_outputs)
    if output is not None:
        field = output_field(request.structured_outputs)
        grammar = await service.grammars.of(
            limits.vocab_size, output=output, field=field, owner=caller.user
        )
        params = params.replace(grammar=grammar)
    salt = service.keys.salt(caller.salt, request.cache_salt)
    sent = Sent(salt, caller.user, caller.retention or Retention(), caller.urgency)
    with Generation(
        service.pool, service.tokenizer, prompts, params, sent, record=caller.record
    ) as generation:
        dialect = _Completion(request, model, generation, service.tokenizer)
        if request.stream:
            await generation.stream(call, dialect)
        else:
            await generation.finish()
            await call.reply(dialect.whole())


async def _prompts(service: Service, request: CompletionRequest) -> list[list[int]]:
    """One list of ids for each prompt. Raises 400 for anything that is not a prompt."""
    given: Any = request.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 0 < len(given) <= MAX_PROMPTS:
        raise RequestError(
            f"prompt: 1 to {MAX_PROMPTS} prompts", field="prompt", code="empty_prompt"
        )
    special = request.add_special_tokens is not False
    return list(await asyncio.gather(*(_ids(service, prompt, special) for prompt in given)))


async def _ids(service: Service, prompt: Any, add_special_tokens: bool) -> list[int]:
    limits = service.pool.check_room(0)
    if isinstance(prompt, str):
        ids = await service.encode(prompt, add_special_tokens)
    elif isinstance(prompt, list) and all(type(i) is int for i in prompt):
        ids = prompt
        if ids and not (min(ids) >= 0 and max(ids) < limits.vocab_size):
            raise RequestError(
                f"prompt: token ids must be in [0, {limits.vocab_size})",
                field="prompt",
                code="invalid_token_id",
            )
    else:
        raise RequestError(
            "prompt: must be a string, a list of token ids, or a list of these",
            field="prompt",
            code="invalid_type",
        )
    if not ids:
        raise RequestError("prompt: must not be empty", field="prompt", code="empty_prompt")
    return ids


class _Completion(OpenAIStream):
    """The answer's JSON, whole or in chunks. What does not change is encoded once."""

    def __init__(
        self,
        request: CompletionRequest,
        model: str,
        generation: Generation,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._request, self._generation, self._tokenizer = request, generation, tokenizer
        self._head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(16)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        options = request.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._front = b"data: " + encode_json(self._head)[:-1] + b',"choices":[{"index":'
        usage = b',"usage":null' if self._usage_at_end else b""
        self._back = b',"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._plain = not (
            self._usage_always or request.return_token_ids or request.logprobs is not None
        )
        self._offsets = [0] * len(generation.choices)  # of the next token in the text

    def chunk(self, choice: Choice) -> bytes:
        if not choice.begun:
            choice.begun = True
            choice.text = self._echo(choice) + choice.text
            if self._request.return_token_ids or choice.prompt_logprobs is not None:
                return self._event(self._choice(choice) | self._extras(choice))
        if choice.finish_reason is None and self._plain:
            if not choice.text:
                return b""
            text = encode_json(choice.text)
            return b'%b%d,"text":%b%b' % (self._front, choice.index, text, self._back)
        return self._event(self._choice(choice))

    def closing(self) -> bytes:
        if not self._usage_at_end:
            return DONE
        body = self._head | {"choices": [], "usage": usage_of(self._generation)}
        return b"data: " + encode_json(body) + b"\n\n" + DONE

    def whole(self) -> bytes:
        choices = []
        for choice in self._generation.choices:
            choice.text = self._echo(choice) + choice.text
            choices.append(self._choice(choice) | self._extras(choice))
        return encode_json(self._head | {"choices": choices, "usage": usage_of(self._generation)})

    def _event(self, choice: dict[str, Any]) -> bytes:
        body = self._head | {"choices": [choice]}
        if self._usage_always:
            body["usage"] = usage_of(self._generation)
        elif self._usage_at_end:
            body["usage"] = None
        return b"data: " + encode_json(body) + b"\n\n"

    def _echo(self, choice: Choice) -> str:
        if not self._request.echo or self._tokenizer is None:
            return ""
        return self._tokenizer.decode(choice.prompt_ids, choice.params.skip_special_tokens)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        made: dict[str, Any] = {
            "index": choice.index,
            "text": choice.text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.logprobs is not None:
            made["logprobs"] = self._logprobs(choice)
        if self._request.return_token_ids:
            made["token_ids"] = choice.token_ids
        return made

    def _extras(self, choice: Choice) -> dict[str, Any]:
        return prompt_extras(self._request, choice, self._tokenizer)

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        """Four lists of equal length: tokens, logprobs, the likeliest, offsets in the text."""
        made: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for position in choice.logprobs:
            text = self._text(position.token_ids[0])
            made["tokens"].append(text)
            made["token_logprobs"].append(max(position.logprobs[0], MIN_LOGPROB))
            made["top_logprobs"].append(self._top(position))
            made["text_offset"].append(self._offsets[choice.index])
            self._offsets[choice.index] += len(text)
        return made

    def _top(self, position: TokenLogprobs) -> dict[str, float]:
        """The `logprobs` likeliest and the chosen token, by text."""
        pairs = list(zip(position.token_ids, position.logprobs, strict=True))
        pairs = pairs[1 : (self._request.logprobs or 0) + 1] + pairs[:1]
        return {self._text(token): max(logprob, MIN_LOGPROB) for token, logprob in pairs}

    def _text(self, token: int) -> str:
        as_ids = bool(self._request.return_tokens_as_token_ids)
        return token_text(token, self._tokenizer, as_ids=as_ids)
