# SPDX-License-Identifier: MIT
"""/v1/responses and what belongs to it: create, get, delete, cancel, list input items.

Knows HTTP and the order of things; reading requests and making items is done elsewhere.
"""

from typing import Any
from urllib.parse import parse_qs

import msgspec

from tokenspeed.errors import RequestError
from tokenspeed.gateway.api_error import ApiError, of_exception
from tokenspeed.gateway.app import Call, encode_json, log
from tokenspeed.gateway.generation import SSE_HEADERS, Choice
from tokenspeed.gateway.identity import Hints
from tokenspeed.gateway.receipt import wants_receipt
from tokenspeed.gateway.responses_background import KEEP_ALIVE, Running
from tokenspeed.gateway.responses_schema import ResponsesRequest
from tokenspeed.gateway.responses_store import Kept, unpack
from tokenspeed.gateway.responses_turn import Asked, as_input, read_request
from tokenspeed.gateway.service import Service
from tokenspeed.gateway.turn import Turn, open_turn

_DECODER = msgspec.json.Decoder(ResponsesRequest)
_SSE = "text/event-stream; charset=utf-8"
_MAX_PAGE = 100
MAX_BACKGROUND = 64  # responses of one tenant


async def create_response(service: Service, call: Call) -> None:
    """POST /v1/responses."""
    request = await call.decode(_DECODER)
    hints = Hints(
        user=request.user,
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
        priority=request.priority,
        service_tier=request.service_tier,
    )
    receipt = wants_receipt(call.scope["headers"], request.cache_receipt)
    store, caller = service.responses, call.caller(hints)
    asked = read_request(service, store, request, caller, receipt=receipt)
    if asked.ignored:
        call.headers["x-tokenspeed-ignored"] = ", ".join(asked.ignored)
        log.info("a response was asked for with what is not served: %s", asked.ignored)
    if request.background:
        await _start(service, call, asked)
        return
    with as_input():
        async with open_turn(service, asked.turn) as turn:
            if request.stream:
                await turn.generation.stream(call, _Stream(asked, turn))
                return
            await turn.generation.finish()
            asked.gained(turn.generation.choices[0])
            asked.finish(turn)
            asked.keep()
            await call.reply(encode_json(asked.output.response()))


