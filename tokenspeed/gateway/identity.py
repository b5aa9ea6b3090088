# SPDX-License-Identifier: MIT
"""`Caller`: who asks, as cache, fairness and limits need it. Knows headers and hints, no dialect.

Agents say who they are in many places; `caller_of` reads them in one order. Whatever a client sends
here only names: it is bounded, it counts within its own tenant, and of users only a pseudonym goes
further. A subagent is its owner's: it has a session of its own and its owner's share.
"""

import hashlib
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenspeed.engine.messages import Retention
from tokenspeed.errors import RequestError
from tokenspeed.gateway.request_log import RequestRecord
from tokenspeed.gateway.tenants import Tenant
from tokenspeed.gateway.urgency import Urgency, urgency_of

MAX_SESSION = 128  # characters; a longer name, or one of other characters, is hashed
MAX_PARENTS = 4096  # subagents' sessions whose owner is remembered
MAX_RETENTION_S = 24 * 3600

_PLAIN = re.compile(rb"[A-Za-z0-9._:@-]{1,%d}" % MAX_SESSION)
_USER_ID = re.compile(r"(.*)_session_(.*)", re.DOTALL)
_TIME = re.compile(r"([0-9]{1,7})([smh])")
_MAX_TEXT = 4096  # of what a client sends, which bounds the work on it
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_CLIENT = re.compile(rb"[A-Za-z][A-Za-z0-9_.-]{0,31}")
_CLAUDE_SESSION, _CLAUDE_AGENT = b"x-claude-code-session-id", b"x-claude-code-agent-id"
_SESSIONS = (
    b"session-id",
    b"session_id",
    b"x-session-id",
    b"x-session-affinity",
    b"x-opencode-session",
)
_PARENTS = (b"x-parent-session-id", b"x-codex-parent-thread-id")

Headers = list[tuple[bytes, bytes]]
Pseudonym = Callable[..., str]


@dataclass(frozen=True, slots=True)
class Hints:
    """What a request's body says of its sender, as it was sent; what has another type is nothing.

    `metadata` is Anthropic's object, of which `user_id` counts; `conversation` a text, or an object
    with an `id`. `priority` and `service_tier` have been checked for their types.
    """

    user: Any = None
    safety_identifier: Any = None
    metadata: Any = None
    prompt_cache_key: Any = None
    conversation: Any = None
    priority: int | None = None
    service_tier: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """`salt` keeps tenants' caches apart; `user` is who shares fairly; `session` a conversation.

    Tenants that share a cache have the same salt: what belongs to one of them goes by `tenant`.
    """

    salt: bytes = b""
    user: str = ""
    session: str | None = None
    tenant: str = ""
    retention: Retention | None = None  # that a header asks for
    urgency: Urgency = Urgency()
    client: str = ""  # the user agent's first word
    traceparent: str = ""  # as it was sent
    record: RequestRecord = field(default_factory=RequestRecord, compare=False)


class Owners:
    """Whose subagent a session is: the one at the root, for each tenant's last `MAX_PARENTS`."""

    def __init__(self) -> None:
        self._roots: defaultdict[str, OrderedDict[str, str]] = defaultdict(OrderedDict)

    def root(self, tenant: str, session: str, parent: str | None) -> str:
        """The session that `session` belongs to in the end; itself if it has no parent."""
        roots = self._roots[tenant]
        if parent is not None and parent != session:
            roots[session] = roots.get(parent, parent)
            if len(roots) > MAX_PARENTS:
                roots.popitem(last=False)
        if session not in roots:
            return session
        roots.move_to_end(session)
        return roots[session]


