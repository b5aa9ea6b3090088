# SPDX-License-Identifier: MIT
"""`Application`: the ASGI entry. Routes, keys, limits and the one exception path; knows no dialect.

A handler gets a `Call` and either replies or raises. What it raises becomes the reply, whatever it
is. When the client goes away the handler is cancelled wherever it waits, and what it submitted is
aborted as its contexts close.
"""

import asyncio
import contextlib
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import msgspec
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from tokenspeed.gateway.api_error import ApiError, of_exception
from tokenspeed.gateway.auth import Keys, check_host, check_role
from tokenspeed.gateway.identity import Caller, Hints, Owners, caller_of
from tokenspeed.gateway.request_log import CLIENT_CLOSED, Journal, RequestRecord
from tokenspeed.gateway.tenants import Role, Tenant

BODY_TIMEOUT_S = 60.0
JSON_DEPTH = 64
JSON_VALUES = 1 << 18  # in a field: reading them holds the event loop
JSON_COMMAS = 1 << 20  # in a body: at least as many as it has values, less one
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

T = TypeVar("T")
Home = Literal["", "first", "session", "response", "named", "turn", "items"]
encode_json: Callable[[object], bytes] = msgspec.json.Encoder().encode

log = logging.getLogger("tokenspeed.gateway")


class ClientGone(Exception):  # noqa: N818
    """The client closed the connection before it had sent its request."""


