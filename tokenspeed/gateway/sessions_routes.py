# SPDX-License-Identifier: MIT
"""/v1/sessions: who is there, and what their caches hold. Knows JSON shapes, keeps nothing.

A tenant sees its own sessions only; the role admin sees everybody's. What belongs to another tenant
is answered like what does not exist.
"""

from typing import Any

import msgspec

from tokenspeed.engine.messages import Retention
from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.app import Call, decode_json, encode_json
from tokenspeed.gateway.identity import retention_of
from tokenspeed.gateway.service import Service
from tokenspeed.gateway.sessions import Session


class PinRequest(msgspec.Struct):
    """POST /v1/sessions/{id}/pin. `retention` is `pin`, a time such as 30m, or `none`."""

    retention: str = "pin"


_PIN = msgspec.json.Decoder(PinRequest)


async def list_sessions(service: Service, call: Call) -> None:
    found = sessions_of(service, _scope(call))
    if service.siblings is not None:
        others = await service.siblings.link.ask({"ask": "sessions", "scope": _scope(call)})
        found = sorted((one for some in (found, *others) for one in some), key=_age)
    await call.reply(encode_json({"object": "list", "data": found}))


async def get_session(service: Service, call: Call) -> None:
    await call.reply(encode_json(_shape(service, _session(service, call))))


async def pin_session(service: Service, call: Call) -> None:
    """Keeps what the session has cached, and what its later turns will add."""
    session = _session(service, call)
    body = await call.body()
    wish = decode_json(body, _PIN).retention if body.strip() else "pin"
    retention = None if wish == "none" else retention_of(wish.encode(), "retention")
    ids, salt = _ids(session), session.salt
    num_pages = await service.pool.retain(ids, salt, retention or Retention())
    session.pinned = retention is not None and retention.pinned
    await call.reply(encode_json(_shape(service, session) | {"pages": num_pages}))


async def drop_session(service: Service, call: Call) -> None:
    """Drops what of the session's cache nothing else uses, and forgets the session."""
    session = _session(service, call)
    ids, salt = session.token_ids, session.salt
    num_pages = await service.pool.release(ids, salt) if ids else 0
    service.sessions.drop(session)
    done: dict[str, Any] = {"id": session.id, "object": "session", "deleted": True}
    await call.reply(encode_json(done | {"pages": num_pages}))


def sessions_of(service: Service, scope: str | None) -> list[dict[str, Any]]:
    """A tenant's sessions here, or everybody's for None; the one seen last comes first."""
    return [_shape(service, one) for one in service.sessions.of(scope)]


def find_session(service: Service, tenant: str, scope: str | None, key: str) -> Session | None:
    """By the tenant's own name for it, else by id among those that `scope` is allowed to see."""
    return service.sessions.find(tenant, key) or service.sessions.find(scope, key)


def _age(shape: dict[str, Any]) -> float:
    return -float(shape["last_seen"])


def _scope(call: Call) -> str | None:
    """Whose sessions the caller may see: None is everybody's."""
    return None if "admin" in call.tenant.roles else call.tenant.name


def _session(service: Service, call: Call) -> Session:
    found = find_session(service, call.tenant.name, _scope(call), call.path["session"])
    if found is None:
        raise ApiError(404, "there is no such session", param="session", code="session_not_found")
    return found


def _ids(session: Session) -> list[int]:
    if ids := session.token_ids:
        return ids
    raise ApiError(
        409, "what this session has cached is not known", param="session", code="session_unknown"
    )


def _shape(service: Service, session: Session) -> dict[str, Any]:
    page = service.pool.ready.page_size if service.pool.ready else 1
    in_pages = max(0, session.num_context - 1) // page * page  # a last token is not computed
    return {
        "id": session.id,
        "object": "session",
        "session": session.name,
        "tenant": session.tenant,
        "state": "running" if session.num_running else "idle",
        "client": session.client,
        "model": session.model,
        "route": session.route,
        "turns": session.num_turns,
        "context_tokens": session.num_context,
        "kv_tokens": in_pages,
        "hit_rate": session.hit_rate,
        "output_tokens": session.num_output,
        "tps_last": round(session.tps_last, 2),
        "tps_mean": round(session.tps_mean, 2),
        "pinned": session.pinned,
        "first_seen": round(session.first_seen, 3),
        "last_seen": round(session.last_seen, 3),
    }
