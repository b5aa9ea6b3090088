# SPDX-License-Identifier: MIT
"""Workloads from files and shapes: what they hold, what they refuse, what a cache could spare."""

import gzip
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokenspeed.bench.cache_bound import cached_tokens, hit_rate, hit_rates
from tokenspeed.bench.session import Session, Turn, Workload, shared_blocks
from tokenspeed.bench.timeline import Pace, turn_times
from tokenspeed.bench.workloads import fixed, mooncake, published, traces, weka
from tokenspeed.bench.workloads.scaling import scaled
from tokenspeed.config import traces_place

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


def test_the_benchmark_reads_no_environment(repository: Path) -> None:
    for path in (repository / "tokenspeed" / "bench").rglob("*.py"):
        assert not re.search(r"\benviron|getenv|^import os|^from os", path.read_text(), re.M), path


# What a scale does.


def test_scale_divides_all_lengths_and_keeps_the_ratios(tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD)
    whole, small = traces.make(path), traces.make(path, scale=8)
    assert small.scale == 8
    assert small.sessions[0].block_size == 8
    pairs = zip(whole.sessions, small.sessions, strict=True)
    for a, b in ((a, b) for x, y in pairs for a, b in zip(x.turns, y.turns, strict=True)):
        assert b.prompt_blocks == a.prompt_blocks
        assert b.input_tokens == len(b.prompt_blocks) * 8 + b.tail_tokens
        assert abs(b.input_tokens - a.input_tokens / 8) < 1
        assert abs(b.output_tokens - max(1, a.output_tokens / 8)) <= 0.5
        assert (b.gap_s, b.kind) == (a.gap_s, a.kind)
    assert hit_rate(small) == pytest.approx(hit_rate(whole), abs=0.02)


def test_scale_says_what_it_really_is() -> None:
    small = published.make(sessions=2, scale=10)
    assert small.scale == 64 / 6
    assert small.sessions[0].turns[0].input_tokens == 781 * 6 + 16 * 6 // 64
    assert small.sessions[0].turns[0].output_tokens == round(500 * 6 / 64)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0, math.nan, math.inf, 65.0])
def test_a_senseless_scale_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be"):
        published.make(sessions=1, scale=scale)


def test_nothing_is_scaled_twice() -> None:
    with pytest.raises(ValueError, match="already divided"):
        scaled(published.make(sessions=1, scale=2), 2)


# The other formats, read back.


def test_weka_comes_back_as_it_was_written(tmp_path: Path) -> None:
    workload = traces.make(file_of(tmp_path, GOOD, GOOD | {"id": "s2"}))
    weka.write(workload, tmp_path / "w")
    back = weka.make(tmp_path / "w")
    assert shape(back) == shape(workload)
    assert {s.session_id: s.start_s for s in back.sessions}["s1/agent_001"] == 9.0
    assert hit_rates(back, [5, 60, math.inf]) == hit_rates(workload, [5, 60, math.inf])
    small = scaled(workload, 8)
    weka.write(small, tmp_path / "small")
    assert shape(weka.make(tmp_path / "small")) == shape(small)


def test_weka_says_global_only_where_files_share_blocks(tmp_path: Path) -> None:
    apart = published.make(sessions=2, first=200)
    one, other = apart.sessions
    turn = replace(other.turns[0], prompt_blocks=one.turns[0].prompt_blocks)
    shared = replace(apart, sessions=(one, replace(other, turns=(turn,))))
    for name, workload, scope in (("a", apart, "local"), ("b", shared, "global")):
        weka.write(workload, tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        assert [json.loads(file.read_text())["hash_id_scope"] for file in files] == [scope] * 2
        assert shape(weka.make(tmp_path / name)) == shape(workload)


WEKA: dict[str, Any] = {
    "id": "s1", "block_size": 64, "hash_id_scope": "local",
    "requests": [{"t": 0.0, "in": 150, "out": 3, "hash_ids": [1, 2], "input_types": ["text"]}],
}  # fmt: skip


def first_request(**changed: Any) -> Callable[[], dict[str, Any]]:
    return lambda: WEKA | {"requests": [WEKA["requests"][0] | changed]}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (first_request(hash_ids=[1]), "1 blocks for 2 whole ones"),
        (first_request(hash_ids="12"), "hash_ids must be"),
        (first_request(hash_ids=[1, True]), "hash_ids must be"),
        (first_request(t=-0.1), "t must be"),
        (first_request(**{"in": 0}), "in must be"),
        (first_request(out=0, stop="end_turn"), "output tokens must be"),
        (first_request(think_time=-1), "think_time must be"),
        (lambda: {k: v for k, v in WEKA.items() if k != "block_size"}, "block_size is missing"),
        (lambda: WEKA | {"requests": [{"t": 0.0}]}, "in is missing"),
        (lambda: WEKA | {"requests": [1]}, "a JSON object is needed"),
    ],
)
def test_a_malformed_weka_file_is_refused(
    tmp_path: Path, made: Callable[[], Any], message: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(made()))
    with pytest.raises(ValueError, match=message) as refused:
        weka.make(tmp_path)
    assert str(tmp_path / "a.json") in str(refused.value)


