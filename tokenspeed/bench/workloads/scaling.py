# SPDX-License-Identifier: MIT
"""A workload for a smaller machine: every length divided by one number, every ratio kept.

A block gets fewer tokens and stays a block, so the prefix structure is untouched; times stay too.
Knows no source.
"""

import math
from dataclasses import replace

from tokenspeed.bench.session import Session, Turn, Workload


def scaled(workload: Workload, scale: float) -> Workload:
    """All lengths divided by `scale`; by the next number that leaves whole tokens in a block.

    What it really is stands in `Workload.scale`: with blocks of 64 tokens, 10 becomes 64 / 6. An
    answer, and a prompt, keeps at least one token. Raises ValueError if `scale` is not finite, less
    than 1, or leaves less than one token of a block.
    """
    if not (math.isfinite(scale) and scale >= 1):
        raise ValueError(f"scale must be at least 1 and finite, not {scale}")
    if workload.scale != 1:
        raise ValueError(f"scale: {workload.name} is already divided by {workload.scale}")
    sizes = {session.block_size for session in workload.sessions}
    if len(sizes) != 1:
        raise ValueError(f"scale: blocks of one size are needed, not of {sorted(sizes)}")
    size = sizes.pop()
    if scale > size:
        raise ValueError(f"scale must be at most {size}, the tokens of a block, not {scale}")
    part = round(size / scale)
    if part == size:
        return workload
    sessions = tuple(_session(session, part) for session in workload.sessions)
    return replace(workload, sessions=sessions, scale=size / part)


def _session(session: Session, part: int) -> Session:
    turns = tuple(_turn(turn, part, session.block_size) for turn in session.turns)
    return replace(session, turns=turns, block_size=part)


def _turn(turn: Turn, part: int, size: int) -> Turn:
    def least_one(tokens: int) -> int:
        return max(1, round(tokens * part / size))

    tail = turn.tail_tokens * part // size
    if not turn.prompt_blocks:
        tail = max(1, tail)
    return replace(
        turn,
        input_tokens=len(turn.prompt_blocks) * part + tail,
        output_tokens=least_one(turn.output_tokens),
        tail_tokens=tail,
        cancel_after=None if turn.cancel_after is None else least_one(turn.cancel_after),
    )
