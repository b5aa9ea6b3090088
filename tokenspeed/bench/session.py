# SPDX-License-Identifier: MIT
"""What is asked of a server: turns, sessions of turns, a workload of sessions. Shapes, no text.

A prompt is a row of block ids: equal ids are equal text, so two prompts share what their ids share
from the front. Knows no file format, no clock and no server; nothing here is checked (the readers
in `workloads/` refuse what is malformed).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One request and the answer that it is to get. Lengths in tokens, times in seconds."""

    prompt_blocks: tuple[int, ...]  # the whole blocks of the whole prompt
    input_tokens: int
    output_tokens: int
    gap_s: float  # from the end of the turn before (the session's start) to this one's sending
    kind: str  # "user": a person wrote it; "tool": a tool's result
    tail_tokens: int  # behind the last whole block
    cancel_after: int | None = None  # output tokens after which the client hangs up

    @property
    def total(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Session:
    """The turns of one agent in their order; `parent` is the session that started it."""

    session_id: str
    turns: tuple[Turn, ...]
    block_size: int  # tokens of a block
    start_s: float  # from the workload's start
    user: str
    parent: str | None

    @property
    def input_tokens(self) -> int:
        return sum(turn.input_tokens for turn in self.turns)

    @property
    def output_tokens(self) -> int:
        return sum(turn.output_tokens for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions by their start; lengths are already divided by `scale`."""

    name: str
    sessions: tuple[Session, ...]
    seed: int
    scale: float

    @property
    def num_turns(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    @property
    def top_level(self) -> tuple[Session, ...]:
        """Sessions that no other one of the workload started: those that arrive."""
        names = {session.session_id for session in self.sessions}
        return tuple(session for session in self.sessions if session.parent not in names)

    @property
    def input_tokens(self) -> int:
        return sum(session.input_tokens for session in self.sessions)

    @property
    def output_tokens(self) -> int:
        return sum(session.output_tokens for session in self.sessions)


def shared_blocks(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Blocks that two prompts share from the front."""
    shorter = min(len(before), len(after))
    if before[:shorter] == after[:shorter]:
        return shorter
    return next(i for i in range(shorter) if before[i] != after[i])