def test_weka_takes_a_number_for_the_partial_block(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(first_request(hash_ids=[5, 6, 7])()))
    assert weka.make(tmp_path).sessions[0].turns[0].prompt_blocks == (0, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.json file"):
        weka.make(tmp_path / "empty")


def test_mooncake_comes_back_as_single_requests(tmp_path: Path) -> None:
    workload = published.make(sessions=3, first=5000, growth=700, turns=(3, 4), gap_s=5.0)
    path = tmp_path / "m.jsonl"
    mooncake.write(workload, path)
    back = mooncake.make(path)
    assert len(back.sessions) == workload.num_turns
    assert back.input_tokens == workload.input_tokens
    assert back.output_tokens == workload.output_tokens
    for one in back.sessions:
        assert len(one.turns[0].prompt_blocks) == one.turns[0].input_tokens // 512
    # Larger blocks find less, by at most a block of each prompt.
    lost = hit_rate(workload) - hit_rate(back)
    assert 0 <= lost <= 512 * workload.num_turns / workload.input_tokens
    mooncake.write(workload, path, block_size=64)
    assert hit_rate(mooncake.make(path, block_size=64)) == hit_rate(workload)
    starts = sorted(sent for s in workload.sessions for sent, _ in turn_times(s))
    assert [s.start_s for s in back.sessions] == pytest.approx(starts, abs=0.001)
    assert [s.start_s for s in mooncake.make(path, requests=2, block_size=64).sessions] == [0, 0]
    with pytest.raises(ValueError, match="multiple of 64"):
        mooncake.write(workload, path, block_size=100)


def mooncake_row(**changed: Any) -> str:
    whole = {"timestamp": 3, "input_length": 1000, "output_length": 4, "hash_ids": [1, 2]}
    return json.dumps({k: v for k, v in (whole | changed).items() if v is not None}) + "\n"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"timestamp": -1}, "timestamp must be"),
        ({"timestamp": 2}, "goes back"),
        ({"timestamp": None}, "timestamp is missing"),
        ({"input_length": 0}, "input_length must be"),
        ({"output_length": 0}, "output_length must be"),
        ({"hash_ids": [1, 2, 3]}, "a hole"),
        ({"hash_ids": []}, "a hole"),
        ({"hash_ids": {}}, "hash_ids must be"),
        ({"session_id": "a"}, "session_id is not supported"),
    ],
)
def test_a_malformed_mooncake_line_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(mooncake_row() + mooncake_row(**changed))
    with pytest.raises(ValueError, match=message) as refused:
        mooncake.make(path)
    assert str(refused.value).startswith(f"{path}:2: ")
    assert mooncake.make(path, requests=1).sessions[0].turns[0].prompt_blocks == (0,)


# Shapes without a file.


def test_the_published_shape() -> None:
    workload = published.make(seed=3)
    assert len(workload.sessions) == 71
    assert {len(s.turns) for s in workload.sessions} == set(range(10, 16))
    for session in workload.sessions:
        sizes = [turn.input_tokens for turn in session.turns]
        assert sizes == [50_000 + 800 * i for i in range(len(sizes))]
        assert {turn.output_tokens for turn in session.turns} == {500}
        last = session.turns[-1].prompt_blocks
        assert all(turn.prompt_blocks == last[: len(turn.prompt_blocks)] for turn in session.turns)
    every = [b for s in workload.sessions for b in s.turns[-1].prompt_blocks]
    assert len(every) == len(set(every))
    lengths = [len(s.turns) for s in workload.sessions]
    assert lengths != [len(s.turns) for s in published.make(seed=4).sessions]
    assert workload == published.make(seed=3)


