# SPDX-License-Identifier: MIT
"""What ranks tell each other when they meet, and what keeps one out. Knows no sockets."""

import hmac
import os
import platform
import socket
from dataclasses import asdict, dataclass, fields
from typing import Any

from tokenspeed import __version__
from tokenspeed.execution.plan_view import LAYOUT_VERSION, STEP_VERSION


@dataclass(frozen=True)
class Hello:
    """A rank's first words. `config` is "" for a rank that takes rank 0's configuration."""

    rank: int
    token: str
    config: str = ""  # digest of what it was started with
    host: str = ""
    pid: int = 0
    version: str = ""
    layouts: str = ""
    machine: str = ""

    @classmethod
    def of_this_process(cls, rank: int, token: str, config: str = "", host: str = "") -> "Hello":
        """`host`: what ranks of this machine call it, if not its name."""
        layouts = f"plan {LAYOUT_VERSION}, step {STEP_VERSION}"
        host, machine = host or socket.gethostname(), platform.machine()
        return cls(rank, token, config, host, os.getpid(), __version__, layouts, machine)

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Hello":
        """`ValueError`: not a hello."""
        try:
            hello = cls(**facts)
        except TypeError as error:
            raise ValueError(f"not a hello: {error}") from None
        for f in fields(cls):
            if type(getattr(hello, f.name)) is not f.type:
                raise ValueError(f"not a hello: {f.name} must be of type {f.type}")
        return hello

    def same_token(self, other: "Hello") -> bool:
        """Whether both know the same token; takes as long either way."""
        return hmac.compare_digest(
            self.token.encode(errors="replace"), other.token.encode(errors="replace")
        )


def refusal(mine: Hello, other: Hello, num_ranks: int, present: set[int]) -> str | None:
    """Why `other` may not join rank 0's (`mine`) engine; None if it may."""
    if not mine.same_token(other):
        return "it does not know this engine's token"
    if not 0 < other.rank < num_ranks:
        return f"there is no rank {other.rank} among {num_ranks}"
    if other.rank in present:
        return f"there is a rank {other.rank} already"
    for name in ("version", "layouts", "machine"):
        ours, theirs = getattr(mine, name), getattr(other, name)
        if ours != theirs:
            return f"rank {other.rank} has {name} {theirs!r}, rank 0 has {ours!r}"
    if other.config and other.config != mine.config:
        return f"rank {other.rank} was started with other options than rank 0"
    return None
