# SPDX-License-Identifier: MIT
"""Recorded sessions, of whatever file format, made into `Session`s: ids, gaps, subagents.

A subagent is a session of its own whose parent is the one that started it. Knows no file; a reader
hands over each request as a `Recorded` and learns here what is wrong with the whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from reprlib import repr as brief
from typing import Any

from tokenspeed.bench.session import Session, Turn
from tokenspeed.bench.workloads import checks


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request as the file tells it; `new` are the file's ids behind `keep` blocks."""

    t_s: float  # from its session's or subagent's start
    input_tokens: int
    output_tokens: int
    keep: int  # blocks shared with the request before
    new: Sequence[int]
    think_s: float | None  # from the end of the request before
    api_s: float | None
    kind: str


# (where, what the file has, how many blocks the request before has)
Decode = Callable[[str, Any, tuple[int, ...]], Recorded]


@dataclass(slots=True)
class Ids:
    """A workload's own numbers for the files' block ids."""

    count: int = 0
    shared: dict[int, int] = field(default_factory=dict)  # of the global scope

    def of(self, known: dict[int, int], ids: Sequence[int]) -> tuple[int, ...]:
        found = []
        for block in ids:
            if block not in known:
                known[block] = self.count
                self.count += 1
            found.append(known[block])
        return tuple(found)


@dataclass(slots=True)
class Reading:
    """One recorded session while it is read."""

    ids: Ids
    known: dict[int, int]
    block_size: int
    user: str
    decode: Decode
    found: list[Session] = field(default_factory=list)

    def read(
        self, where: str, name: str, entries: Any, start_s: float, above: tuple[str, ...]
    ) -> None:
        """`above`: the sessions that this one stands in, outermost first."""
        if name in above:
            checks.refuse(where, f"{name!r} contains itself")
        turns: list[Turn] = []
        raw: tuple[int, ...] = ()
        blocks: tuple[int, ...] = ()
        last: Recorded | None = None
        for number, entry in enumerate(checks.objects(where, f"requests of {name!r}", entries), 1):
            here = f"{where}, request {number} of {name!r}"
            if isinstance(entry, dict) and "requests" in entry:
                self._subagent(here, entry, start_s, number, (*above, name))
                continue
            one = self.decode(here, entry, raw)
            self._check(here, one, last, len(blocks))
            raw = (*raw[: one.keep], *one.new)
            blocks = blocks[: one.keep] + self.ids.of(self.known, one.new)
            turns.append(self._turn(one, last, blocks))
            last = one
        if not turns:
            checks.refuse(where, f"{name!r} has no request of its own")
        parent = above[-1] if above else None
        made = Session(name, tuple(turns), self.block_size, start_s, self.user, parent)
        self.found.append(made)

    def _subagent(
        self, where: str, entry: checks.Json, start_s: float, number: int, above: tuple[str, ...]
    ) -> None:
        begun = checks.seconds(where, "t", checks.field(where, entry, "t"))
        agent = entry.get("agent_id", f"agent_{number:03}")
        if not isinstance(agent, str):
            checks.refuse(where, f"agent_id must be a string, not {brief(agent)}")
        # Numbered within its session: the same name further out is the same agent.
        name = f"{above[0]}/{checks.text(where, 'agent_id', agent)}"
        self.read(where, name, entry["requests"], start_s + begun, above)

    def _check(self, where: str, one: Recorded, last: Recorded | None, num_before: int) -> None:
        if last is not None and one.t_s < last.t_s:
            checks.refuse(where, f"t goes back from {last.t_s} to {one.t_s}")
        if one.keep > num_before:
            checks.refuse(where, f"keeps {one.keep} blocks where {num_before} were before: a hole")
        have, need = one.keep + len(one.new), one.input_tokens // self.block_size
        if have != need:
            checks.refuse(where, f"{have} blocks for {need} whole ones of its prompt: a hole")

    def _turn(self, one: Recorded, last: Recorded | None, blocks: tuple[int, ...]) -> Turn:
        if last is None:
            gap = one.t_s
        elif one.think_s is not None:
            gap = one.think_s
        else:  # requests of one session that overlap follow at once
            gap = max(0.0, one.t_s - last.t_s - (last.api_s or 0.0))
        tail = one.input_tokens - len(blocks) * self.block_size
        return Turn(blocks, one.input_tokens, one.output_tokens, gap, one.kind, tail)


def answer_tokens(where: str, value: Any, stop: Any) -> int:
    """Output tokens. 0 with no reason of its end: the answer was not recorded, and is one token."""
    if value == 0 and not stop:
        return 1
    return checks.whole(where, "output tokens", value, 1)
