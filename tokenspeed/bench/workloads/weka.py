# SPDX-License-Identifier: MIT
"""Sessions as a folder of JSON files, one each: what aiperf reads as `weka_trace`.

The format has no start of a session, no user and no cancellation: a reader spreads the starts, a
writer drops them. What it tells in times besides gaps is estimated when it is written.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np

from tokenspeed.bench.session import Session, Workload, shared_blocks
from tokenspeed.bench.timeline import TYPICAL, turn_times
from tokenspeed.bench.workloads import checks
from tokenspeed.bench.workloads.recorded import Ids, Reading, Recorded, answer_tokens
from tokenspeed.bench.workloads.scaling import scaled

Json = dict[str, Any]
Children = dict[str | None, list[Session]]  # of the session of that id; of None: those without


def make(
    path: Path,
    *,
    sessions: int | None = None,
    seed: int = 0,
    scale: float = 1.0,
    span_s: float = 0.0,
) -> Workload:
    """The sessions of a folder (or of one file): all, or so many chosen by the seed.

    Raises ValueError for a malformed file (with its name and request), or senseless arguments.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: holds no .json file")
    rng = np.random.default_rng(seed)
    if sessions is not None:
        if not 1 <= sessions <= len(files):
            raise ValueError(f"sessions must be in [1, {len(files)}], not {sessions}")
        files = [files[i] for i in rng.permutation(len(files))[:sessions]]
    ids, found = Ids(), list[Session]()
    for file, start_s in zip(files, checks.starts(rng, len(files), span_s), strict=True):
        found += read_session(file, start_s, ids)
    found.sort(key=lambda session: session.start_s)
    return scaled(Workload("weka", tuple(found), seed, 1.0), scale)


def read_session(file: Path, start_s: float, ids: Ids) -> list[Session]:
    where = str(file)
    told = checks.parsed(where, "".join(line for _, line in checks.lines(file)))
    name = checks.name(where, told)
    size = checks.whole(where, "block_size", checks.field(where, told, "block_size"), 1)

    def decode(here: str, request: Any, before: tuple[int, ...]) -> Recorded:
        return _decoded(here, request, before, size)

    known = ids.shared if told.get("hash_id_scope") == "global" else dict[int, int]()
    reading = Reading(ids, known, size, name, decode)
    reading.read(where, name, checks.field(where, told, "requests"), start_s, ())
    return reading.found


def _decoded(where: str, request: Any, before: tuple[int, ...], size: int) -> Recorded:
    if not isinstance(request, dict):
        checks.refuse(where, f"a JSON object is needed, not {brief(request)}")
    prompt = checks.whole(where, "in", checks.field(where, request, "in"), 1)
    blocks = checks.field(where, request, "hash_ids")
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        checks.refuse(where, "hash_ids must be a list of whole numbers")
    if len(blocks) == -(-prompt // size):  # some files number the last, partial block too
        blocks = blocks[: prompt // size]
    keep = shared_blocks(before, tuple(blocks))
    types = request.get("input_types")
    if not isinstance(types, list | None):
        checks.refuse(where, f"input_types must be a list, not {brief(types)}")
    think, api = request.get("think_time"), request.get("api_time")
    return Recorded(
        t_s=checks.seconds(where, "t", checks.field(where, request, "t")),
        input_tokens=prompt,
        output_tokens=answer_tokens(
            where, checks.field(where, request, "out"), request.get("stop")
        ),
        keep=keep,
        new=blocks[keep:],
        think_s=None if think is None else checks.seconds(where, "think_time", think),
        api_s=None if api is None else checks.seconds(where, "api_time", api),
        kind="tool" if "tool_result" in (types or ()) else "user",
    )


def write(workload: Workload, folder: Path) -> None:
    """One file a session, subagents within it. Raises ValueError where a parent is not there.

    Files that share no block say "local", the one scope that aiperf 0.13 takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {session.session_id for session in workload.sessions}
    children: Children = {}
    for session in workload.sessions:
        if session.parent is not None and session.parent not in names:
            raise ValueError(f"{session.session_id}: its parent {session.parent!r} is not there")
        children.setdefault(session.parent, []).append(session)
    roots = children.get(None, [])
    scope = "global" if _share_blocks(roots, children) else "local"
    for session in roots:
        told = {
            "id": session.session_id,
            "models": ["model"],
            "block_size": session.block_size,
            "hash_id_scope": scope,
            "tool_tokens": 0,
            "system_tokens": 0,
            "requests": _requests(session, children),
        }
        file = folder / f"{session.session_id.replace('/', '_')}.json"
        file.write_text(json.dumps(told))


def _share_blocks(roots: Sequence[Session], children: Children) -> bool:
    """Whether a block of one session, its agents included, is another's too."""
    seen: set[int] = set()
    for root in roots:
        own = _blocks(root, children)
        if not seen.isdisjoint(own):
            return True
        seen |= own
    return False


def _blocks(session: Session, children: Children) -> set[int]:
    own = {block for turn in session.turns for block in turn.prompt_blocks}
    return own.union(*(_blocks(one, children) for one in children.get(session.session_id, ())))


def _requests(session: Session, children: Children) -> list[Json]:
    times = turn_times(session)
    own: Sequence[Json] = [_request(session, i, *times[i]) for i in range(len(times))]
    agents = [_agent(session, child, children) for child in children.get(session.session_id, ())]
    return sorted([*own, *agents], key=lambda request: float(request["t"]))


def _agent(parent: Session, child: Session, children: Children) -> Json:
    return {
        "t": child.start_s - parent.start_s,
        "type": "subagent",
        "agent_id": child.session_id.rpartition("/")[2],
        "subagent_type": "agent",
        "duration_ms": round(1000 * (turn_times(child)[-1][1] - child.start_s)),
        "total_tokens": child.turns[-1].total,
        "tool_use_count": sum(turn.kind == "tool" for turn in child.turns),
        "status": "completed",
        "models": ["model"],
        "tool_tokens": 0,
        "system_tokens": 0,
        "requests": _requests(child, children),
    }


def _request(session: Session, index: int, sent_s: float, end_s: float) -> Json:
    turn = session.turns[index]
    more = index + 1 < len(session.turns) and session.turns[index + 1].kind == "tool"
    return {
        "t": sent_s - session.start_s,
        "type": "s",
        "model": "model",
        "in": turn.input_tokens,
        "out": turn.output_tokens,
        "hash_ids": list(turn.prompt_blocks),
        "input_types": ["tool_result" if turn.kind == "tool" else "text"],
        "output_types": ["tool_use" if more else "text"],
        "stop": "tool_use" if more else "end_turn",
        "api_time": end_s - sent_s,
        "think_time": turn.gap_s,
        "ttft": TYPICAL.first_token_s,
    }
