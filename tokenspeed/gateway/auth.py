# SPDX-License-Identifier: MIT
"""Who may call what. Knows headers, hashed keys and roles; decides on the route that will answer.

Every route needs a key with one of its roles unless the route table says it is open. Without keys
the server trusts its listener; then, on loopback, the Host header must be a loopback name, so that
a web page cannot reach it through a name of its own (DNS rebinding).
"""

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Sequence

from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.limits import Limiter
from tokenspeed.gateway.tenants import Role, Tenant, TenantSpec, check_tenants, tenants_of_keys

_ANYBODY = Tenant()


class Keys:
    """The accepted keys, as SHA-256 digests only, and whose they are."""

    def __init__(
        self,
        keys: Sequence[str] = (),
        tenants: Sequence[TenantSpec] = (),
        secret: bytes | None = None,
    ) -> None:
        """`secret`: of salts and pseudonyms, the same in gateways that share engines."""
        self.secret = secret or secrets.token_bytes(32)
        self._of_options = tenants_of_keys(keys)
        self._limiters: dict[str, Limiter] = {}
        self._owners: list[tuple[bytes, Tenant]] = []
        self.replace(tenants)

    def __bool__(self) -> bool:
        return bool(self._owners)

    def replace(self, tenants: Sequence[TenantSpec]) -> None:
        """Other tenants beside those of the options. Whoever stays keeps its salt and its counts.

        Raises `ValueError`, with nothing changed, if they do not go together.
        """
        specs = [*self._of_options, *tenants]
        check_tenants(specs)
        made = [(spec, self._tenant(spec)) for spec in specs]
        self._owners = [(digest, tenant) for spec, tenant in made for digest in spec.digests]
        self._limiters = {tenant.name: tenant.limiter for _, tenant in made}

    def tenant(self, headers: list[tuple[bytes, bytes]]) -> Tenant:
        """Whose key it is; without keys, everybody's. Raises 401 for a missing or wrong key.

        Every key is compared in constant time, and all of them always.
        """
        if not self._owners:
            return _ANYBODY
        digest = hashlib.sha256(_presented(headers)).digest()
        found = [owner for key, owner in self._owners if hmac.compare_digest(key, digest)]
        if not found:
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found[0]

    def salt(self, tenant: bytes, cache_salt: str | None) -> bytes:
        """The prefix cache's salt: a client's own may only narrow what its key can share."""
        if cache_salt is None:
            return tenant[:16]
        framed = len(tenant).to_bytes(4, "little") + tenant + cache_salt.encode()
        return hmac.digest(self.secret, framed, "sha256")[:16]

    def pseudonym(self, *parts: str) -> str:
        """24 hex digits that stand for `parts` while this process lives, and tell nothing."""
        framed = b"".join(
            len(b).to_bytes(4, "little") + b for b in (p.encode(errors="replace") for p in parts)
        )
        return hmac.digest(self.secret, b"pseudonym" + framed, "sha256").hex()[:24]

    def _tenant(self, spec: TenantSpec) -> Tenant:
        kind, name = ("tenant", spec.name) if spec.group is None else ("group", spec.group)
        salt = hmac.digest(self.secret, f"{kind} {name}".encode(), "sha256")
        limiter = self._limiters.get(spec.name)
        if limiter is None:
            limiter = Limiter(spec.limits)
        else:
            limiter.set(spec.limits)
        return Tenant(spec.name, spec.roles, salt, limiter, spec.standing)


def check_role(tenant: Tenant, roles: tuple[Role, ...]) -> None:
    """Raises 403 unless the tenant has one of the roles."""
    if not set(roles) & set(tenant.roles):
        raise ApiError(
            403, f"this key does not have the role {' or '.join(roles)}", code="missing_role"
        )


def _presented(headers: list[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return b""


def check_host(headers: list[tuple[bytes, bytes]]) -> None:
    """Raises 403 unless the Host header, if there is one, names this machine itself."""
    for name, value in headers:
        if name != b"host":
            continue
        host = value.decode("latin-1").lower()
        host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if not _is_loopback(host):
            raise ApiError(
                403,
                "without an API key this server answers to localhost only; set --api-key",
                code="forbidden_host",
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
