# SPDX-License-Identifier: MIT
"""What the simulator reads and writes, its rooflines, and its command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_simulation import BLOCK, HALF, ROOMY, play, session, turn
from tokenspeed.bench import cache_bound
from tokenspeed.bench.measure import summary
from tokenspeed.bench.records import read_runs
from tokenspeed.bench.timeline import Pace
from tokenspeed.bench.workloads import generated, published
from tokenspeed.cli.main import main
from tokenspeed.planner.catalog import open_model
from tokenspeed.planner.devices import DEVICES
from tokenspeed.planner.estimate import Estimate, Load, estimate
from tokenspeed.planner.roofline import Step, stage_time
from tokenspeed.simulation.device_profile import NO_ROWS, NOTHING, StepShape, read_profile
from tokenspeed.simulation.raw_file import RawFile, header, record
from tokenspeed.simulation.roofline import RooflineProfile
from tokenspeed.simulation.sessions import Workload, condense, read_workload, write_workload
from tokenspeed.simulation.simulate import Simulation
from tokenspeed.spmd.mesh import Mesh

SMALL = published.make(sessions=3, scale=32.0, span_s=30.0)
FINE = replace(ROOMY, page_size=SMALL.sessions[0].block_size)  # a page is a block


def test_hits_are_those_of_a_cache_without_limit() -> None:
    outcomes = play(*condense(SMALL).sessions, options=FINE)
    bound = {
        (session.session_id, index): int(cached[0])
        for session, index, cached in cache_bound.cached_tokens(SMALL, [float("inf")])
    }
    assert {(o.session.session_id, o.number): o.cached_tokens for o in outcomes} == bound
    assert sum(bound.values()) > 0


@pytest.mark.parametrize("ttl_s", [5.0, 20.0, 100.0, math.inf])
@pytest.mark.parametrize("seed", [1, 3])
def test_hits_by_time_to_live_are_those_of_a_cache_that_forgets(seed: int, ttl_s: float) -> None:
    made = generated.make(sessions=1, scale=32.0, seed=seed)
    workload = replace(made, sessions=made.sessions[:1])  # no side calls
    idle_s = None if math.isinf(ttl_s) else ttl_s + 1e-6  # times are sums in another order
    (one,) = condense(workload).sessions
    outcomes = play(one, options=replace(ROOMY, page_size=one.block_size, idle_s=idle_s))
    pace = Pace(first_token_s=0.0, tokens_per_s=2.0)  # a step takes half a second
    expected = cache_bound.hit_rate(workload, ttl_s, pace) * workload.input_tokens
    assert sum(o.cached_tokens for o in outcomes) == pytest.approx(expected, abs=1e-6)
    assert len(outcomes) == len(one.turns)


def test_a_workload_is_read_as_it_was_written(tmp_path: Path) -> None:
    first = turn([5, 6, 7, 3, 9, 10], tail=3, output=7, gap_s=0.25, cancel_after=2)
    own = session(first, turn([4, 5], keep=2), name="s \u00e9", start_s=1.5)
    given = Workload("w", 3, 2.0, (own, *condense(SMALL).sessions))
    write_workload(tmp_path / "w.jsonl", given)
    assert "[[5, 3], [3, 1], [9, 2]]" in (tmp_path / "w.jsonl").read_text()
    found = read_workload(tmp_path / "w.jsonl")
    assert (found.name, found.seed, found.scale) == ("w", 3, 2.0)
    for one, other in zip(found.sessions, given.sessions, strict=True):
        for name in ("session_id", "user", "parent", "start_s", "block_size"):
            assert getattr(one, name) == getattr(other, name)
        for a, b in zip(one.turns, other.turns, strict=True):
            for name in ("gap_s", "kind", "input_tokens", "output_tokens", "cancel_after", "keep"):
                assert getattr(a, name) == getattr(b, name)
            assert a.added.tolist() == b.added.tolist()


NAMES = {"workload": "w", "seed": 0, "scale": 1.0}
GOOD = {
    "session_id": "s", "user": "u", "parent": None, "start_s": 0.0, "block_size": 64,
    "turns": [[0.0, "user", 130, 4, None, 0, [[1, 2]]], [1.0, "tool", 200, 4, None, 2, [[9, 1]]]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"turns": []}, "turns: must be a list of at least one"),
        ({"start_s": -1.0}, "start_s: must be finite and not negative"),
        ({"start_s": "soon"}, "start_s: must be a number"),
        ({"block_size": 0}, "block_size: must be a whole number of at least 1"),
        ({"turns": [[0.0, "user", 130, 4, None, 1, []]]}, "keep: 1 blocks of a prompt that has 0"),
        ({"turns": [[0.0, "user", 0, 4, None, 0, []]]}, "input_tokens: must be"),
        ({"turns": [[0.0, "user", 1, 0, None, 0, []]]}, "output_tokens: must be"),
        ({"turns": [[-0.5, "user", 1, 1, None, 0, []]]}, "gap_s: must be"),
        ({"turns": [[0.0, "user", 127, 4, None, 0, [[1, 2]]]]}, "blocks: 2 are more than"),
        ({"turns": [[0.0, "user", 130, 4, None, 0, [[-1, 2]]]]}, "block id: must be"),
        ({"turns": [[0.0, "user", 130, 4, None, 0, [[2**30, 1]]]]}, "block id: must be below"),
        ({"turns": [[0.0, "user", 130, 4]]}, r"a turn is \[gap_s, kind, input_tokens, .*, not \["),
        ({"turns": [5]}, "a turn is .*, not 5"),
        (
            {"turns": [[0.0, "user", 2**31, 4, None, 0, []]]},
            "input_tokens: must be below 2147483648",
        ),
        (
            {"turns": [[0.0, "user", 1, 2**63, None, 0, []]]},
            "output_tokens: must be below 2147483648",
        ),
        (
            {"turns": [[0.0, "user", 130, 4, None, 0, [[1]]]]},
            r"blocks: must be a list of \[first, count",
        ),
        (
            {"turns": [[0.0, "user", 130, 4, None, 0, 5]]},
            r"blocks: must be a list of \[first, count",
        ),
        (
            {"turns": [[0.0, "user", 2**29, 4, None, 0, [[1, 2**23]]]]},
            "blocks: 8388608 are more than",
        ),
        ({"turns": [GOOD["turns"][0], [0.0, "user", 130, 4, None, 2, [[9, 1]]]]}, "fewer than its"),  # type: ignore[index]
    ],
)
def test_a_bad_line_is_named(change: dict[str, object], what: str, tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text("\n".join(map(json.dumps, (NAMES, GOOD, GOOD | change))))
    with pytest.raises(ValueError, match=what) as error:
        read_workload(path)
    assert f"{path}:3: " in str(error.value)


def test_a_line_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(json.dumps(NAMES) + "\n" + "[" * 100_000)
    with pytest.raises(ValueError, match=r"w\.jsonl:2: nested too deeply"):
        read_workload(path)


@pytest.mark.parametrize("name", ["none", "."])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read: (No such file|Is a directory)"):
        read_workload(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"workload": "w"}', '{"seed": 1'])
def test_what_is_no_workload_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"w\.jsonl"):
        read_workload(path)


def test_the_raw_file_is_one_of_the_benchmark(tmp_path: Path) -> None:
    workload = condense(SMALL)
    run = Simulation(workload, HALF, FINE)
    raw = RawFile(tmp_path / "raw.jsonl", run)
    outcomes = list(run.outcomes())
    for outcome in outcomes:
        raw.write(outcome)
    raw.close()
    (found,) = read_runs(tmp_path / "raw.jsonl")
    assert found.num_turns == SMALL.num_turns == summary(found).turns.answered
    assert (found.workload, found.seed, found.scale) == ("published", 0, SMALL.scale)
    assert found.duration_s == run.machine.now_s == max(o.end_s for o in outcomes)
    for one, other in zip(found.records, outcomes, strict=True):
        assert one.token_times == other.token_times_s.tolist()
        assert (one.turn, one.sent_s) == (other.number, round(other.sent_s, 6))
        assert (one.cached_tokens, one.status) == (other.cached_tokens, "ok")
    figures = summary(found)
    assert figures.hit_rate == pytest.approx(cache_bound.hit_rate(SMALL), abs=1e-12)
    assert figures.output_tokens == SMALL.output_tokens


def test_a_rate_is_of_sessions_that_nobody_started() -> None:
    own = [session(turn([i]), name=f"s{i}", start_s=10.0 * i) for i in range(3)]
    child = replace(session(turn([7]), name="s0/a", start_s=90.0), parent="s0")
    run = Simulation(Workload("w", 0, 1.0, (*own, child)), HALF, ROOMY)
    assert header(run, 1.0)["rate"] == 2 / 20.0


def test_tokens_that_are_near_may_be_one_event() -> None:
    (found,) = play(session(turn([1], output=7)))  # from 0.5 on, each 0.5 later
    assert record(found)["token_counts"] == [1] * 7
    merged = record(found, event_s=1.5)
    assert (merged["token_times"], merged["token_counts"]) == ([1.5, 3.0, 3.5], [3, 3, 1])
    assert (merged["first_token_s"], merged["output_tokens"]) == (0.5, 7)


@pytest.fixture(scope="module")
def four() -> Estimate:
    mesh, load = Mesh(tp=4, ep=4), Load(batch=16, context=50_000)
    return estimate(open_model("minimax-m2"), mesh, DEVICES["h200"], load)


def test_a_decode_step_is_the_planners(four: Estimate) -> None:
    profile = RooflineProfile(four)
    for batch, context in [(1, 1000), (16, 50_000), (64, 120_000)]:
        step = Step(batch, batch, 1, context)
        expected = stage_time(four.workload, four.device, step, 0).total_s
        shape = StepShape(batch, batch * (context + 1), NO_ROWS, NO_ROWS, batch)
        assert profile.step_s([shape]) == pytest.approx(expected, rel=0.01)
        grown = profile.step_s([shape.later(100)]) - profile.step_s([shape])
        assert 100 * profile.growth_s([shape]) == pytest.approx(grown, rel=1e-6)


@pytest.mark.parametrize(("start", "count"), [(0, 8192), (100_000, 700), (60_000, 17)])
def test_a_chunk_is_the_planners(four: Estimate, start: int, count: int) -> None:
    step = Step(1, 1, count, start)
    expected = stage_time(four.workload, four.device, step, 0).total_s
    chunk = StepShape(0, 0, np.array([start], np.int32), np.array([count], np.int32), 1)
    assert RooflineProfile(four).step_s([chunk]) == pytest.approx(expected, rel=0.02)


def test_the_slowest_rank_counts() -> None:
    load = Load(batch=8)
    found = estimate(open_model("minimax-m2"), Mesh(dp=4, ep=4), DEVICES["h200"], load)
    profile = RooflineProfile(found)
    one = StepShape(2, 100_000, NO_ROWS, NO_ROWS, 2)
    assert profile.step_s([one, NOTHING, NOTHING, NOTHING]) == profile.step_s([one] * 4)
    staged = replace(found, workload=replace(found.workload, mesh=Mesh(pp=2)))
    with pytest.raises(ValueError, match="stages"):
        RooflineProfile(staged)
    with pytest.raises(ValueError, match="host_s"):
        RooflineProfile(found, host_s=float("nan"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"name": "p", "coefficients": {"steps": 1.0}}', "no feature steps"),
        ('{"name": "p", "coefficients": {"step": -1.0}}', "finite and not negative"),
        ('{"name": "p", "coefficients": {"step": 1.0}, "experts_per_token": 2}', "experts"),
        ('{"name": "p"}', "coefficients"),
        ("[]", "profile.json"),
        ("{", "profile.json"),
        pytest.param("[" * 100_000, "profile.json: maximum recursion", id="deep"),
    ],
)
def test_what_is_no_profile_is_refused(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ValueError, match=what):
        read_profile(tmp_path / "profile.json")


def test_the_command_plays_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload, profile, raw = (tmp_path / name for name in ("w.jsonl", "p.json", "raw.jsonl"))
    sessions = (session(turn([1, 2], output=5), turn([3], keep=2, output=5)),)
    write_workload(workload, Workload("w", 0, 1.0, sessions))
    profile.write_text('{"name": "half", "coefficients": {"step": 0.5}}')
    words = ["simulate", str(workload), "--profile", str(profile), "--num-pages", "99"]
    words += ["--max-model-len", "999", "--output", str(raw), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["duration_s"], found["tps_p50"]) == (2, 5.0, 2.0)
    assert found["hit_rate"] == 2 * BLOCK / (2 * BLOCK + 3 * BLOCK)
    assert [len(run.records) for run in read_runs(raw)] == [2]


def test_the_command_makes_workloads_for_devices_of_the_planner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept.jsonl"
    words = "simulate published --sessions 2 --scale 40 --model minimax-m2 --gpu b200 --tp 2 --ep 2"
    assert main([*words.split(), "--write-workload", str(kept)]) == 0
    text = capsys.readouterr().out
    assert "minimax-m2 on 2 x B200 SXM" in text
    assert len(read_workload(kept).sessions) == 2


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("", "give either --model or --profile"),
        ("--model demo --profile x", "give either --model or --profile"),
        ("--profile x --tp 2", "--tp: --profile says all"),
        ("--profile x", "give --num-pages and --max-model-len"),
        ("--model demo --seed 1", "--seed: only for generated"),
        ("--model demo --overlap-depth 2", "overlap_depth"),
        ("--model demo --event-s nan", "--event-s"),
        ("--model demo --output .", "--output .: cannot be written: Is a directory"),
        ("--model demo --write-workload no/w", "--write-workload no/w: cannot be written: No such"),
        ("--model demo --seed -1", "--seed must be at least 0: -1"),
        ("--model minimax-m2", "exceed"),
    ],
)
def test_impossible_commands_are_refused(
    flags: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text("\n".join(map(json.dumps, (NAMES, GOOD))))
    assert main(["simulate", str(path), *flags.split()]) == 2
    assert what in capsys.readouterr().err