def test_random_lengths() -> None:
    made = fixed.make(requests=300, range_ratio=0.5, prefix_tokens=640, seed=1)
    turns = [session.turns[0] for session in made.sessions]
    assert {turn.prompt_blocks[:10] for turn in turns} == {tuple(range(10))}
    assert len({turn.prompt_blocks[10] for turn in turns}) == 300
    assert all(512 <= turn.input_tokens - 640 <= 1536 for turn in turns)
    assert all(64 <= turn.output_tokens <= 192 for turn in turns)
    assert len({turn.input_tokens for turn in turns}) > 200
    assert made == fixed.make(requests=300, range_ratio=0.5, prefix_tokens=640, seed=1)
    assert made.sessions != fixed.make(
        requests=300, range_ratio=0.5, prefix_tokens=640, seed=2
    ).sessions  # fmt: skip
    exact = fixed.make(requests=3, input_tokens=100, output_tokens=7).sessions
    assert {(s.turns[0].input_tokens, s.turns[0].output_tokens) for s in exact} == {(100, 7)}


def test_lengths_like_sharegpt() -> None:
    made = fixed.sharegpt(requests=5000)
    assert made.input_tokens / 5000 == pytest.approx(161, rel=0.05)
    assert made.output_tokens / 5000 == pytest.approx(338, rel=0.05)
    assert all(4 <= s.turns[0].input_tokens <= 1024 for s in made.sessions)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fixed.make(requests=0),
        lambda: fixed.make(input_tokens=0),
        lambda: fixed.make(range_ratio=1.0),
        lambda: fixed.make(span_s=math.nan),
        lambda: published.make(turns=(3, 2)),
        lambda: published.make(gap_s=-1.0),
        lambda: published.make(sessions=0),
        lambda: mooncake.make(Path("none"), block_size=0),
    ],
)
def test_senseless_arguments_are_refused(make: Callable[[], Workload]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


# What a cache could spare.


def chain(name: str, *turns: Turn, start_s: float = 0.0) -> Session:
    return Session(name, turns, 10, start_s, name, None)


def test_hit_rates_by_hand() -> None:
    pace = Pace(first_token_s=1.0, tokens_per_s=10.0)
    first = chain(
        "a",
        Turn((1, 2), 20, 10, 0.0, "user", 0),  # sent 0, ends 2
        Turn((1, 2, 3), 35, 10, 4.0, "tool", 5),  # sent 6, ends 8; 20 cached if kept 4 s
        Turn((1, 2, 3), 35, 10, 10.0, "tool", 5),  # sent 18, ends 20; 30 cached if kept 10 s
    )
    # Sent at 25: block 1 is shared; 2 follows another block and is another prefix.
    second = chain("b", Turn((1, 4, 2), 30, 10, 0.0, "user", 0), start_s=25.0)
    workload = Workload("hand", (first, second), 0, 1.0)
    assert turn_times(first, pace) == [(0.0, 2.0), (6.0, 8.0), (18.0, 20.0)]
    rates = hit_rates(workload, [3.9, 4.0, 5.0, 10.0, math.inf], pace)
    assert rates == [0, 20 / 120, 30 / 120, 60 / 120, 60 / 120]
    each = [(s.session_id, i, c.tolist()) for s, i, c in cached_tokens(workload, [5.0], pace)]
    assert each == [("a", 0, [0]), ("a", 1, [20]), ("a", 2, [0]), ("b", 0, [10])]


def test_one_token_is_always_computed() -> None:
    same = Turn((1, 2), 20, 1, 0.0, "user", 0)
    assert hit_rate(Workload("w", (chain("a", same, same),), 0, 1.0)) == 10 / 40


def test_a_cancelled_answer_ends_early() -> None:
    turn = Turn((1,), 10, 100, 0.0, "user", 0, cancel_after=10)
    assert turn_times(chain("a", turn), Pace(1.0, 10.0)) == [(0.0, 2.0)]


def test_a_negative_time_to_live_is_refused() -> None:
    with pytest.raises(ValueError, match="time to live"):
        hit_rates(published.make(sessions=1), [1.0, math.nan])


def test_shared_blocks() -> None:
    assert shared_blocks((1, 2, 3), (1, 2, 4, 5)) == 2
    assert shared_blocks((1, 2), (1, 2, 4)) == 2
    assert shared_blocks((), (1,)) == 0
    assert shared_blocks((2,), (1,)) == 0


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
