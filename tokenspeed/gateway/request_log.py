# SPDX-License-Identifier: MIT
"""`RequestRecord`: what one request did, for logs, traces and sessions; and its line in the log.

Knows names, counts and times: never contents, keys or addresses. Times are of `time.monotonic`; 0
is what has not happened.
"""

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tokenspeed.engine.messages import Retention, TokenOutput

CLIENT_CLOSED = 499  # the status that is logged if nobody was left to answer
_BARE = re.compile(r"[A-Za-z0-9._:@/+-]+")

log = logging.getLogger("tokenspeed.requests")


@dataclass(slots=True)
class RequestRecord:
    """One request's way through the gateway. Whoever does a part of it writes that part."""

    id: str = ""
    route: str = ""
    model: str = ""
    tenant: str = ""
    session: str | None = None
    client: str = ""
    traceparent: str = ""  # the trace that the client says this belongs to
    arrived: float = field(default_factory=time.monotonic)
    identified: bool = False
    prompted: float = 0.0  # the prompt is rendered and made ids
    submitted: float = 0.0
    first: float = 0.0  # token
    last: float = 0.0
    first_call: float = 0.0  # the first tool call was recognised
    finished: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    num_prompt: int = 0
    num_expected: int = 0  # prompt tokens that the session had before
    num_cached: int = 0
    num_host: int = 0  # of those cached, in host memory
    num_output: int = 0  # as the answer counts them, at the end
    num_come: int = 0  # so far
    num_first: int = 0  # of these, with the first output
    num_choices: int = 1
    tps_floor: float | None = None  # None: the server's, 0: none
    num_steps: int = 0  # outputs that brought tokens
    num_drafted: int = 0  # tokens of drafts that were verified
    num_accepted: int = 0  # of these
    num_calls: int = 0
    finish: str = ""  # the choices' finish reasons
    reason: str = ""  # why the cache had no more
    status: int = 0
    error: str = ""
    # What the session keeps, and is never told of:
    salt: bytes = b""
    prompt_ids: Sequence[int] = ()
    output_ids: list[int] = field(default_factory=list)
    retention: Retention | None = None  # that the session has been given

    def submit(self, prompts: Sequence[Sequence[int]], salt: bytes) -> None:
        """The engine has been asked to go on with each prompt's ids."""
        self.submitted = time.monotonic()
        self.num_prompt = sum(map(len, prompts))
        self.prompt_ids, self.salt = prompts[0], salt

    def feed(self, index: int, output: TokenOutput) -> None:
        """Tokens have come for a choice."""
        if output.token_ids:
            self.last = time.monotonic()
            if not self.first:
                self.first, self.num_first = self.last, len(output.token_ids)
                self.num_cached = output.num_cached_tokens
            self.num_come += len(output.token_ids)
            self.num_steps += 1
            if index == 0 and self.session is not None:
                self.output_ids += output.token_ids
        if output.prefill_s:
            self.queue_s, self.prefill_s = output.queue_s, output.prefill_s
        self.num_drafted += output.num_draft_tokens
        self.num_accepted += output.num_accepted_tokens

    def call_seen(self) -> None:
        """The answer has a tool call in it."""
        self.first_call = self.first_call or self.last

    @property
    def tps(self) -> float:
        """Tokens per second after the first output; 0 if there is none."""
        later = self.num_output * (1 - 1 / self.num_steps) if self.num_steps > 1 else 0.0
        return later / (self.last - self.first) if self.last > self.first else 0.0

    @property
    def num_charged(self) -> int:
        """Tokens that count against a rate: the uncached prompt's and the output's.

        Of a request that ended before its first token it is not known what the cache had of it:
        that is taken to be what the session had before.
        """
        if not self.submitted:
            return 0
        known = self.num_cached if self.first else min(self.num_expected, self.num_prompt)
        return self.num_prompt - known + self.num_output


class Observer(Protocol):
    """Who is told of requests."""

    def begin(self, record: RequestRecord) -> None:
        """It is known who asks."""
        ...

    def finish(self, record: RequestRecord) -> None:
        """It is over, whichever way."""
        ...


class Journal:
    """Tells all observers."""

    def __init__(self, model: str = "", observers: Sequence[Observer] = ()) -> None:
        self.model = model
        self._observers = tuple(observers)

    def begin(self, record: RequestRecord) -> None:
        """Once for each record, whoever asks again."""
        if not record.identified:
            record.identified = True
            for observer in self._observers:
                observer.begin(record)

    def finish(self, record: RequestRecord) -> None:
        record.finished = time.monotonic()
        for observer in self._observers:
            observer.finish(record)


class RequestLog:
    """One line for each finished request, in logfmt: `key=value`, quoted where it must be."""

    def begin(self, record: RequestRecord) -> None:
        pass

    def finish(self, record: RequestRecord) -> None:
        if log.isEnabledFor(logging.INFO):
            log.info("%s", line(record))


def line(record: RequestRecord) -> str:
    """The record as text. What is not known is left out."""
    r = record
    pairs: dict[str, object] = {
        "id": r.id,
        "tenant": r.tenant,
        "session": r.session,
        "client": r.client,
        "route": r.route,
        "model": r.model,
        "status": r.status,
        "error": r.error,
        "finish": r.finish,
    }
    if r.submitted:
        pairs |= {"prompt": r.num_prompt, "cached": r.num_cached, "cached_host": r.num_host}
        pairs |= {"output": r.num_output, "calls": r.num_calls, "receipt": r.reason}
    if r.queue_s or r.prefill_s:
        pairs |= {"queue_ms": _ms(r.queue_s), "prefill_ms": _ms(r.prefill_s)}
    if r.first:
        pairs["ttft_ms"] = _ms(r.first - r.arrived)
        pairs["accepted_length"] = f"{r.num_output / r.num_steps:.2f}"
    if r.num_drafted:
        pairs |= {"drafts": r.num_drafted, "accepted": r.num_accepted}
    if r.tps:
        pairs["tps"] = f"{r.tps:.1f}"
    pairs["total_ms"] = _ms(r.finished - r.arrived)
    return " ".join(f"{k}={_value(v)}" for k, v in pairs.items() if v not in ("", None))


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def _value(value: object) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)