def caller_of(
    headers: Headers, tenant: Tenant, hints: Hints, owners: Owners, pseudonym: Pseudonym
) -> Caller:
    """Who asks. Raises `RequestError` for headers and hints that say nothing known.

    `pseudonym` makes texts into one that tells nothing of them. Who gives no user is known by the
    session's root, and else by the tenant.
    """
    given = dict(reversed(headers))  # of a header that comes twice the first one counts
    account, of_metadata = _user_id(hints.metadata)
    session, parent = _session(given, hints, of_metadata)
    user = _text(hints.user) or _text(hints.safety_identifier) or account
    if user is None and (one := session or parent) is not None:
        user = owners.root(tenant.name, one, parent)
    share = pseudonym("user", tenant.name, user or "")[:16] if user or tenant.name else ""
    return Caller(
        salt=tenant.salt,
        user=share,
        session=session,
        tenant=tenant.name,
        retention=retention_of(given.get(b"x-tokenspeed-retention")),
        urgency=urgency_of(given, tenant.standing, hints.priority, hints.service_tier),
        client=_client(given.get(b"user-agent", b"")),
        traceparent=given.get(b"traceparent", b"")[:128].decode("latin-1"),
    )


def session_of(headers: Headers, hints: Hints) -> str | None:
    """The session that a request names."""
    return _session(dict(reversed(headers)), hints, _user_id(hints.metadata)[1])[0]


def retention_of(given: bytes | None, name: str = "x-tokenspeed-retention") -> Retention | None:
    """`30s`, `30m`, `1h` or `pin`. Raises `RequestError` naming the field for anything else."""
    if given is None:
        return None
    text = given.decode("latin-1").strip().lower()
    if text == "pin":
        return Retention(pinned=True)
    seconds = seconds_of(text) or 0
    if not 0 < seconds <= MAX_RETENTION_S:
        raise RequestError(
            f"{name}: must be pin, or a time of at most 24h such as 90s, 30m or 1h", field=name
        )
    return Retention(float(seconds))


def seconds_of(text: str) -> int | None:
    """Of a time such as `90s`, `30m` or `1h`; None if it is none."""
    found = _TIME.fullmatch(text)
    return int(found[1]) * _SECONDS[found[2]] if found else None


def _session(
    given: dict[bytes, bytes], hints: Hints, of_metadata: str | None
) -> tuple[str | None, str | None]:
    """The session's name and its parent's, in the order in which clients' own names are trusted."""
    parent = next((name for h in _PARENTS if (name := _name(given.get(h)))), None)
    agent = _name(given.get(_CLAUDE_AGENT))
    found = (
        _name(given.get(_CLAUDE_SESSION))
        or _name(of_metadata)
        or next((name for h in _SESSIONS if (name := _name(given.get(h)))), None)
        or _name(hints.prompt_cache_key)
        or _name(_conversation(hints.conversation))
    )
    if found is not None and agent is not None:
        return _name(f"{found}:{agent}"), found
    return found, parent


def _conversation(value: Any) -> Any:
    return value.get("id") if isinstance(value, dict) else value


def _user_id(metadata: Any) -> tuple[str | None, str | None]:
    """Account and session in `metadata.user_id`: JSON, or `ACCOUNT_session_ID`, or just a user."""
    text = _text(metadata.get("user_id")) if isinstance(metadata, dict) else None
    if text is None:
        return None, None
    if text.startswith("{"):
        try:
            parts = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            return text, None
        names = ("account_uuid", "account_id", "user_id", "device_id")
        account = next((found for n in names if (found := _text(parts.get(n)))), None)
        return account, _text(parts.get("session_id"))
    cut = _USER_ID.fullmatch(text)
    return (cut[1] or None, cut[2] or None) if cut else (text, None)


def _text(value: Any) -> str | None:
    """A text that is not empty, and its beginning if it is long."""
    return value[:_MAX_TEXT] or None if isinstance(value, str) else None


def _name(value: Any) -> str | None:
    """A session's name: as it was sent if that is harmless, else a digest of it."""
    data = value.encode(errors="replace") if isinstance(value, str) else value
    if not isinstance(data, bytes) or not (data := data.strip()):
        return None
    if _PLAIN.fullmatch(data):
        return data.decode()
    return "h:" + hashlib.blake2b(data[:_MAX_TEXT], digest_size=16).hexdigest()


def _client(agent: bytes) -> str:
    """The first word of a user agent without its version: `codex_cli_rs`, `claude-cli`."""
    found = _CLIENT.match(agent)
    return found[0].decode().rstrip(".") if found else ""
