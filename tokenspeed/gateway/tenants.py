# SPDX-License-Identifier: MIT
"""Tenants and the file that names them. Knows names, digests of keys and limits, no requests.

    {"tenants": [{"name": "web", "keys": ["sha256:9f86..."], "roles": ["inference"],
                  "max_concurrency": 8, "requests_per_minute": 600, "tokens_per_minute": 2000000,
                  "priority": 0, "tps_floor": 70, "share_cache": false}]}

A key is given as its SHA-256 in hex or as it is; either way only the digest is kept, and no error
repeats one. `share_cache` is false for a prefix cache of the tenant's own, a name for one that all
tenants with this name share, or true for the group named `shared`.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from tokenspeed.gateway.limits import Limiter, Limits
from tokenspeed.gateway.urgency import (
    MAX_FLOOR,
    MAX_PRIORITY,
    Standing,
    is_floor,
    is_priority,
)

Role = Literal["inference", "metrics", "admin"]
ROLES: tuple[Role, ...] = ("inference", "metrics", "admin")
MAX_KEYS = 1024  # in all; each is compared on every request
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Tenant:
    """Who a key belongs to. `salt` keeps prefix caches apart; those who share one share it."""

    name: str = ""
    roles: tuple[Role, ...] = ROLES
    salt: bytes = b""
    limiter: Limiter = field(default_factory=lambda: Limiter(Limits()), compare=False)
    standing: Standing = Standing()


@dataclass(frozen=True)
class TenantSpec:
    """An entry of the file, checked. `digests` are SHA-256 of the keys."""

    name: str
    digests: tuple[bytes, ...]
    roles: tuple[Role, ...] = ROLES
    limits: Limits = Limits()
    group: str | None = None  # whose prefix cache it shares; None: nobody's
    standing: Standing = Standing()


class _Entry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    keys: list[str]
    roles: tuple[Role, ...] = ("inference",)
    max_concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    priority: int | None = None
    tps_floor: float | None = None
    share_cache: bool | str = False


class _File(msgspec.Struct, forbid_unknown_fields=True):
    tenants: list[_Entry]


_DECODER = msgspec.json.Decoder(_File)


def tenants_of_keys(keys: Sequence[str]) -> list[TenantSpec]:
    """A tenant with all roles for each key: key1, key2 and so on. `ValueError` for an empty one."""
    if any(not key.strip() for key in keys):
        raise ValueError("api_key must not be empty")
    return [TenantSpec(f"key{i}", (_digest(key),)) for i, key in enumerate(keys, 1)]


def read_tenants(path: str, *, paced: bool = True) -> list[TenantSpec]:
    """The file's tenants. `ValueError` naming the entry, or the file if it cannot be read.

    `paced`: the server keeps floors. Where it does not, a tenant that has one could ask nothing.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"tenants: cannot read {path}: {error.strerror or error}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"tenants: {path} has more than {_MAX_FILE_BYTES} bytes")
    try:
        entries = _DECODER.decode(data).tenants
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        why = str(error).replace("$.", "")
        raise ValueError(f"tenants: {path}: {why}") from None
    if not entries:
        raise ValueError(f"tenants: {path}: tenants is empty, so no key would be accepted")
    specs = [_spec(entry, f"tenants[{i}]") for i, entry in enumerate(entries)]
    check_tenants(specs)
    if not paced:
        _check_floorless(specs)
    return specs


def _check_floorless(specs: Sequence[TenantSpec]) -> None:
    for spec in specs:
        if (floor := spec.standing.tps_floor) is not None:
            raise ValueError(
                f"tenants: {spec.name!r} has a tps_floor of {floor:g}, and this server keeps no"
                " floors: it needs --tps-floor (or --max-queue-wait-s, to promise the others none)"
            )


def check_tenants(specs: Sequence[TenantSpec]) -> None:
    """`ValueError` if two share a name or a key, or if there are too many keys."""
    names: dict[str, int] = {}
    owners: dict[bytes, str] = {}
    for i, spec in enumerate(specs):
        if names.setdefault(spec.name, i) != i:
            raise ValueError(f"tenants: two are named {spec.name!r}")
        for digest in spec.digests:
            if digest in owners:
                both = f"{owners[digest]!r} and {spec.name!r}"
                raise ValueError(f"tenants: the same key is given twice, to {both}")
            owners[digest] = spec.name
    if len(owners) > MAX_KEYS:
        raise ValueError(f"tenants: at most {MAX_KEYS} keys, {len(owners)} are given")


def _spec(entry: _Entry, where: str) -> TenantSpec:
    if not _NAME.fullmatch(entry.name):
        raise ValueError(
            f"{where}.name must be 1 to 64 letters, digits, '.', '_' or '-': {entry.name[:80]!r}"
        )
    if not entry.keys:
        raise ValueError(f"{where}.keys is empty: {entry.name!r} could never be used")
    for i, key in enumerate(entry.keys):
        if not key.strip() or key != key.strip() or not key.isprintable():
            raise ValueError(f"{where}.keys[{i}] is empty or has blanks at an end")
    if not entry.roles:
        raise ValueError(f"{where}.roles is empty; known: {', '.join(ROLES)}")
    numbers = {name: getattr(entry, name) for name in Limits.__slots__}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{where}.{name} must be at least 1: {value}")
    standing = _standing(entry, where)
    group = "shared" if entry.share_cache is True else entry.share_cache or None
    if group is not None and not _NAME.fullmatch(group):
        raise ValueError(f"{where}.share_cache is no name of a group: {group[:80]!r}")
    roles = tuple(role for role in ROLES if role in entry.roles)
    digests = tuple(_key_digest(key) for key in entry.keys)
    return TenantSpec(entry.name, digests, roles, Limits(**numbers), group, standing)


def _standing(entry: _Entry, where: str) -> Standing:
    priority, floor = entry.priority, entry.tps_floor
    if priority is not None and not is_priority(priority):
        why = f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]: {priority}"
        raise ValueError(f"{where}.priority {why}")
    if floor is not None and not is_floor(floor):
        why = f"must be above 0 and at most {MAX_FLOOR:.0f} tokens per second: {floor}"
        raise ValueError(f"{where}.tps_floor {why}")
    return Standing(priority, floor)


def _key_digest(key: str) -> bytes:
    found = _DIGEST.fullmatch(key)
    return bytes.fromhex(found[1]) if found else _digest(key)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
