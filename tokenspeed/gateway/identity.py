# SPDX-License-Identifier: MIT
"""`Caller`: who asks, as cache, fairness and limits need it. Knows headers and keys, no dialect."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """`salt` keeps tenants' caches apart; `user` is who shares fairly; `session` a conversation."""

    salt: bytes = b""
    user: str = ""
    session: str | None = None
