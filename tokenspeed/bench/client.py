# SPDX-License-Identifier: MIT
"""`StreamClient`: one request to an endpoint, its answer read as it streams into a record.

Knows HTTP and server-sent events. Knows no sessions, no schedule, and never sends anything twice.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from reprlib import repr as brief
from typing import Any
from urllib.parse import quote

import httpx

from tokenspeed.bench.dialects import Ask, Delta, Json, Usage, dialect_of
from tokenspeed.bench.records import RequestRecord

Clock = Callable[[], float]
REFUSED = (429, 503, 529)
_SENT = ("http11.send_request_body.complete", "http2.send_request_body.complete")
_MAX_ERROR = 500  # characters of an endpoint's words that a record keeps
_MOST_PROMPT = 2**31 - 1  # tokens; no model reads more
# Where servers tokenize and how they call the text: vLLM and TokenSpeed, llama.cpp,
# llama-cpp-python.
_TOKENIZERS = (("/tokenize", "prompt"), ("/tokenize", "content"), ("/extras/tokenize", "input"))
_TOKENIZING_S = 30.0
_PLAIN = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}"  # what a name in a header may have besides letters


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server to measure. `base_url` with or without `/v1` at its end; `model` None: its first.

    `extra` are further fields of every body, `headers` further headers (a floor, a key of
    another kind). `token_counts` False: a server that refuses `continuous_usage_stats`.
    """

    name: str
    base_url: str
    model: str | None = None
    dialect: str = "chat"
    api_key: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    token_counts: bool = True

    def __post_init__(self) -> None:
        dialect_of(self.dialect)
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: must be an http URL, got {self.base_url!r}")
        try:
            httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url: {error}") from error
        try:
            httpx.Headers(self.signed())
        except UnicodeEncodeError as error:
            raise ValueError(f"headers: {error}") from error

    @property
    def root(self) -> str:
        """The URL that paths such as `/v1/models` are put behind."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    def signed(self) -> dict[str, str]:
        """Headers that say who asks, and those that were asked for."""
        key = self.api_key
        signed = {"authorization": f"Bearer {key}", "x-api-key": key} if key else {}
        return signed | self.headers


@dataclass(frozen=True, slots=True)
class Answer:
    """What a later turn needs of an answer, and whether the connection broke on the way."""

    text: str
    broken: bool


class StreamClient:
    """Requests to one endpoint. `clock` gives the run's seconds; `stall_s` of silence are an
    error."""

    def __init__(
        self, endpoint: Endpoint, http: httpx.AsyncClient, clock: Clock, stall_s: float = 600.0
    ) -> None:
        self.endpoint = endpoint
        self._dialect = dialect_of(endpoint.dialect)
        self._http, self._clock = http, clock
        self._timeout = httpx.Timeout(stall_s, connect=10.0, pool=None)
        self._headers = {
            "accept-encoding": "identity",
            "anthropic-version": "2023-06-01",
            **endpoint.signed(),
        }

    async def send(self, ask: Ask, record: RequestRecord, dictated: str | None = None) -> Answer:
        """Sends one request and fills its record; whatever goes wrong is in the record.

        `dictated` is the text that the answer shall be, cut or repeated to `max_tokens` tokens.
        After `ask.cancel_after` tokens it hangs up. Cancelled, the record is too, with what came.
        """
        reading, broken = _Reading(record), False
        record.sent_s = self._clock()
        try:
            if dictated is not None:
                ask = replace(ask, forced_ids=await self._dictation(ask, dictated))
            body = json.dumps(self._dialect.body(ask) | self.endpoint.extra).encode()
            record.sent_s = self._clock()
            async with self._http.stream(
                "POST",
                self.endpoint.root + self._dialect.path,
                content=body,
                headers=self._headers | _headers_of(ask),
                timeout=self._timeout,
                extensions={"trace": self._tracer(record)},
            ) as reply:
                await self._read(reply, reading, ask)
        except httpx.HTTPError as error:
            broken = True
            reading.fail(f"{type(error).__name__}: {error}")
        except BaseException:
            record.status = "cancelled"
            raise
        finally:
            record.end_s = self._clock()
            reading.settle(self._dialect.usage(reading.usage))
        return Answer("".join(reading.texts), broken)

    def _tracer(self, record: RequestRecord) -> Callable[[str, Any], Any]:
        async def trace(event: str, info: Any) -> None:
            if event in _SENT:
                record.sent_s = self._clock()

        return trace

    async def _read(self, reply: httpx.Response, reading: "_Reading", ask: Ask) -> None:
        record = reading.record
        record.http_status = reply.status_code
        if reply.status_code != 200:
            await reply.aread()
            record.status = "refused" if reply.status_code in REFUSED else "error"
            record.error = reply.text[:_MAX_ERROR]
            record.retry_after_s = _seconds(reply.headers.get("retry-after"))
            return
        events = EventReader()
        async for piece in reply.aiter_bytes():
            now = self._clock()
            for event in events.feed(piece):
                reading.take(self._delta(event, reading.usage, ask.max_tokens), now)
            if ask.cancel_after is not None and reading.num_tokens >= ask.cancel_after:
                record.status = "cancelled"
                return
        if not reading.ended:
            reading.fail("the stream ended before the answer did")

    def _delta(self, event: Json, known: Json, most: int) -> Delta:
        """`known`: usage of the events before. An answer has at most `most` tokens."""
        try:
            delta = self._dialect.read(event)
            told = self._dialect.usage(known | _said(delta.usage))
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise httpx.DecodingError(f"an event of another shape: {brief(event)}") from error
        for numbers, limit in (
            ((told.prompt, told.cached), _MOST_PROMPT),
            ((told.output, delta.num_tokens), most),
        ):
            for number in numbers:
                _check_count(number, limit)
        if not isinstance(delta.text, str):
            raise httpx.DecodingError(f"an event says {brief(delta.text)}")
        return delta

    async def first_model(self) -> str:
        """The name of the first model that the endpoint lists. Raises `httpx.HTTPError`, and
        `LookupError`, `TypeError` or `ValueError` for a list of another shape."""
        reply = await self._http.get(f"{self.endpoint.root}/v1/models", headers=self._headers)
        reply.raise_for_status()
        try:
            name = str(reply.json()["data"][0]["id"])
        except RecursionError as error:
            raise httpx.DecodingError("nested too deeply") from error
        name.encode()  # a ValueError: what is no text cannot be sent back
        return name

    async def tokenize(self, text: str, model: str | None = None) -> list[int]:
        """The ids of a text by the endpoint's own tokenizer, with no token added in front.

        Raises `httpx.HTTPError`, also where the endpoint knows none of the ways to ask.
        """
        said = []
        for path, name in _TOKENIZERS:
            body: dict[str, Any] = {name: text} | ({"model": model} if model else {})
            body |= {"add_special_tokens": False} if name == "prompt" else {}
            reply = await self._http.post(
                self.endpoint.root + path, json=body, headers=self._headers, timeout=_TOKENIZING_S
            )
            ids = _ids(reply)
            if ids is not None and (ids or not text):
                return ids
            said.append(f"{path} with {name!r}: HTTP {reply.status_code}")
        raise httpx.HTTPError(f"does not tokenize ({'; '.join(said)})")

    async def _dictation(self, ask: Ask, text: str) -> tuple[int, ...]:
        ids = await self.tokenize(text, ask.model)
        return tuple((ids * -(-ask.max_tokens // max(1, len(ids))))[: ask.max_tokens])

    async def is_alive(self) -> bool:
        """Whether anything answers at all."""
        try:
            await self._http.get(f"{self.endpoint.root}/health", timeout=10.0)
        except httpx.HTTPError:
            return False
        return True


class EventReader:
    """Bytes in, however they are cut; the JSON objects of the events that are whole out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[Json]:
        """Raises `httpx.DecodingError` for an event that is no JSON object."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            try:
                event = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise httpx.DecodingError(f"an event is not JSON: {data[:80]!r}") from error
            if not isinstance(event, dict):
                raise httpx.DecodingError(f"an event is not an object: {data[:80]!r}")
            yield event


class _Reading:
    """An answer on its way into its record."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.usage: Json = {}
        self.texts: list[str] = []
        self.ended = False
        self.num_tokens = 0  # as the events tell or, where they do not, as many as there were
        self._tells = False

    def take(self, delta: Delta, now: float) -> None:
        """An event that arrived at `now`."""
        if delta.error is not None:
            self.fail(delta.error)
        self.usage |= _said(delta.usage)
        if delta.text:
            self.texts.append(delta.text)
        if delta.carries and self.record.first_token_s is None:
            self.record.first_token_s = now
        self._count(delta, now)
        self.ended |= delta.ended

    def _count(self, delta: Delta, now: float) -> None:
        # A server that tells only at the end puts all tokens into its last event: not believed.
        self._tells |= delta.num_tokens is not None and not delta.ended
        gained = int(delta.carries)
        if self._tells and delta.num_tokens is not None:
            gained = delta.num_tokens - self.num_tokens
        if gained > 0:
            self.num_tokens += gained
            self.record.token_times.append(now)
            self.record.token_counts.append(gained)

    def fail(self, error: str) -> None:
        """The first cause counts."""
        self.ended = True
        if self.record.status == "ok":
            # JSON may hold halves of characters, which no file and no terminal takes.
            words = error[:_MAX_ERROR].encode(errors="replace").decode()
            self.record.status, self.record.error = "error", words

    def settle(self, usage: Usage) -> None:
        """What the endpoint says of its tokens; of an answer that it does not, what was seen."""
        record = self.record
        record.input_tokens = usage.prompt or record.input_tokens
        record.cached_tokens = usage.cached
        record.output_tokens = max(usage.output or 0, self.num_tokens)


def _said(usage: Json) -> Json:
    """Without what an event leaves open: others tell it."""
    return {name: value for name, value in usage.items() if value is not None}


def _check_count(number: Any, most: int) -> None:
    if number is None:
        return
    if type(number) is not int or number < 0:
        raise httpx.DecodingError(f"an event counts {brief(number)} tokens")
    if number > most:
        raise httpx.DecodingError(f"an event counts {brief(number)} tokens of at most {most}")


def _headers_of(ask: Ask) -> dict[str, str]:
    parent = {} if ask.parent is None else {"x-parent-session-id": quote(ask.parent, _PLAIN)}
    session = {"x-session-id": quote(ask.session, _PLAIN)}
    return {"content-type": "application/json"} | session | parent


def _ids(reply: httpx.Response) -> list[int] | None:
    """Of a reply that has them."""
    try:
        tokens = reply.json()["tokens"] if reply.status_code == 200 else None
        return [int(token) for token in tokens] if isinstance(tokens, list) else None
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
        return None


def _seconds(given: str | None) -> float | None:
    """Of a Retry-After that is a number of seconds; others are not there."""
    try:
        seconds = None if given is None else float(given)
    except ValueError:
        return None
    return seconds if seconds is not None and 0 <= seconds < math.inf else None
