# SPDX-License-Identifier: MIT
"""/dashboard: the page that shows what the server does, and the snapshots that it shows.

The page is files of the package and tells nothing of this server, so that a browser, which has no
key yet, may have it; it may load these files alone, and asks for the snapshots with a key that it
was given. Knows no field of a snapshot.
"""

import asyncio
import re
import time
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tokenspeed.errors import RequestError
from tokenspeed.gateway.api_error import ApiError, overloaded
from tokenspeed.gateway.app import Call, encode_json
from tokenspeed.gateway.generation import SSE_HEADERS
from tokenspeed.gateway.service import Service

LOOK_S = 1.0
STALL_S = 30.0  # who takes nothing for so long is dropped
MAX_VIEWERS = 32
_FOLDER = Path(__file__).with_name("dashboard_page")
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Its own files, this server's answers, and nothing else; no text ever becomes markup or a script.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


async def look_on(service: Service) -> None:
    """Takes a look every second, for as long as the server runs, whether anybody watches or not."""
    due = time.monotonic()
    while True:
        due = max(due + LOOK_S, time.monotonic())
        await asyncio.sleep(due - time.monotonic())
        await look(service)


async def look(service: Service) -> None:
    """One look at this gateway and the others."""
    siblings = service.siblings
    others = [] if siblings is None else await siblings.link.ask({"ask": "watch"})
    snapshot = service.watch.look(others)
    if service.show.num_viewers:
        service.show.put(_event("snapshot", snapshot))


async def page(service: Service, call: Call) -> None:
    """The page itself."""
    await _file(call, "page.html")


async def part(service: Service, call: Call) -> None:
    """A file that the page loads. Raises 404 for what is none."""
    await _file(call, call.path["file"])


async def _file(call: Call, name: str) -> None:
    found = _files().get(name)
    if found is None:
        raise ApiError(404, "the page has no such file", code="not_found")
    kind = _KINDS[Path(name).suffix]
    await call.reply(found, kind=f"{kind}; charset=utf-8", headers=_HEADERS)


async def events(service: Service, call: Call) -> None:
    """Server-sent events: the history, then a snapshot each second; `?count=N` ends after N."""
    left, show = _count(call), service.show
    if show.num_viewers >= MAX_VIEWERS:
        raise overloaded(f"{MAX_VIEWERS} watch already", "too_many_viewers", 5)
    await call.body()  # a GET has none: from here on it ends when the client leaves
    show.num_viewers += 1
    try:
        await call.start(200, "text/event-stream; charset=utf-8", SSE_HEADERS)
        await _send(call, _event("history", service.watch.past()))
        while left > 0:
            await _send(call, await show.next())
            left = 0 if service.pool.state in ("dead", "draining") else left - 1
    finally:
        show.num_viewers -= 1
    await call.send({"type": "http.response.body", "body": b""})


async def _send(call: Call, data: bytes) -> None:
    async with asyncio.timeout(STALL_S):
        await call.send({"type": "http.response.body", "body": data, "more_body": True})


def _event(name: str, value: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode_json(value))


def _count(call: Call) -> float:
    given = parse_qs(call.scope["query_string"].decode("latin-1")).get("count")
    if given is None:
        return float("inf")
    if not re.fullmatch(r"[0-9]{1,6}", given[-1]):
        raise RequestError("count: must be a whole number of snapshots", field="count")
    return int(given[-1])


@cache
def _files() -> dict[str, bytes]:
    """All of them, by name: what a client asks for is looked up here and never on the disk."""
    return {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _KINDS}
