# SPDX-License-Identifier: MIT
"""Recorded coding agents: condensed rows, one session a line. Refuses to invent what is not there.

A row is `[t_s, input_tokens, output_tokens, keep, new_ranges, think_time_s, api_time_s, ttft_s,
stop, input_types, output_types, type]`; an object in its place is a subagent. Block ids are a
session's own: what sessions share (a client's system prompt) is not told, so none is assumed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenspeed.bench.session import Session, Workload
from tokenspeed.bench.workloads import checks
from tokenspeed.bench.workloads.recorded import Ids, Reading, Recorded, answer_tokens
from tokenspeed.bench.workloads.scaling import scaled

FILE = "sessions.jsonl.gz"
ROW = "t_s input_tokens output_tokens keep new_ranges think_time_s api_time_s ttft_s stop".split()
ROW += "input_types output_types type".split()


def file_in(place: Path) -> Path:
    """Of a folder the file that is in it, of anything else itself."""
    return place / FILE if place.is_dir() else place


def make(
    path: Path,
    *,
    sessions: int | None = None,
    seed: int = 0,
    scale: float = 1.0,
    span_s: float = 0.0,
) -> Workload:
    """Sessions of the file, or of the one in the folder: all, or so many chosen by the seed. They
    start within `span_s`.

    Raises ValueError for a malformed file (with the line), and for senseless arguments.
    """
    chosen, rng = chosen_lines(file_in(path), sessions, seed)
    ids, found = Ids(), list[Session]()
    begin = checks.starts(rng, len(chosen), span_s)
    for (where, line), start_s in zip(chosen, begin, strict=True):
        found += read_session(where, line, start_s, ids)
    found.sort(key=lambda session: session.start_s)
    return scaled(Workload("traces", tuple(found), seed, 1.0), scale)


def chosen_lines(
    path: Path, number: int | None, seed: int
) -> tuple[list[tuple[str, str]], np.random.Generator]:
    """`number` of a file's lines, shuffled by the seed (None: all of them)."""
    rng = np.random.default_rng(seed)
    every = list(checks.lines(path))
    if not every:
        raise ValueError(f"{path}: holds no session")
    if number is None:
        return every, rng
    if not 1 <= number <= len(every):
        raise ValueError(f"sessions must be in [1, {len(every)}], not {number}")
    return [every[i] for i in rng.permutation(len(every))[:number]], rng


def read_session(where: str, line: str, start_s: float, ids: Ids) -> list[Session]:
    """A line's session and its subagents."""
    row = checks.parsed(where, line)
    name = checks.name(where, row)
    size = checks.whole(where, "block_size", checks.field(where, row, "block_size"), 1)
    known = ids.shared if row.get("hash_id_scope") == "global" else dict[int, int]()
    reading = Reading(ids, known, size, name, decode_row)
    reading.read(where, name, checks.field(where, row, "requests"), start_s, ())
    return reading.found


def decode_row(where: str, row: Any, before: tuple[int, ...]) -> Recorded:
    if not isinstance(row, list) or len(row) != len(ROW):
        checks.refuse(where, f"a row of {len(ROW)} fields is needed: {', '.join(ROW)}")
    told = dict(zip(ROW, row, strict=True))
    think, api = told["think_time_s"], told["api_time_s"]
    prompt = checks.whole(where, "input_tokens", told["input_tokens"], 1)
    return Recorded(
        t_s=checks.seconds(where, "t_s", told["t_s"]),
        input_tokens=prompt,
        output_tokens=answer_tokens(where, told["output_tokens"], told["stop"]),
        keep=checks.whole(where, "keep", told["keep"], 0),
        new=_ranges(where, told["new_ranges"], prompt),
        think_s=None if think is None else checks.seconds(where, "think_time_s", think),
        api_s=None if api is None else checks.seconds(where, "api_time_s", api),
        kind="tool" if "r" in str(told["input_types"]) else "user",
    )


def _ranges(where: str, ranges: Any, most: int) -> Sequence[int]:
    if not isinstance(ranges, list):
        checks.refuse(where, f"new_ranges must be a list, not {ranges!r}")
    found: list[int] = []
    for pair in ranges:
        if not isinstance(pair, list) or len(pair) != 2:
            checks.refuse(where, f"a range is [start, length], not {pair!r}")
        start = checks.whole(where, "a range's start", pair[0], 0, None)
        length = checks.whole(where, "a range's length", pair[1], 1, None)
        if len(found) + length > most:
            checks.refuse(where, f"{len(found) + length} blocks for a prompt of {most} tokens")
        if len(found) + length > checks.MOST_BLOCKS:
            checks.refuse(where, f"a prompt has at most {checks.MOST_BLOCKS} blocks")
        found += range(start, start + length)
    return found
