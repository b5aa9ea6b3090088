# SPDX-License-Identifier: MIT
"""Workloads in others' formats, read back: weka and mooncake."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.recorded_sessions import GOOD, file_of, shape
from tokenspeed.bench.cache_bound import hit_rate, hit_rates
from tokenspeed.bench.timeline import turn_times
from tokenspeed.bench.workloads import mooncake, published, traces, weka
from tokenspeed.bench.workloads.scaling import scaled


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
        (first_request(out=2**63), "output tokens must be below 2147483648"),
        (first_request(input_types=5), "input_types must be a list, not 5"),
        (first_request(input_types=False), "input_types must be a list, not False"),
        (first_request(input_types="tool_result"), "input_types must be a list"),
        (lambda: WEKA | {"id": "\ud800"}, "id must be text"),
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


def test_weka_may_leave_open_what_a_prompt_is(tmp_path: Path) -> None:
    kinds = []
    for types in (None, ["text"], ["tool_result"]):
        (tmp_path / "a.json").write_text(json.dumps(first_request(input_types=types)()))
        kinds.append(weka.make(tmp_path).sessions[0].turns[0].kind)
    assert kinds == ["user", "user", "tool"]


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
        ({"output_length": 2**31}, "output_length must be below 2147483648"),
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
