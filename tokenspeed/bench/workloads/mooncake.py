# SPDX-License-Identifier: MIT
"""Requests as JSON lines of Mooncake's open traces: timestamps, lengths, hashes of blocks.

The format has no sessions: each line is one of its own that starts at its timestamp (open loop).
Lines of other tools that carry only what is new (`session_id`, `delay`) are refused.
Source: Qin et al., "Mooncake", FAST 2025, and the traces published with it.
"""

import json
from pathlib import Path

from tokenspeed.bench.session import Session, Turn, Workload
from tokenspeed.bench.timeline import turn_times
from tokenspeed.bench.workloads import checks
from tokenspeed.bench.workloads.recorded import Ids
from tokenspeed.bench.workloads.scaling import scaled

BLOCK_SIZE = 512


def make(
    path: Path,
    *,
    requests: int | None = None,
    seed: int = 0,
    scale: float = 1.0,
    block_size: int = BLOCK_SIZE,
) -> Workload:
    """The lines of a file, all or the first so many; the first starts at 0. The seed is the texts'.

    Raises ValueError for a malformed file (with the line), and for senseless arguments.
    """
    if requests is not None:
        checks.at_least("requests", requests, 1)
    checks.at_least("block_size", block_size, 1)
    ids, found = Ids(), list[Session]()
    first_s, last_s = 0.0, 0.0
    for where, line in checks.lines(path):
        row = checks.parsed(where, line)
        time_s = checks.seconds(where, "timestamp", checks.field(where, row, "timestamp")) / 1000
        first_s = first_s if found else time_s
        if found and time_s < last_s:
            checks.refuse(where, f"timestamp goes back from {1000 * last_s} to {1000 * time_s}")
        last_s, name = time_s, f"{path.stem}-{len(found)}"
        turns = (_turn(where, row, ids, block_size),)
        found.append(Session(name, turns, block_size, time_s - first_s, name, None))
        if len(found) == requests:
            break
    if not found:
        raise ValueError(f"{path}: holds no request")
    return scaled(Workload("mooncake", tuple(found), seed, 1.0), scale)


def _turn(where: str, row: checks.Json, ids: Ids, size: int) -> Turn:
    for name in ("session_id", "delay", "messages", "text_input", "payload"):
        if name in row:
            checks.refuse(where, f"{name} is not supported: whole prompts as hash_ids are")
    prompt = checks.whole(where, "input_length", checks.field(where, row, "input_length"), 1)
    answer = checks.whole(where, "output_length", checks.field(where, row, "output_length"), 1)
    blocks = checks.field(where, row, "hash_ids")
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        checks.refuse(where, "hash_ids must be a list of whole numbers")
    full, every = prompt // size, -(-prompt // size)
    if len(blocks) not in (full, every):
        checks.refuse(where, f"{len(blocks)} hash_ids for {every} blocks of {size} tokens: a hole")
    mine = ids.of(ids.shared, blocks[:full])
    return Turn(mine, prompt, answer, 0.0, "user", prompt - full * size)


def write(workload: Workload, path: Path, block_size: int = BLOCK_SIZE) -> None:
    """Every turn as a line, by the time it would be sent (`timeline`); all blocks get a hash.

    A hash stands for the whole prefix up to its block, in larger blocks than the workload's too.
    Raises ValueError if `block_size` is no multiple of the workload's.
    """
    hashes: dict[tuple[object, ...], int] = {}
    rows = []
    for session in workload.sessions:
        if block_size % session.block_size:
            raise ValueError(
                f"block_size must be a multiple of {session.block_size}, not {block_size}"
            )
        group = block_size // session.block_size
        for index, (sent_s, _) in enumerate(turn_times(session)):
            turn, last, named = session.turns[index], -1, list[int]()
            for start in range(0, turn.input_tokens // block_size * group, group):
                last = _number(hashes, (last, *turn.prompt_blocks[start : start + group]))
                named.append(last)
            if turn.input_tokens % block_size:
                named.append(_number(hashes, (session.session_id, index)))
            told = {
                "timestamp": round(1000 * sent_s),
                "input_length": turn.input_tokens,
                "output_length": turn.output_tokens,
                "hash_ids": named,
            }
            rows.append((sent_s, json.dumps(told) + "\n"))
    rows.sort(key=lambda row: row[0])
    path.write_text("".join(line for _, line in rows))


def _number(known: dict[tuple[object, ...], int], key: tuple[object, ...]) -> int:
    return known.setdefault(key, len(known))
