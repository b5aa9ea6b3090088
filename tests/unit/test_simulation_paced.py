# SPDX-License-Identifier: MIT
"""The simulator with floors, refusals that are obeyed, and drafts that may be wrong."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_simulation import BLOCK, HALF, ROOMY, agents, play, session, times, turn
from tokenspeed.bench.records import read_runs
from tokenspeed.bench.windows import window_rates
from tokenspeed.cli.main import main
from tokenspeed.planner.catalog import open_model
from tokenspeed.planner.devices import DEVICES
from tokenspeed.planner.estimate import Load, estimate
from tokenspeed.planner.roofline import Step, stage_time
from tokenspeed.simulation.device_profile import NO_ROWS, LinearProfile, StepShape
from tokenspeed.simulation.drafts import Drafts
from tokenspeed.simulation.options import SimulationOptions
from tokenspeed.simulation.roofline import RooflineProfile
from tokenspeed.simulation.sessions import Session, Workload, write_workload
from tokenspeed.simulation.simulate import Outcome, Simulation
from tokenspeed.spmd.mesh import Mesh

# ---- Refusals -----------------------------------------------------------------------------------


def test_a_full_queue_is_tried_again() -> None:
    options = replace(ROOMY, max_num_seqs=1, max_queue_len=1, retries=2)
    many = [session(turn([i], output=2), name=f"{i}", start_s=i / 64) for i in range(4)]
    found = play(*many, options=options)
    # Two steps of half a second for each: 0 until 1.0, 1 until 2.0. Who is refused at 0.5 comes
    # again at 1.5: 2 waits then, and 3 finds the queue full until 2.5.
    told = [(o.session.session_id, o.status, o.sent_s, o.end_s, o.retry_after_s) for o in found]
    assert told == [
        ("0", "ok", 0.0, 1.0, None),
        ("1", "ok", 1 / 64, 2.0, None),
        ("2", "refused", 2 / 64, 0.5, 1.0),
        ("2", "ok", 1.5, 3.0, None),
        ("3", "refused", 3 / 64, 0.5, 1.0),
        ("3", "refused", 1.5, 1.5, 1.0),
        ("3", "ok", 2.5, 4.0, None),
    ]
    once = play(*many, options=replace(options, retries=0))
    assert [o.status for o in once] == ["ok", "ok", "refused", "refused"]


SPEEDS = {"step": 12e-3, "decode_rows": 5e-4, "prefill_tokens": 1e-4, "context_thousands": 2e-5}
SPEEDS["verify_tokens"] = 1e-4
DEVICE = LinearProfile("device", SPEEDS, noise=0.1)


def crowd(number: int, output: int = 60) -> list[Session]:
    """Prompts of 640 tokens, one every 20 ms, three times as fast as they can be served."""
    return [
        session(
            turn(range(10 * i, 10 * i + 10), output=output),
            turn([2**20 + i], keep=10, output=output, gap_s=0.5),
            name=f"{i:03}",
            start_s=i / 50,
        )
        for i in range(number)
    ]


def attempts(found: list[Outcome]) -> dict[tuple[str, int], list[Outcome]]:
    each: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in sorted(found, key=lambda o: o.sent_s):
        each.setdefault((outcome.session.session_id, outcome.number), []).append(outcome)
    return each


def test_who_would_wait_too_long_is_refused_and_comes_again() -> None:
    options = replace(ROOMY, tps_floor=20.0, max_queue_wait_s=1.0, retries=50)
    each = attempts(play(*crowd(120), profile=DEVICE, options=options))
    assert len(each) == 240  # nobody gave up
    num_refused = 0
    for tries in each.values():
        assert [o.status for o in tries] == ["refused"] * (len(tries) - 1) + ["ok"]
        for refused, later in pairwise(tries):
            num_refused += 1
            assert refused.http_status == 503
            assert times(refused) == []
            told_s = refused.retry_after_s
            assert told_s is not None
            assert told_s >= 1
            assert told_s == int(told_s)
            assert later.sent_s == refused.end_s + told_s
            assert refused.end_s - refused.sent_s < 1.2  # its wait, and the step that ran then
    assert num_refused > 100


def test_who_is_refused_too_often_gives_up() -> None:
    options = replace(ROOMY, tps_floor=20.0, max_queue_wait_s=0.5, retries=1)
    each = attempts(play(*crowd(120), profile=DEVICE, options=options))
    given_up = [key for key, tries in each.items() if tries[-1].status == "refused"]
    assert given_up
    assert all(len(each[key]) == 2 for key in given_up)
    assert not any((name, 1) in each for name, number in given_up if number == 0)


# ---- Floors -------------------------------------------------------------------------------------


def least_rate(options: SimulationOptions) -> float:
    """Of any stream of eight in any second, while a prompt of 50,000 tokens is computed."""
    streams = [session(turn([i], output=1200), name=f"{i}") for i in range(8)]
    long = session(turn(range(100, 100 + 50_000 // BLOCK)), name="long", start_s=4.0)
    found = play(*streams, long, profile=DEVICE, options=options)
    assert [o.status for o in found] == ["ok"] * 9
    return min(float(window_rates(times(o), np.ones(1200)).min()) for o in found[:8])


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("drafts", [{}, {"acceptance": 0.7, "draft_depth": 3}], ids=len)
def test_floors_hold_while_a_long_prompt_arrives(
    overlap_depth: int, drafts: dict[str, Any]
) -> None:
    options = replace(ROOMY, max_num_batched_tokens=2048, overlap_depth=overlap_depth, **drafts)
    assert least_rate(options) < 8
    assert least_rate(replace(options, tps_floor=36.0)) >= 36  # of 62 without others


def test_the_same_paced_run_twice_is_the_same() -> None:
    options = replace(ROOMY, tps_floor=30.0, max_queue_wait_s=2.0, noise_seed=3)
    options = replace(options, acceptance=0.6, acceptance_spread=0.2, draft_depth=3)
    one, other = (play(*agents(6), profile=DEVICE, options=options) for _ in range(2))
    assert [times(o) for o in one] == [times(o) for o in other]


def test_a_profile_must_say_what_drafts_cost() -> None:
    with pytest.raises(ValueError, match="drafts need a coefficient `verify_tokens`"):
        play(session(turn([1])), options=replace(ROOMY, acceptance=0.5, draft_depth=1))


def test_pacing_is_for_one_group() -> None:
    workload = Workload("w", 0, 1.0, (session(turn([1])),))
    with pytest.raises(ValueError, match="tps_floor and max_queue_wait_s: pacing is for one"):
        Simulation(workload, HALF, replace(ROOMY, tps_floor=5.0), num_dp=2)


# ---- Drafts -------------------------------------------------------------------------------------

VERIFY = LinearProfile("verify", {"step": 1.0, "verify_tokens": 0.125, "verifies": 0.25})
FREE = LinearProfile("free", {"step": 0.5, "verify_tokens": 0.0})


def drafting(acceptance: float, depth: int = 3, **options: float) -> SimulationOptions:
    return replace(ROOMY, acceptance=acceptance, draft_depth=depth, **options)  # type: ignore[arg-type]


def test_right_drafts_come_with_their_step() -> None:
    (found,) = play(session(turn([1], output=10)), profile=FREE, options=drafting(1.0))
    assert times(found) == [0.5] + [1.0] * 4 + [1.5] * 4 + [2.0]


def test_wrong_drafts_cost_what_verifying_costs() -> None:
    (found,) = play(session(turn([1], output=6)), profile=VERIFY, options=drafting(0.0))
    # No more drafts than could all be right: three, three, two, one and none.
    steps = [1.0, 1.625, 1.5, 1.375, 1.0]
    assert times(found)[:1] == [1.0]
    assert times(found) == np.cumsum([1.0, 1.625, *steps[1:]]).tolist()


def test_a_row_with_drafts_waits_for_its_last_token() -> None:
    options = drafting(1.0, overlap_depth=1)
    (found,) = play(session(turn([1], output=9)), profile=FREE, options=options)
    # The step behind the prompt's is planned before anything is known; then each waits for one.
    assert times(found) == [0.5, 1.0] + [1.5] * 4 + [2.0] * 3


def test_as_many_drafts_are_right_as_was_said() -> None:
    run = Simulation(Workload("w", 0, 1.0, tuple(agents(20))), DEVICE, drafting(0.7))
    outcomes = list(run.outcomes())
    asked = {(s.session_id, k): t for s in agents(20) for k, t in enumerate(s.turns)}
    for o in outcomes:
        turn_ = asked[o.session.session_id, o.number]
        if o.status == "ok":
            assert len(o.token_times_s) == turn_.output_tokens
    stats = run.stats()
    share = stats["num_accepted_drafts"] / stats["num_drafts"]
    assert stats["num_drafts"] > 2000
    assert share == pytest.approx((0.7 + 0.7**2 + 0.7**3) / 3, abs=0.03)


def test_chances_vary_as_was_said_and_stay_a_requests() -> None:
    drafts = Drafts(0.6, spread=0.15, depth=4, seed=1)
    chances = np.array([drafts.chance(i) for i in range(3000)])
    assert chances.mean() == pytest.approx(0.6, abs=0.01)
    assert chances.std() == pytest.approx(0.15, abs=0.01)
    assert drafts.chance(17) == chances[17]
    right = drafts.accepted(np.array([1.0, 1.0, 0.0]), np.array([4, 2, 4], np.int32))
    assert right.tolist() == [4, 2, 0]
    assert (drafts.num_given, drafts.num_accepted) == (10, 6)


def test_verifying_is_the_planners() -> None:
    found = estimate(open_model("minimax-m2"), Mesh(tp=4, ep=4), DEVICES["h200"], Load(batch=64))
    for batch, context in [(1, 1000), (16, 50_000), (64, 20_000)]:
        parts = stage_time(found.workload, found.device, Step(batch, batch, 4, context), 0).parts
        every = Step(4 * batch, 4 * batch, 1, 0)  # a logit row for each token
        logits = stage_time(found.workload, found.device, every, 0).parts["logits"]
        expected = sum(parts.values()) - parts["logits"] + logits
        shape = StepShape(batch, batch * (context + 4), NO_ROWS, NO_ROWS, batch, 3 * batch)
        assert RooflineProfile(found).step_s([shape]) == pytest.approx(expected, rel=0.02)


# ---- Options and the command --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"tps_floor": 0.0}, "tps_floor"),
        ({"tps_floor": float("nan")}, "tps_floor"),
        ({"tps_floor": 1e6}, "tps_floor"),
        ({"max_queue_wait_s": -1.0}, "max_queue_wait_s"),
        ({"retries": -1}, "retries"),
        ({"acceptance": 0.5}, "draft_depth: give both"),
        ({"draft_depth": 2}, "draft_depth: give both"),
        ({"acceptance": 1.5, "draft_depth": 2}, "acceptance must be at most 1"),
        ({"acceptance": 0.5, "draft_depth": 0}, "draft_depth must be"),
        ({"acceptance": 0.9, "draft_depth": 2, "acceptance_spread": 0.3}, "acceptance_spread"),
        ({"acceptance_spread": 0.1}, "acceptance_spread"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        replace(ROOMY, **options)  # type: ignore[arg-type]


def test_the_command_tells_how_floors_were_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload, profile, raw = (tmp_path / name for name in ("w.jsonl", "p.json", "raw.jsonl"))
    write_workload(workload, Workload("w", 0, 1.0, tuple(crowd(40))))
    profile.write_text(json.dumps({"name": "device", "coefficients": SPEEDS}))
    words = ["simulate", str(workload), "--profile", str(profile), "--num-pages", "9999"]
    words += ["--max-model-len", "9999", "--output", str(raw), "--json"]
    words += ["--tps-floor", "20", "--max-queue-wait-s", "1", "--acceptance", "0.7"]
    assert main([*words, "--draft-depth", "3", "--floors", "20", "5000"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["attainment_of_20_tps"] > 0.95
    assert found["attainment_of_5000_tps"] == 0
    assert 0.3 < found["num_accepted_drafts"] / found["num_drafts"] < 0.6
    assert found["refused"] > 0
    assert found["step_time_error"] < 0.1
    (run,) = read_runs(raw)
    refused = [record for record in run.records if record.status == "refused"]
    assert len(refused) == found["refused"]
    assert all((record.retry_after_s or 0) >= 1 for record in refused)
    assert main([*words, "--draft-depth", "3", "--floors", "nan"]) == 2
    assert "--floors" in capsys.readouterr().err
