# SPDX-License-Identifier: MIT
"""The simulator: judged on the future only, and the balance reached on a recorded load."""

from pathlib import Path

import numpy as np
import pytest

from tokenspeed.spmd.expert_replay import Recording, read_recording, replay, write_recording
from tokenspeed.spmd.expert_solver import Solver

DEMO = Path(__file__).parents[1] / "data" / "demo_expert_loads.npz"


def turning(records: int) -> Recording:
    """One layer, four experts; expert 1 is hot in the first half, expert 3 in the second."""
    loads = np.full((records, 1, 4), 10)
    loads[: records // 2, 0, 1] = 30
    loads[records // 2 :, 0, 3] = 30
    return loads


def test_the_demo_models_recorded_load_is_balanced() -> None:
    """Three ranks of three slots for eight experts: one redundant expert in eight."""
    intervals = replay(read_recording(DEMO), Solver(8, 3, 1), interval=8, window=16)
    before = np.mean([i.before for i in intervals[1:]])
    after = np.mean([i.after for i in intervals[1:]])
    assert before > 1.4
    assert after < 1.1


def test_a_placement_knows_only_what_came_before() -> None:
    solver = Solver(4, 2, 2)
    first, second, third, fourth = replay(turning(8), solver, interval=2, window=2)
    assert (first.num_moved, first.num_sent) == (0, 0)
    assert first.after == first.before
    assert second.num_moved > 0
    assert second.after < second.before
    assert third.num_moved == 0  # made of records 2 and 3, which say nothing of the turn
    assert fourth.num_moved > 0
    assert fourth.after < third.after
    changed = turning(8)
    changed[4:] *= 7
    again = replay(changed, solver, interval=2, window=2)
    assert [i.num_moved for i in again[:3]] == [0, second.num_moved, 0]


def test_the_window_may_be_longer_or_shorter_than_the_interval() -> None:
    solver = Solver(4, 2, 2)
    short = replay(turning(8), solver, interval=4, window=1)
    assert [(i.begin, i.end) for i in short] == [(0, 4), (4, 8)]
    whole = replay(turning(7), solver, interval=3, window=100)
    assert [(i.begin, i.end) for i in whole] == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize("name", ["loads.npz", "loads.jsonl"])
def test_recordings_come_back(tmp_path: Path, name: str) -> None:
    write_recording(tmp_path / name, turning(4) * 1000)
    assert (read_recording(tmp_path / name) == turning(4) * 1000).all()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", b"not a zip"),
        ("a.npz", b""),
        ("a.jsonl", b"{"),
        ("a.jsonl", b'{"load": [[1]]}\n'),
        ("a.jsonl", b"[1]\n"),
        ("a.jsonl", b'{"loads": [1, 2]}\n'),
        ("a.jsonl", b'{"loads": [[-1]]}\n'),
        ("a.jsonl", b'{"loads": [[0.5]]}\n'),
        ("a.jsonl", b'{"loads": [[1]]}\n{"loads": [[1, 2]]}\n'),
    ],
)
def test_files_that_are_no_recording(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_recording(tmp_path / name)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="interval and window are at least 1"):
        replay(turning(4), Solver(4, 2), interval=0, window=1)
    with pytest.raises(ValueError, match="a recording is"):
        replay(np.ones((4, 4), np.int64), Solver(4, 2), interval=1, window=1)
