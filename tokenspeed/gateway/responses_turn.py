# SPDX-License-Identifier: MIT
"""`Asked`: one Responses request, checked and read, and the response that is to come of it.

    ResponsesRequest -> items -> TurnRequest      events -> Output -> Kept

Knows the store and the request, no HTTP.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from tokenspeed.errors import RequestError
from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.app import check_depth, encode_json
from tokenspeed.gateway.generation import Choice
from tokenspeed.gateway.identity import Caller
from tokenspeed.gateway.responses_input import Item, Messages, input_items
from tokenspeed.gateway.responses_output import Output
from tokenspeed.gateway.responses_schema import ResponsesRequest
from tokenspeed.gateway.responses_store import Kept, ResponseStore, keep
from tokenspeed.gateway.responses_tools import (
    loaded_tools,
    note,
    read_tool_choice,
    read_tools,
    shown_tools,
)
from tokenspeed.gateway.service import Service
from tokenspeed.gateway.turn import Turn, TurnRequest
from tokenspeed.text.conversation import Conversation

_NESTED = ("input", "instructions", "tools", "tool_choice", "chat_template_kwargs")


@dataclass(frozen=True)
class Asked:
    """What one request asks for, and where its answer goes."""

    request: ResponsesRequest
    turn: TurnRequest
    output: Output
    given: list[Item]  # input items, as they are listed; none if nothing is kept
    parent: Kept | None
    ignored: list[str]  # what the request has that is not served
    store: ResponseStore

    def gained(self, choice: Choice) -> list[bytes]:
        """The events for what the answer has gained."""
        events = [] if choice.answer is None else choice.answer.take()
        choice.clear()
        return self.output.push(events)

    def finish(self, turn: Turn) -> list[bytes]:
        """The last events."""
        [choice] = turn.generation.choices
        usage = _usage(choice)
        if (receipt := turn.receipt) is not None:
            usage["cache_receipt"] = receipt
        return self.output.finish(usage, cut=choice.finish_reason == "length")

    def fail(self, error: ApiError) -> list[bytes]:
        """The last events of a response that broke."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        return self.output.fail(code, str(error))

    def keep(self, events: list[bytes] | None = None) -> None:
        """Stores the response as it stands, if it is to be kept."""
        if self.request.kept:
            tenant, response = self.turn.caller.tenant, self.output.response()
            self.store.put(keep(tenant, response, self.given, self.parent, events))


def read_request(
    service: Service,
    store: ResponseStore,
    request: ResponsesRequest,
    caller: Caller,
    *,
    receipt: bool = False,
) -> Asked:
    """Raises `RequestError` or `ApiError` for what cannot be served as asked."""
    model = service.model_name(request.model)
    limits = service.pool.check_room()
    request.check()
    for name in _NESTED:
        check_depth(getattr(request, name), name)
    ignored: list[str] = []
    parent = _parent(store, request, caller.tenant)
    before = [] if parent is None else parent.all_items()
    items = input_items(request.input, store.finder(caller.tenant))
    tools = read_tools(request.tools, ignored, [*before, *items])
    loaded = loaded_tools([*before, *items], tools, ignored)
    choice, allowed = read_tool_choice(
        request.tool_choice, request.parallel_tool_calls, (*tools, *loaded), ignored
    )
    reader = Messages(tools, ignored, loaded)
    _instructions(reader, request.instructions)
    reader.read(before)
    reader.read(items)
    if request.text is not None and request.text.verbosity is not None:
        note(ignored, "text.verbosity")
    conversation = Conversation(
        reader.made,
        tuple(tool for tool in tools if tool in allowed),
        request.template_options(),
        loaded=tuple(tool for tool in loaded if tool in allowed),
    )
    turn = TurnRequest(
        conversation=conversation,
        params=request.params(service.tokenizer, limits.vocab_size),
        caller=caller,
        tool_choice=choice,
        output_format=request.output_format(),
        output_field="text.format",
        cache_salt=request.cache_salt,
        retention=request.retention(),
        receipt=receipt,
        limit_field="input",
    )
    output = Output(
        _head(request, model, caller.urgency.tier), conversation, request.seals_reasoning
    )
    given = [_stored(item) for item in items] if request.kept else []
    return Asked(request, turn, output, given, parent, ignored, store)


def _parent(store: ResponseStore, request: ResponsesRequest, tenant: str) -> Kept | None:
    wanted = request.previous_response_id
    if wanted is None:
        return None
    found = store.get(tenant, wanted)
    if found is None:
        raise ApiError(
            404,
            f"Previous response with id {wanted[:80]!r} not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return found


def _instructions(reader: Messages, given: str | list[Item] | None) -> None:
    if isinstance(given, str) and given:
        reader.made.append({"role": "system", "content": given})
    elif isinstance(given, list):
        reader.read(given)


@contextmanager
def as_input() -> Iterator[None]:
    """Errors about a conversation's messages name the field that they came in."""
    try:
        yield
    except RequestError as error:
        if (error.field or "").partition("[")[0] != "messages":
            raise
        raise RequestError(str(error), field="input", code=error.code) from None


def _head(request: ResponsesRequest, model: str, tier: str) -> dict[str, Any]:
    """The fields of the response that do not change. What is large is encoded once."""
    reasoning, asked = msgspec.to_builtins((request.reasoning, request.text))
    text = {"format": {"type": "text"}} | {k: v for k, v in (asked or {}).items() if v}
    same = "max_output_tokens max_tool_calls previous_response_id prompt_cache_key user"
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        **{name: getattr(request, name) for name in (*same.split(), "safety_identifier")},
        "background": bool(request.background),
        "conversation": None,
        "instructions": msgspec.Raw(encode_json(request.instructions)),
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "prompt": None,
        "prompt_cache_retention": (request.prompt_cache_retention or "in_memory").replace("-", "_"),
        "reasoning": reasoning or {"effort": None, "summary": None},
        "service_tier": tier,
        "store": request.kept,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": text,
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": msgspec.Raw(encode_json(shown_tools(request.tools))),
        "top_logprobs": 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
    }


def _usage(choice: Choice) -> dict[str, Any]:
    """Tokens, in this dialect's names. Nothing is charged for writing to the cache."""
    num_prompt = len(choice.prompt_ids)
    return {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": choice.num_cached, "cache_write_tokens": 0},
        "output_tokens": choice.num_tokens,
        "output_tokens_details": {"reasoning_tokens": choice.num_reasoning},
        "total_tokens": num_prompt + choice.num_tokens,
    }


_PREFIXES = {"function_call": "fc", "custom_tool_call": "ctc", "reasoning": "rs"}


def _stored(item: Item) -> Item:
    """An input item as it is listed: with an id, a type, a status, and its text in parts."""
    kind = item.get("type", "message")
    prefix = _PREFIXES.get(str(kind), "msg" if kind == "message" else "item")
    made = {"id": f"{prefix}_{secrets.token_hex(24)}", "type": kind, "status": "completed", **item}
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        made["content"] = [{"type": part, "text": item["content"]}]
        if part == "output_text":
            made["content"][0]["annotations"] = []
    return made
