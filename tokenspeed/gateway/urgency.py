# SPDX-License-Identifier: MIT
"""`Urgency`: how soon and how fast a request wants its answer. Knows fields and headers, no clock.

Every dialect has the fields `priority` and `service_tier` and the same two headers. A tenant of the
file has a standing, which is what its requests are given unasked, and the most that they may ask.
Refuses to know what a floor costs and who is passed: that is the engine's.
"""

import re
from dataclasses import dataclass

from tokenspeed.config import MAX_PRIORITY as MAX_PRIORITY
from tokenspeed.config import MAX_TPS_FLOOR
from tokenspeed.errors import RequestError

MAX_FLOOR = MAX_TPS_FLOOR
MAX_WAIT_S = 24 * 3600.0
SOONER, LATER = -10, 10  # the priorities of the tiers `priority` and `flex`
FLOOR_HEADER, WAIT_HEADER = "x-tokenspeed-tps-floor", "x-tokenspeed-max-wait-s"
PLAIN_TIERS = ("auto", "default", "standard_only")  # the last is Anthropic's word
TIERS = (*PLAIN_TIERS, "flex", "priority")

_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")


@dataclass(frozen=True, slots=True)
class Standing:
    """What a tenant's requests are given unasked, and the most they may ask; None: no word."""

    priority: int | None = None
    tps_floor: float | None = None


@dataclass(frozen=True, slots=True)
class Urgency:
    """As `GenerateRequest` has it. `tier` is the one that the request is served in."""

    tps_floor: float | None = None  # tokens per second; None: the server's, 0: none
    priority: int = 0  # lower is sooner
    max_wait_s: float | None = None
    tier: str = "default"


def is_floor(value: float) -> bool:
    """Whether a stream can be promised so many tokens per second; NaN is no number of them."""
    return 0 < value <= MAX_FLOOR


def is_priority(value: int) -> bool:
    return -MAX_PRIORITY <= value <= MAX_PRIORITY


def urgency_of(
    headers: dict[bytes, bytes], own: Standing, priority: int | None = None, tier: str | None = None
) -> Urgency:
    """`priority` and `tier` are the body's. Raises `RequestError` naming the field or the header.

    A number that says more than the tenant's own is refused; a tier is as much of it as there is.
    """
    if tier is not None and tier not in TIERS:
        _refuse("service_tier", f"must be one of {', '.join(TIERS)}")
    given, served = _by_tier(own, tier)
    floor = 0.0 if tier == "flex" else own.tps_floor
    if priority is not None:
        given = _asked_priority(priority, own)
    if (asked := _number(headers, FLOOR_HEADER)) is not None:
        floor = _asked_floor(asked, own)
    wait_s = _number(headers, WAIT_HEADER)
    if wait_s is not None and wait_s > MAX_WAIT_S:
        _refuse(WAIT_HEADER, f"must be a number of seconds, at most {MAX_WAIT_S:.0f}")
    return Urgency(floor, given, wait_s, served)


def _by_tier(own: Standing, tier: str | None) -> tuple[int, str]:
    """The priority that goes with a tier, and the tier that this makes of it."""
    default = own.priority or 0
    if tier == "flex":
        return max(default, LATER), "flex"
    if tier != "priority" or (own.priority is not None and own.priority > SOONER):
        return default, "default"
    return min(default, SOONER), "priority"


def _asked_priority(asked: int, own: Standing) -> int:
    if not is_priority(asked):
        _refuse("priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]; lower is sooner")
    if own.priority is not None and asked < own.priority:
        _refuse("priority", f"this key's requests have {own.priority}, and may only ask for later")
    return asked


def _asked_floor(asked: float, own: Standing) -> float:
    if not is_floor(asked):
        why = f"must be a number of tokens per second, above 0 and at most {MAX_FLOOR}"
        _refuse(FLOOR_HEADER, why)
    if own.tps_floor is not None and asked > own.tps_floor:
        _refuse(FLOOR_HEADER, f"this key's requests have {own.tps_floor:g}, and may ask for less")
    return asked


def _number(headers: dict[bytes, bytes], name: str) -> float | None:
    """What a header says. Digits alone: `nan`, `1e9` and `-1` are none."""
    if (given := headers.get(name.encode())) is None:
        return None
    text = given.decode("latin-1").strip()
    if not _NUMBER.fullmatch(text):
        _refuse(name, "must be a number such as 70 or 0.5")
    return float(text)


def _refuse(field: str, why: str) -> None:
    raise RequestError(f"{field}: {why}", field=field)