@dataclass(slots=True)
class Call:
    """One HTTP request and the way to answer it."""

    scope: Scope
    receive: Receive
    send: Send
    max_body_bytes: int
    identify: "Callable[[Call, Hints], Caller]"
    settle: "Callable[[Call, RequestRecord], None]"
    tenant: Tenant = field(default_factory=Tenant)  # whose key it brought
    record: RequestRecord = field(default_factory=RequestRecord)
    path: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # that any answer carries
    status: int = 0  # of the answer, once it has begun
    ahead: bytes | None = None  # the body, if it was read before the handler wants it
    watcher: asyncio.Task[None] | None = None

    async def body(self) -> bytes:
        """The whole body. 413 if it is too long, 408 if it does not come; then watches the client.

        From here on this task is cancelled when the client goes away.
        """
        if self.ahead is not None:
            body, self.ahead = self.ahead, None
            return body
        headers = dict(self.scope["headers"])
        if int(headers.get(b"content-length", b"0")) > self.max_body_bytes:
            raise self._too_large()
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > self.max_body_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(408, "the request's body took too long", code="timeout") from None
        self.watcher = asyncio.create_task(self._watch(asyncio.current_task()))
        return b"".join(parts)

    async def peek(self) -> bytes:
        """The body, which the handler will get too."""
        if self.ahead is None:
            self.ahead = await self.body()
        return self.ahead

    def stop_watching(self) -> None:
        """The client's leaving is of no interest here any more."""
        if self.watcher is not None:
            self.watcher.cancel()
            self.watcher = None

    async def decode(self, decoder: "msgspec.json.Decoder[T]") -> T:
        """The body as `decoder` types it. Raises 400 naming the field, 415 for another type."""
        kind = dict(self.scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip()
        if kind.lower() != b"application/json":
            raise ApiError(415, "the content type must be application/json", code="content_type")
        return decode_json(await self.body(), decoder)

    @property
    def request_id(self) -> str | None:
        """The client's name for the request, if it sent one that can be repeated."""
        given = [v for n, v in self.scope["headers"] if n == b"x-request-id"]
        plain = len(given) == 1 and _REQUEST_ID.fullmatch(given[0])
        return given[0].decode() if plain else None

    @property
    def started(self) -> bool:
        """Whether the answer has begun."""
        return self.status != 0

    def caller(self, hints: Hints = Hints()) -> Caller:  # noqa: B008
        """Who asks, by headers and by what the body says. Raises 400 for a header that is wrong."""
        return self.identify(self, hints)

    def detach(self) -> Callable[[], None]:
        """The request outlives this call: it is over when what is returned is called."""
        record, self.record = self.record, RequestRecord()
        return lambda: self.settle(self, record)

    async def reply(
        self,
        body: bytes,
        status: int = 200,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Sends the whole answer."""
        await self.start(status, kind, {"content-length": str(len(body)), **(headers or {})})
        await self.send({"type": "http.response.body", "body": body})

    async def start(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.status = status
        pairs = [(b"content-type", kind.encode())]
        headers = self.headers | headers
        pairs += [(name.encode(), value.encode()) for name, value in headers.items()]
        if self.request_id is not None:
            pairs.append((b"x-request-id", self.request_id.encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _watch(self, task: "asyncio.Task[Any] | None") -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if task is not None:
            task.cancel()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"at most {self.max_body_bytes} bytes of body", code="body_too_large")


Handler = Callable[[Call], Awaitable[None]]


@dataclass(frozen=True)
class RouteSpec:
    """A row of the route table; `/openapi.json` and the tests of access read it too."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type | None = None
    open: bool = False  # needs no key
    admin: bool = False  # moves to the admin listener, if there is one
    roles: tuple[Role, ...] = ("inference",)  # of which a key must have one
    metered: bool = False  # counts against limits, and is logged: it makes the engine work
    home: Home = ""  # which of several gateways serves it (`siblings.py`)
    failure: Callable[[ApiError], bytes] = ApiError.body  # an error's JSON, here and below the path


class Application:
    """ASGI application over a route table."""

    def __init__(
        self,
        table: Sequence[RouteSpec],
        keys: Keys,
        *,
        loopback: bool,
        max_body: int,
        journal: Journal | None = None,
        place: "Callable[[Call, Home], Awaitable[None]] | None" = None,
    ) -> None:
        """`place` returns if a request is served here; else it was given away: `ClientGone`."""
        self.table = tuple(table)
        self._place = place
        self._keys, self._loopback, self._max_body = keys, loopback, max_body
        self._journal = journal or Journal()
        self._owners = Owners()
        self._routes = [
            (spec, Route(spec.path, _unused, methods=[spec.method])) for spec in self.table
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"unexpected scope {scope['type']}")
        call = Call(scope, receive, send, self._max_body, self._identify, self._settle)
        try:
            await self._handle(call)
        except (ClientGone, asyncio.CancelledError):
            pass  # nobody is left to answer
        except Exception as error:
            await self._answer(call, error)
        finally:
            call.stop_watching()
            self._settle(call, call.record)

    async def _handle(self, call: Call) -> None:
        if self._loopback and not self._keys:
            check_host(call.scope["headers"])
        spec = self._match(call)
        if spec is None or not spec.open:
            call.tenant = self._keys.tenant(call.scope["headers"])
        if spec is None:
            raise self._no_route(call.scope)
        if not spec.open:
            check_role(call.tenant, spec.roles)
        if self._place is not None:
            await self._place(call, spec.home)
        if not spec.metered:
            await spec.handler(call)
            return
        self._record(call, spec)
        async with call.tenant.limiter.slot():
            await spec.handler(call)

    def _record(self, call: Call, spec: RouteSpec) -> None:
        """From here on the request will be told of, however it ends."""
        record = call.record
        record.id = call.request_id or secrets.token_hex(8)
        record.route = spec.path.removeprefix("/v1").removeprefix("/")
        record.model, record.tenant = self._journal.model, call.tenant.name

    def _identify(self, call: Call, hints: Hints) -> Caller:
        headers, record = call.scope["headers"], call.record
        caller = caller_of(headers, call.tenant, hints, self._owners, self._keys.pseudonym)
        record.session, record.client = caller.session, caller.client
        record.traceparent = caller.traceparent
        if record.route:
            self._journal.begin(record)
        retention = caller.retention or record.retention
        return replace(caller, record=record, retention=retention)

    def _settle(self, call: Call, record: RequestRecord) -> None:
        """The request is over: it is charged, and told of, if it is metered."""
        if not record.route:
            return
        record.status = call.status or CLIENT_CLOSED
        call.tenant.limiter.charge(record.num_charged)
        self._journal.finish(record)

    def _match(self, call: Call) -> RouteSpec | None:
        for spec, route in self._routes:
            match, child = route.matches(call.scope)
            if match is Match.FULL:
                call.path = child.get("path_params", {})
                return spec
        return None

    def _no_route(self, scope: Scope) -> ApiError:
        allowed = {
            spec.method for spec, route in self._routes if route.matches(scope)[0] is Match.PARTIAL
        }
        if allowed:
            headers = {"allow": ", ".join(sorted(allowed))}
            return ApiError(405, "method not allowed", code="method_not_allowed", headers=headers)
        return ApiError(404, "there is no such route", code="not_found")

    async def _answer(self, call: Call, error: Exception) -> None:
        answer = of_exception(error)
        call.record.error = answer.code
        if answer.status == 500:
            log.error("a request failed", exc_info=error)
        if call.started:
            return  # uvicorn closes the connection: the answer is cut short, visibly
        body = self._failure(call.scope["path"])(answer)
        with contextlib.suppress(asyncio.CancelledError):
            await call.reply(body, answer.status, headers=answer.headers)

    def _failure(self, path: str) -> Callable[[ApiError], bytes]:
        """The look of errors on a path, whether there is a route or not."""
        for spec in self.table:
            if f"{path}/".startswith(f"{spec.path}/") and spec.failure is not ApiError.body:
                return spec.failure
        return ApiError.body


def _unused() -> None:
    """Starlette's router wants an endpoint; this application calls the handlers itself."""


def decode_json(body: bytes, decoder: "msgspec.json.Decoder[T]") -> T:
    """Typed JSON. Every way in which it can be wrong is a 400, naming the field if it has one.

    What could be too many values to make is not read at all.
    """
    if body.count(b",") > JSON_COMMAS:
        why = f"the body has more than {JSON_COMMAS} commas"
        raise ApiError(400, why, code="json_too_large")
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            # Python's reader takes NaN and Infinity, which lets the field's own check name it.
            return msgspec.convert(_lenient(body), decoder.type)
    except msgspec.ValidationError as error:
        why, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        raise ApiError(400, f"{param or 'body'}: {why}", param=param, code="invalid_type") from None
    except UnicodeError:
        raise ApiError(400, "the body is not valid UTF-8", code="invalid_unicode") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="json_too_deep") from None
    except ValueError as error:
        why = str(error).partition("\n")[0][:100]
        raise ApiError(400, f"the body is not JSON: {why}", code="invalid_json") from None


def _lenient(body: bytes) -> Any:
    value = json.loads(body)
    msgspec.json.encode(value)  # UnicodeError for lone surrogates, which no answer could repeat
    return value


def check_depth(value: Any, field_name: str) -> None:
    """Raises 400 for JSON nested deeper than any real message, which templates would recurse on.

    And for JSON of more values than any real conversation has.
    """
    level, depth, count = [value], 0, 0
    while level:
        depth += 1
        count += len(level)
        if count > JSON_VALUES:
            why = f"{field_name}: more than {JSON_VALUES} values"
            raise ApiError(400, why, param=field_name, code="json_too_large")
        if depth > JSON_DEPTH:
            raise ApiError(
                400, f"{field_name}: nested too deeply", param=field_name, code="json_too_deep"
            )
        below: list[Any] = []
        for item in level:
            kind = type(item)  # quicker than isinstance: this looks at all of a long conversation
            if kind is dict:
                below += item.values()
            elif kind is list:
                below += item
        level = below
