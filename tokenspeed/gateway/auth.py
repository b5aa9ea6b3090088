# SPDX-License-Identifier: MIT
"""Who may call what. Knows headers and hashed keys; decides on the path that the router uses.

Every route needs a key unless the route table says it is open. Without keys the server trusts its
listener; then, on loopback, the Host header must be a loopback name, so that a web page cannot
reach it through a name of its own (DNS rebinding).
"""

import hashlib
import hmac
import ipaddress
import secrets

from tokenspeed.gateway.api_error import ApiError


class Keys:
    """The accepted keys, kept as SHA-256 digests only."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        if any(not key.strip() for key in keys):
            raise ValueError("api_key must not be empty")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._secret = secrets.token_bytes(32)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The caller's salt, empty if no keys are set. Raises 401 for a missing or wrong key.

        Every key is compared in constant time, and all of them always.
        """
        if not self._digests:
            return b""
        digest = hashlib.sha256(_presented(headers)).digest()
        found = [k for k in self._digests if hmac.compare_digest(k, digest)]
        if not found:
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return hmac.digest(self._secret, found[0], "sha256")

    def salt(self, tenant: bytes, cache_salt: str | None) -> bytes:
        """The prefix cache's salt: a client's own may only narrow what its key can share."""
        if cache_salt is None:
            return tenant[:16]
        framed = len(tenant).to_bytes(4, "little") + tenant + cache_salt.encode()
        return hmac.digest(self._secret, framed, "sha256")[:16]


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
