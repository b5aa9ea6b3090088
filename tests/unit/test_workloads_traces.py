# SPDX-License-Identifier: MIT
"""Workloads from recorded sessions: what rows mean, which are refused, where the files are."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.unit.recorded_sessions import AGENT, GOOD, file_of, recorded, row
from tokenspeed.bench.cache_bound import hit_rate
from tokenspeed.bench.session import Turn, Workload
from tokenspeed.bench.workloads import traces
from tokenspeed.config import traces_place


def test_rows_become_turns(tmp_path: Path) -> None:
    workload = traces.make(file_of(tmp_path, GOOD))
    main, agent = sorted(workload.sessions, key=lambda s: s.session_id)
    assert main.turns == (
        Turn((0, 1), 150, 30, 0.5, "user", 22),
        Turn((0, 1, 2, 3, 4, 5), 400, 20, 7.5, "tool", 16),
        Turn((0, 1, 2, 8, 9), 330, 10, 28.0, "tool", 10),
        Turn((0, 1, 2, 8, 9), 331, 1, 48.0, "user", 11),
    )
    assert agent.turns[1] == Turn((0, 6, 7), 200, 6, 2.0, "tool", 8)
    assert (main.session_id, main.parent, main.start_s) == ("s1", None, 0.0)
    assert (agent.session_id, agent.parent, agent.start_s) == ("s1/agent_001", "s1", 9.0)
    assert agent.user == main.user == "s1"


def test_local_ids_of_two_sessions_are_different_blocks(tmp_path: Path) -> None:
    two = traces.make(file_of(tmp_path, GOOD, GOOD | {"id": "s2"}))
    first, second = (s for s in two.sessions if s.parent is None)
    assert not {b for t in first.turns for b in t.prompt_blocks} & {
        b for t in second.turns for b in t.prompt_blocks
    }
    shared = {"hash_id_scope": "global"}
    same = traces.make(file_of(tmp_path, GOOD | shared, GOOD | shared | {"id": "s2"}))
    first, second = (s for s in same.sessions if s.parent is None)
    assert first.turns == second.turns


def test_the_seed_chooses_sessions_and_starts(tmp_path: Path) -> None:
    path = file_of(tmp_path, *(GOOD | {"id": f"s{i}"} for i in range(20)))

    def chosen(seed: int) -> tuple[list[str], list[float]]:
        made = traces.make(path, sessions=5, seed=seed, span_s=3600)
        mains = [s for s in made.sessions if s.parent is None]
        return [s.session_id for s in mains], [s.start_s for s in mains]

    assert chosen(1) == chosen(1)
    assert chosen(1)[0] != chosen(2)[0]
    assert chosen(1)[1] != chosen(2)[1]
    assert chosen(1)[1] == sorted(chosen(1)[1])
    assert 0 <= chosen(1)[1][0] <= chosen(1)[1][-1] <= 3600


LOOP = AGENT | {"requests": [AGENT["requests"][0], AGENT]}
BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not JSON"),
    "no object": ("[1]", "not a JSON object"),
    "NaN": (json.dumps(recorded(row(math.nan, 70, 3, 0, [[1, 1]]))), "NaN is no number"),
    "no id": (recorded(row(0, 70, 3, 0, [[1, 1]]), name=""), "id must be"),
    "block size": (recorded(row(0, 70, 3, 0, [[1, 1]]), block_size=0), "block_size must be"),
    "nothing": (recorded(), "must be a list that is not empty"),
    "no own request": (recorded(AGENT), "no request of its own"),
    "cycle": (recorded(row(0, 70, 3, 0, [[1, 1]]), LOOP), "'s1/agent_001' contains itself"),
    "few fields": (recorded(row(0, 70, 3, 0, [[1, 1]])[:-1]), "a row of 12 fields"),
    "negative time": (recorded(row(-1.0, 70, 3, 0, [[1, 1]])), "t_s must be a time"),
    "negative gap": (recorded(row(0, 70, 3, 0, [[1, 1]], think=-2)), "think_time_s must be"),
    "back in time": (
        recorded(row(5, 70, 3, 0, [[1, 1]]), row(4, 70, 3, 1, [])),
        "t goes back from 5.0 to 4.0",
    ),
    "no input": (recorded(row(0, 0, 3, 0, [])), "input_tokens must be"),
    "no output": (recorded(row(0, 70, 0, 0, [[1, 1]])), "output tokens must be"),
    "half a token": (recorded(row(0, 70, 1.5, 0, [[1, 1]])), "output tokens must be"),  # type: ignore[arg-type]
    "keeps nothing": (recorded(row(0, 70, 3, 1, [])), "keeps 1 blocks where 0 were"),
    "missing block": (recorded(row(0, 200, 3, 0, [[1, 2]])), "2 blocks for 3 whole ones"),
    "endless input": (recorded(row(0, 2**31, 3, 0, [])), "input_tokens must be below 2147483648"),
    "endless output": (recorded(row(0, 70, 2**63, 0, [[1, 1]])), "tokens must be below 2147483648"),
    "all memory": (recorded(row(0, 2**30, 3, 0, [[1, 2**23]])), "has at most 4194304 blocks"),
    "half a name": (recorded(row(0, 70, 3, 0, [[1, 1]]), name="\ud800"), "id must be text"),
    "half an agent": (
        recorded(row(0, 70, 3, 0, [[1, 1]]), AGENT | {"agent_id": "\ud800"}),
        "agent_id must be text",
    ),
    "empty range": (recorded(row(0, 70, 3, 0, [[1, 0], [1, 1]])), "a range's length must be"),
    "endless range": (recorded(row(0, 70, 3, 0, [[1, 10**12]])), "blocks for a prompt of 70"),
    "no range": (recorded(row(0, 70, 3, 0, [1])), "a range is"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_a_malformed_trace_is_refused_with_its_line(
    tmp_path: Path, line: Any, message: str
) -> None:
    path = file_of(tmp_path, GOOD, line)
    with pytest.raises(ValueError, match=message) as refused:
        traces.make(path)
    assert f"{path}:2" in str(refused.value)


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        traces.make(tmp_path / "none.gz")
    with pytest.raises(ValueError, match="no session"):
        traces.make(file_of(tmp_path))
    with pytest.raises(ValueError, match="sessions must be in"):
        traces.make(file_of(tmp_path, GOOD), sessions=2)


def test_the_folder_of_traces_can_be_named(tmp_path: Path) -> None:
    assert traces_place({"TOKENSPEED_TRACES": str(tmp_path)}) == tmp_path
    for without in ({}, {"TOKENSPEED_TRACES": ""}):
        with pytest.raises(ValueError, match="TOKENSPEED_TRACES must name"):
            traces_place(without)
    file = file_of(tmp_path, GOOD)
    assert traces.file_in(tmp_path) == traces.file_in(file) == file
    assert traces.make(tmp_path) == traces.make(file)


def test_recorded_sessions_are_whole() -> None:
    try:
        place = traces_place()
    except ValueError as error:
        pytest.skip(str(error))
    made = traces.make(place, sessions=20, seed=1, scale=4)
    check_whole(made)
    assert 0.9 < hit_rate(made) < 0.99


def test_written_sessions_are_whole(tmp_path: Path) -> None:
    path = file_of(tmp_path, *(GOOD | {"id": f"s{i}"} for i in range(25)))
    check_whole(traces.make(path, sessions=20, seed=1, scale=4))


def check_whole(made: Workload) -> None:
    """20 sessions and their agents, in blocks of 16 tokens."""
    assert len({s.session_id for s in made.sessions}) == len(made.sessions) >= 20
    for session in made.sessions:
        for turn in session.turns:
            assert turn.input_tokens == len(turn.prompt_blocks) * 16 + turn.tail_tokens
            assert 0 <= turn.tail_tokens < 16