class _Stream:
    """A response's events as they come; the dialect of `Generation.stream`."""

    def __init__(self, asked: Asked, turn: Turn) -> None:
        self._asked, self._turn, self._begun = asked, turn, False

    def chunk(self, choice: Choice) -> bytes:
        return self._opening() + b"".join(self._asked.gained(choice))

    def closing(self) -> bytes:
        events = self._asked.finish(self._turn)
        self._asked.keep()
        return b"".join(events)

    def failure(self, error: ApiError) -> bytes:
        events = self._asked.fail(error)
        self._asked.keep()
        return b"".join(events)

    def keep_alive(self) -> bytes:
        return self._opening() + KEEP_ALIVE

    def _opening(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return b"".join(self._asked.output.opening())


async def _start(service: Service, call: Call, asked: Asked) -> None:
    """Answers in the background; the client follows, or comes back for it."""
    caller, streams = asked.turn.caller, bool(asked.request.stream)
    _check_background(service, call, caller.tenant)
    # What the work costs is known, and charged, long after this call has been answered.
    over = call.detach()
    running = Running(asked.output, asked.given, streams=streams)
    key = (caller.tenant, asked.output.id)

    def ended() -> None:
        del service.responses.running[key]
        if asked.output.status == "in_progress":
            asked.output.cancel()
        asked.keep(running.events if streams else None)
        over()

    service.responses.running[key] = running
    running.start(_answer(service, asked, running), ended)
    if streams:
        await _follow(call, running, 0)
    else:
        await call.reply(encode_json(asked.output.response()))


def _check_background(service: Service, call: Call, tenant: str) -> None:
    """Raises 429: what runs in the background has limits of its own."""
    num_running = sum(owner == tenant for owner, _ in service.responses.running)
    most = min(call.tenant.limiter.limits.max_concurrency or MAX_BACKGROUND, MAX_BACKGROUND)
    if num_running >= most:
        why = f"background: at most {most} responses at once"
        raise ApiError(429, why, code="rate_limit_exceeded", headers={"retry-after": "5"})


async def _answer(service: Service, asked: Asked, running: Running) -> None:
    running.add(asked.output.opening())
    try:
        with as_input():
            async with open_turn(service, asked.turn) as turn:
                while turn.generation.num_running:
                    changed = await turn.generation.next()
                    running.add([event for one in changed for event in asked.gained(one)])
                running.add(asked.finish(turn))
    except Exception as error:
        answer = of_exception(error)
        if answer.status == 500:
            log.error("a response in the background failed", exc_info=error)
        running.add(asked.fail(answer))


async def _follow(call: Call, running: Running, first: int) -> None:
    await call.start(200, _SSE, SSE_HEADERS)
    async for data in running.follow(first):
        await call.send({"type": "http.response.body", "body": data, "more_body": True})
    await call.send({"type": "http.response.body", "body": b""})


async def get_response(service: Service, call: Call) -> None:
    """GET /v1/responses/{id}; with `stream=true` its events, from `starting_after` on."""
    await call.body()
    query = _query(call)
    first = _number(query, "starting_after", -1) + 1
    running = _running(service, call)
    kept = None if running is not None else _kept(service, call)
    if query.get("stream") not in ("true", "1"):
        body = unpack(kept.response) if kept is not None else None
        if running is not None:
            body = encode_json(running.output.response())
        await call.reply(body or b"")
        return
    if running is not None and running.streams:
        await _follow(call, running, first)
        return
    events = kept.events if kept is not None else None
    if events is None:
        why = "stream: only a response made with background and stream can be streamed again"
        raise RequestError(why, field="stream", code="unsupported_parameter")
    blocks = unpack(events).split(b"\n\n")[first:]
    await call.reply(b"\n\n".join(blocks), kind=_SSE, headers=SSE_HEADERS)


async def delete_response(service: Service, call: Call) -> None:
    """DELETE /v1/responses/{id}. One that still runs is cancelled first."""
    kept = await _stopped(service, call)
    service.responses.delete(kept)
    await call.reply(encode_json({"id": kept.id, "object": "response", "deleted": True}))


async def cancel_response(service: Service, call: Call) -> None:
    """POST /v1/responses/{id}/cancel, for those in the background. Twice is as good as once."""
    kept = await _stopped(service, call)
    body = unpack(kept.response)
    if not msgspec.json.decode(body)["background"]:
        why = "only a response made with background: true can be cancelled"
        raise RequestError(why, code="not_cancellable")
    await call.reply(body)


async def list_input_items(service: Service, call: Call) -> None:
    """GET /v1/responses/{id}/input_items: the latest first, unless `order=asc`."""
    await call.body()
    query = _query(call)
    running = _running(service, call)
    items = running.given if running is not None else _own_input(_kept(service, call))
    if query.get("order", "desc") not in ("asc", "desc"):
        raise RequestError("order: must be asc or desc", field="order")
    if query.get("order") != "asc":
        items = items[::-1]
    limit = _number(query, "limit", 20)
    if not 1 <= limit <= _MAX_PAGE:
        raise RequestError(f"limit: must be in [1, {_MAX_PAGE}]", field="limit")
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise RequestError("after: no such item", field="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    made: dict[str, Any] = {"object": "list", "data": page, "has_more": len(items) > limit}
    made["first_id"] = page[0]["id"] if page else ""
    made["last_id"] = page[-1]["id"] if page else ""
    await call.reply(encode_json(made))


async def _stopped(service: Service, call: Call) -> Kept:
    """The response that the path names, cancelled if it still ran."""
    await call.body()
    running = _running(service, call)
    if running is not None:
        running.cancel()
        await running.wait()
    return _kept(service, call)


def _own_input(kept: Kept) -> list[dict[str, Any]]:
    return kept.own_items()[: kept.num_given]


def _running(service: Service, call: Call) -> Running | None:
    return service.responses.running.get((call.caller().tenant, call.path["response_id"]))


def _kept(service: Service, call: Call) -> Kept:
    wanted = call.path["response_id"]
    kept = service.responses.get(call.caller().tenant, wanted)
    if kept is None:
        why = f"Response with id {wanted[:80]!r} not found."
        raise ApiError(404, why, param="response_id", code="response_not_found")
    return kept


def _query(call: Call) -> dict[str, str]:
    given = parse_qs(call.scope["query_string"].decode("latin-1"))
    return {name: values[-1] for name, values in given.items()}


def _number(query: dict[str, str], name: str, default: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise RequestError(f"{name}: must be a number", field=name)
    return int(text)
