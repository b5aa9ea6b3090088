# SPDX-License-Identifier: MIT
"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect. Knows no block's shape.

Any model name is taken, and the answer repeats it: clients ask for several of Anthropic's.
"""

import math

import msgspec

from tokenspeed.engine.messages import Retention
from tokenspeed.errors import ContextLengthError
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.app import Call, check_depth, encode_json, log
from tokenspeed.gateway.identity import Hints
from tokenspeed.gateway.messages_error import busy, too_long
from tokenspeed.gateway.messages_input import Input
from tokenspeed.gateway.messages_output import Message
from tokenspeed.gateway.messages_schema import (
    MessagesRequest,
    Notes,
    note_hosted,
    output_format,
    refuse,
    stop_sequences,
    template_options,
)
from tokenspeed.gateway.messages_tools import Tools, tool_choice
from tokenspeed.gateway.openai_schema import check_token_ids
from tokenspeed.gateway.receipt import wants_receipt
from tokenspeed.gateway.service import Service
from tokenspeed.gateway.turn import TurnRequest, open_turn
from tokenspeed.text.conversation import Conversation

_DECODER = msgspec.json.Decoder(MessagesRequest)
_SAME_NAME = ("temperature", "top_p", "top_k", "forced_output_ids")


async def messages(service: Service, call: Call) -> None:
    """The handler of /v1/messages."""
    try:
        await _answer(service, call)
    except ContextLengthError as error:
        raise too_long(error) from None
    except ApiError as error:
        raise busy(error) from None


async def _answer(service: Service, call: Call) -> None:
    request = await call.decode(_DECODER)
    if request.max_tokens is None:
        refuse("max_tokens", "field required")
    notes = Notes()
    asked = _turn_request(request, call, notes)
    call.headers |= notes.header()
    if notes.ignored:
        log.info("ignored of a request: %s", call.headers["x-tokenspeed-ignored"])
    limits = service.pool.check_room()
    check_token_ids(asked.params, limits.vocab_size)
    async with open_turn(service, asked) as turn:
        message = Message(
            turn,
            request.model,
            page_size=limits.page_size,
            kept_s=math.inf if asked.kept.pinned else asked.kept.seconds,
            silent=request.max_tokens == 0,
            omit=(request.thinking or {}).get("display") == "omitted",
        )
        if request.stream:
            await turn.generation.stream(call, message)
        else:
            await turn.generation.finish()
            await call.reply(message.whole())


async def count_tokens(service: Service, call: Call) -> None:
    """The handler of /v1/messages/count_tokens: the prompt of the same request, counted."""
    asked = _turn_request(await call.decode(_DECODER), call, Notes())
    try:
        prompt = await service.prompt(asked.conversation, asked.caller)
    except ContextLengthError as error:
        raise too_long(error) from None
    await call.reply(encode_json({"input_tokens": len(prompt.ids)}))


def _turn_request(request: MessagesRequest, call: Call, notes: Notes) -> TurnRequest:
    for name in ("messages", "tools", "system", "tool_choice", "output_config", "output_format"):
        check_depth(getattr(request, name), name)
    note_hosted(request, notes)
    notes.keep(request.cache_control, "")
    tools = Tools(request.tools, notes)
    history = Input(notes, tools)
    history.read(request.system, request.messages)
    options = template_options(request, notes)
    output, field = output_format(request)
    given = {name: getattr(request, name) for name in _SAME_NAME}
    return TurnRequest(
        conversation=Conversation(
            history.messages,
            tools.shown,
            options,
            loaded=tools.loaded,
            continue_final=history.goes_on,
        ),
        params=SamplingParams(
            # 0 asks for the prompt to be cached; one token is the least that the engine makes.
            max_tokens=request.max_tokens or 1,
            stop=stop_sequences(request.stop_sequences),
            **{name: value for name, value in given.items() if value is not None},
        ),
        caller=call.caller(
            Hints(
                metadata=request.metadata,
                priority=request.priority,
                service_tier=request.service_tier,
            )
        ),
        tool_choice=tool_choice(request.tool_choice, (*tools.shown, *tools.loaded), tools.hosted),
        output_format=output,
        output_field=field,
        retention=Retention(notes.retention_s),
        receipt=wants_receipt(call.scope["headers"], request.cache_receipt),
    )
