# SPDX-License-Identifier: MIT
"""`Turn`: one request of a conversation from messages to answers, the same for every dialect.

    TurnRequest -> Prompt (template, tokenizer) -> Generation -> Answer (parser) -> the dialect

Knows no dialect's names and shapes.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tokenspeed.engine.messages import Retention
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.gateway.answer import Answer
from tokenspeed.gateway.engine_pool import Sent
from tokenspeed.gateway.generation import Choice, Generation, room_left
from tokenspeed.gateway.identity import Caller
from tokenspeed.gateway.receipt import Expectation, cache_receipt
from tokenspeed.gateway.service import Service
from tokenspeed.text.channels import Inputs
from tokenspeed.text.conversation import Conversation, OutputFormat, ToolChoice
from tokenspeed.text.history_keys import Spoken
from tokenspeed.text.parsers.thinking import THINKING
from tokenspeed.text.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class TurnRequest:
    """What a client asks. `params.max_tokens` None: as many as the context has room for."""

    conversation: Conversation
    params: SamplingParams
    caller: Caller = field(default_factory=Caller)
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    output_format: OutputFormat | None = None
    output_field: str = "response_format"  # what the dialect calls it
    cache_salt: str | None = None
    retention: Retention = field(default_factory=Retention)
    limit_field: str = "messages"  # what the dialect calls the part that can be too long
    receipt: bool = False  # whether the answer is to say what the cache had

    @property
    def kept(self) -> Retention:
        """For how long the prompt is to stay cached: a header comes before the body."""
        return self.caller.retention or self.retention


@dataclass(frozen=True)
class Turn:
    """A request under way."""

    request: TurnRequest
    prompt: Prompt
    generation: Generation
    expectation: Expectation | None = None

    @property
    def receipt(self) -> dict[str, Any] | None:
        """What the cache had of the prompt, if that was asked for and is known by now."""
        choice = self.generation.choices[0]
        if self.expectation is None or not choice.num_tokens:
            return None
        return cache_receipt(self.expectation, choice.num_cached, choice.receipt)

    @property
    def answers(self) -> list[Answer]:
        """One for each choice."""
        found = [choice.answer for choice in self.generation.choices]
        return [answer for answer in found if answer is not None]


@asynccontextmanager
async def open_turn(service: Service, request: TurnRequest) -> AsyncIterator[Turn]:
    """Submits the request; leaving aborts what has not finished.

    Raises `RequestError` for what cannot be served as asked, `ApiError` 503 if there is no room.
    """
    service.pool.check_room()
    prompt = await service.prompt(request.conversation, request.caller, request.cache_salt)
    expected = await service.expectation(prompt) if request.receipt else None
    request.caller.record.prompted = time.monotonic()
    limits = service.pool.check_room()
    max_tokens = room_left(
        request.params.max_tokens, [prompt.ids], limits.max_model_len, request.limit_field
    )
    grammar = await service.grammars.of(
        limits.vocab_size,
        tools=request.conversation.callable,
        choice=request.tool_choice,
        output=request.output_format,
        starts_in=prompt.starts_in,
        field=request.output_field,
        owner=request.caller.user,
    )
    params = request.params.replace(max_tokens=max_tokens, grammar=grammar)
    if _is_quiet(request) and service.no_calls:
        words = params.bad_words_token_ids or []
        params = params.replace(bad_words_token_ids=words + service.no_calls)
    sent = Sent(
        salt=service.keys.salt(request.caller.salt, request.cache_salt),
        user=request.caller.user,
        retention=request.kept,
        urgency=request.caller.urgency,
    )
    generation = Generation(
        service.pool,
        service.tokenizer,
        [prompt.ids],
        params,
        sent,
        answer=lambda: _answer(service, request, prompt),
        shown=service.markers,
        record=request.caller.record,
        finished=lambda choice: _remember(service, prompt, choice),
    )
    with generation:
        yield Turn(request, prompt, generation, expected)


def _is_quiet(request: TurnRequest) -> bool:
    """Whether there are tools, none of which may be called: what looks like a call is text."""
    return request.tool_choice.mode == "none" and bool(request.conversation.callable)


def _answer(service: Service, request: TurnRequest, prompt: Prompt) -> Answer:
    inputs = Inputs(prompt.starts_in, request.conversation.callable, service.marker_tokens)
    plain = _is_quiet(request) and not service.format.channels_by_calls
    parser = (THINKING if plain else service.format).make(inputs)
    max_calls = None if request.tool_choice.parallel else 1
    return Answer(parser, prompt.starts_in, max_calls)


def _remember(service: Service, prompt: Prompt, choice: Choice) -> None:
    """A finished answer's ids, for the conversation that goes on from it."""
    answer = choice.answer
    if answer is None or service.prompts is None:
        return
    spoken = Spoken(
        tuple(block.text for block in answer.blocks if block.kind == "content"),
        tuple((block.name, block.call_id, block.text) for block in answer.calls),
        answer.text("reasoning"),
    )
    service.prompts.record(prompt, spoken, choice.output_ids, choice.stop_token_id)
