# SPDX-License-Identifier: MIT
"""Workloads of any kind: what a scale does, shapes without a file, what a cache could spare."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.recorded_sessions import GOOD, file_of
from tokenspeed.bench.cache_bound import cached_tokens, hit_rate, hit_rates
from tokenspeed.bench.session import Session, Turn, Workload, shared_blocks
from tokenspeed.bench.timeline import Pace, turn_times
from tokenspeed.bench.workloads import fixed, mooncake, published, traces
from tokenspeed.bench.workloads.scaling import scaled


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
