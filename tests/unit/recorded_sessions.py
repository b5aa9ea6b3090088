# SPDX-License-Identifier: MIT
"""Recorded sessions of the tests, written by hand, and what of a workload must survive a file."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenspeed.bench.session import Workload

Row = list[Any]


def row(t: float, size: int, out: int, keep: int, new: list[list[int]], **other: Any) -> Row:
    """A condensed row of block size 64."""
    told = {"think": None, "api": 2.0, "stop": "tool_use", "types": "r"} | other
    api, types = told["api"], told["types"]
    return [t, size, out, keep, new, told["think"], api, None, told["stop"], types, "xu", "s"]


AGENT: dict[str, Any] = {
    "t": 9.0,
    "type": "subagent",
    "agent_id": "agent_001",
    "requests": [row(0.0, 130, 5, 0, [[1, 1], [90, 1]], types="x"), row(4.0, 200, 6, 2, [[92, 1]])],
}


def recorded(*rows: Any, name: str = "s1", **other: Any) -> dict[str, Any]:
    return {"id": name, "block_size": 64, "hash_id_scope": "local", "requests": list(rows)} | other


GOOD = recorded(
    row(0.5, 150, 30, 0, [[1, 2]], types="x"),
    row(10.0, 400, 20, 2, [[7, 2], [20, 2]], think=7.5),
    AGENT,
    row(40.0, 330, 10, 3, [[30, 2]], types="xhru"),
    row(90.0, 331, 0, 5, [], types="x", stop=""),
)


def file_of(folder: Path, *sessions: Any) -> Path:
    path = folder / "sessions.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(
            (one if isinstance(one, str) else json.dumps(one)) + "\n" for one in sessions
        )
    return path


def shape(workload: Workload) -> list[Any]:
    """Everything but names of blocks: those by the order in which they come up."""
    names: dict[int, int] = {}
    return [
        (
            replace(session, turns=(), start_s=0.0, user=""),
            [
                replace(
                    turn,
                    gap_s=round(turn.gap_s, 6),
                    prompt_blocks=tuple(
                        names.setdefault(b, len(names)) for b in turn.prompt_blocks
                    ),
                )
                for turn in session.turns
            ],
        )
        for session in sorted(workload.sessions, key=lambda s: s.session_id)
    ]
