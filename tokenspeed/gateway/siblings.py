# SPDX-License-Identifier: MIT
"""`Siblings`: which of several gateways serves a request. The one place that decides it.

What a gateway keeps of a conversation (ids of its turns, its session, stored responses, counts that
are limited) is in one process only, so a request must find the process that has it:

1. a tenant with limits has one gateway, by its name: then its counts are all in one place;
2. a request that names a response, an item or a session by id goes to who has it: they are asked;
3. a conversation goes by tenant and session, and one without a name by what the user said first.

Everything else is served where it came. Knows identities; how things travel is `handover.py`'s.
"""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import msgspec

from tokenspeed.gateway.app import Call, ClientGone, Home
from tokenspeed.gateway.handover import Link
from tokenspeed.gateway.identity import Hints, session_of
from tokenspeed.gateway.limits import Limits
from tokenspeed.text.history_keys import plain_text

_MAX_TEXT = 1 << 16  # of what the user said first

Question = dict[str, Any]


class _Body(msgspec.Struct):
    """What of a request's body says whose it is, whatever its dialect."""

    metadata: Any = None
    prompt_cache_key: Any = None
    previous_response_id: Any = None
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()

    @property
    def hints(self) -> Hints:
        return Hints(metadata=self.metadata, prompt_cache_key=self.prompt_cache_key)


_BODY = msgspec.json.Decoder(_Body)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])


class Siblings:
    """This gateway and the others. `has` says whether something is kept here."""

    def __init__(self, link: Link, has: Callable[[Question], bool]) -> None:
        self.link, self._has = link, has

    async def place(self, call: Call, home: Home) -> None:
        """Returns if the request is to be served here. Else it is given away: `ClientGone`."""
        if not home or call.scope["extensions"]["tokenspeed.connection"]["given"]:
            return
        owner = await self._owner(call, home)
        if owner is None or owner == self.link.number:
            return
        body = await call.peek()
        call.stop_watching()
        await self.link.give(owner, call.scope, body)
        raise ClientGone

    async def _owner(self, call: Call, home: Home) -> int | None:
        """The gateway that the request belongs to; None: any."""
        tenant = call.tenant.name
        if home == "first":
            return 0
        if home == "session":
            scope = None if "admin" in call.tenant.roles else tenant
            key = call.path["session"]
            return await self._who_has({"of": tenant, "scope": scope, "session": key})
        if home == "response":
            return await self._who_has({"of": tenant, "response": call.path["response_id"]})
        if call.tenant.limiter.limits != Limits():
            return self._number(b"tenant", tenant)
        headers = call.scope["headers"]
        session = session_of(headers, Hints())
        if session is not None and home != "items":
            return self._number(b"session", tenant, session)
        try:
            body = _BODY.decode(await call.peek())
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return None  # whose handler says what is wrong with it
        return await self._of_body(tenant, session_of(headers, body.hints), body, home)

    async def _of_body(
        self, tenant: str, session: str | None, body: _Body, home: Home
    ) -> int | None:
        if home == "items":
            wanted = _named(body)
            if wanted and (found := await self._who_has({"of": tenant} | wanted)) is not None:
                return found
        if session is not None:
            return self._number(b"session", tenant, session)
        if home != "named" and (text := _first_words(body)):
            return self._number(b"words", tenant, text)
        return None

    def _number(self, kind: bytes, *parts: str) -> int:
        digest = blake2b(digest_size=8, person=kind)
        for part in parts:
            data = part.encode(errors="replace")
            digest.update(len(data).to_bytes(8, "little") + data)
        return int.from_bytes(digest.digest(), "little") % self.link.count

    async def _who_has(self, question: Question) -> int | None:
        """The gateway that has it, this one first; None if nobody does."""
        if self._has(question):
            return self.link.number
        found = await self.link.ask({"ask": "has"} | question)
        return next((number for has, number in found if has), None)


def _named(body: _Body) -> Question:
    """What a Responses request refers to by an id, if it does."""
    if isinstance(body.previous_response_id, str):
        return {"response": body.previous_response_id}
    if b'"item_reference"' in bytes(body.input):
        for item in _items(body.input):
            if isinstance(item, dict) and item.get("type") == "item_reference":
                return {"item": str(item.get("id"))}
    return {}


def _first_words(body: _Body) -> str:
    """What the user said first; that stays, whatever else a client changes from turn to turn."""
    for source in (body.messages, body.input):
        for item in _items(source):
            if isinstance(item, str):
                return item[:_MAX_TEXT]
            if isinstance(item, dict) and item.get("role") == "user":
                content = item.get("content")
                text = plain_text(content)
                return (repr(content) if text is None else text)[:_MAX_TEXT]
    return ""


def _items(raw: msgspec.Raw) -> Any:
    """The items of a list one after the other, or the one text that stands for it."""
    if not bytes(raw):
        return
    try:
        for item in _LIST.decode(raw):
            yield msgspec.json.decode(item)
    except msgspec.DecodeError:
        text = msgspec.json.decode(raw)
        if isinstance(text, str):
            yield text
