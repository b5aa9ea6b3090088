# SPDX-License-Identifier: MIT
"""The simulator: exact virtual times, and the stretches of steps against steps one by one."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tokenspeed.simulation.clients import Clients
from tokenspeed.simulation.device_profile import LinearProfile, StepShape
from tokenspeed.simulation.options import SimulationOptions
from tokenspeed.simulation.sessions import Session, Turn, Workload
from tokenspeed.simulation.simulate import Outcome, Simulation

BLOCK = 64
HALF = LinearProfile("half a second a step", {"step": 0.5})
ROOMY = SimulationOptions(num_pages=10_000, max_model_len=100_000)


def turn(
    blocks: Sequence[int],
    *,
    keep: int = 0,
    tail: int = 0,
    output: int = 3,
    gap_s: float = 0.0,
    cancel_after: int | None = None,
) -> Turn:
    """A prompt of `keep` blocks of the one before, `blocks` and `tail` further tokens."""
    tokens = (keep + len(blocks)) * BLOCK + tail
    return Turn(gap_s, "tool", tokens, output, cancel_after, keep, np.array(blocks, np.int64))


def session(*turns: Turn, name: str = "s", start_s: float = 0.0, user: str = "u") -> Session:
    return Session(name, user, None, start_s, BLOCK, turns)


def play(
    *sessions: Session,
    profile: LinearProfile = HALF,
    options: SimulationOptions = ROOMY,
    num_dp: int = 1,
) -> list[Outcome]:
    """All outcomes, by session and turn."""
    run = Simulation(Workload("w", 0, 1.0, sessions), profile, options, num_dp=num_dp)
    outcomes = list(run.outcomes())
    assert not run.machine.has_work()
    return sorted(outcomes, key=lambda o: (o.session.session_id, o.number))


def times(outcome: Outcome) -> list[float]:
    return outcome.token_times_s.tolist()


def test_every_token_has_the_time_of_its_step() -> None:
    profile = LinearProfile(
        "exact",
        {"step": 1.0, "decode_rows": 0.25, "prefill_tokens": 1 / 64, "context_thousands": 125.0},
    )
    options = replace(ROOMY, max_num_batched_tokens=64)
    (found,) = play(session(turn([1, 2], output=3)), profile=profile, options=options)
    # Two chunks of 64 tokens over 64 and 128 tokens of context, then two rows over 129 and 130.
    ends = np.cumsum([1 + 1 + 8, 1 + 1 + 16, 1.25 + 16.125, 1.25 + 16.25])
    assert times(found) == ends[1:].tolist()
    assert (found.sent_s, found.end_s, found.status) == (0.0, ends[-1], "ok")


def test_what_arrives_in_a_step_was_sent_then_and_waits_for_its_end() -> None:
    early = session(turn([1], output=4), name="a")
    late = session(turn([2], output=1), name="b", start_s=0.625)
    idle = session(turn([3], output=1), name="c", start_s=7.3)
    first, second, third = play(early, late, idle)
    assert times(first) == [0.5, 1.0, 1.5, 2.0]
    assert (second.sent_s, times(second)) == (0.625, [1.5])  # with the step that begins at 1.0
    assert (third.sent_s, times(third)) == (7.3, [7.8])  # at once: the device was idle


def test_a_request_is_known_to_the_engine_later_than_it_is_sent() -> None:
    (found,) = play(session(turn([1], output=1)), profile=replace(HALF, request_s=0.125))
    assert (found.sent_s, times(found)) == (0.0, [0.625])


@pytest.mark.parametrize(("depth", "step_s"), [(0, 0.625), (1, 0.5)])
def test_the_hosts_work_counts_unless_steps_overlap(depth: int, step_s: float) -> None:
    options = replace(ROOMY, overlap_depth=depth)
    profile = replace(HALF, host_s=0.125)
    (found,) = play(session(turn([1], output=5)), profile=profile, options=options)
    assert times(found) == pytest.approx(0.625 + step_s * np.arange(5), abs=1e-12)


def test_a_step_takes_time() -> None:
    with pytest.raises(ValueError, match="a step takes no time"):
        LinearProfile("none", {"decode_rows": 1.0})

    class Instant(LinearProfile):
        def step_s(self, shapes: Sequence[StepShape]) -> float:
            return 0.0

    with pytest.raises(ValueError, match=r"a step takes 0\.0 s"):
        play(session(turn([1])), profile=Instant("instant", {"step": 1.0}))


def test_hits_are_counted_in_whole_pages() -> None:
    found = play(
        session(
            turn([1, 2, 3], tail=10),
            turn([4], keep=3, gap_s=1.0),
            turn([5, 6], keep=1),
            turn([7], keep=3, tail=1),
        )
    )
    assert [o.cached_tokens for o in found] == [0, 3 * BLOCK, BLOCK, 3 * BLOCK]
    assert found[1].sent_s == found[0].end_s + 1.0
    assert [o.cached_tokens for o in play(session(turn([1, 2]), turn([], keep=2)))] == [0, BLOCK]
    without = replace(ROOMY, enable_prefix_caching=False)
    assert [
        o.cached_tokens for o in play(session(turn([1]), turn([2], keep=1)), options=without)
    ] == [
        0,
        0,
    ]


def test_sessions_share_what_their_blocks_share() -> None:
    early, late = session(turn([1, 2, 3]), name="a"), session(turn([1, 2, 9]), name="b", start_s=9)
    assert [o.cached_tokens for o in play(early, late)] == [0, 2 * BLOCK]


def test_dictated_answers_come_back_in_the_next_prompt() -> None:
    two = session(turn([1], tail=24, output=110), turn([2, 3, 4], keep=1, tail=5))
    assert [o.cached_tokens for o in play(two)] == [0, BLOCK]
    # 64 + 24 tokens of prompt and 109 of the answer have keys and values: three whole pages.
    forced = play(two, options=replace(ROOMY, forced=True))
    assert [o.cached_tokens for o in forced] == [0, 3 * BLOCK]


def test_a_client_hangs_up() -> None:
    first, second = play(session(turn([1], output=9, cancel_after=4), turn([2], keep=1)))
    assert (first.status, times(first)) == ("cancelled", [0.5, 1.0, 1.5, 2.0])
    assert (second.status, second.sent_s) == ("ok", 2.0)


def test_what_cannot_be_served_ends_its_session() -> None:
    options = replace(ROOMY, max_model_len=100)
    first, second = play(
        session(turn([1, 2]), turn([], keep=1)),
        session(turn([3], output=99), name="t"),
        options=options,
    )
    assert (first.status, first.http_status, times(first)) == ("error", 400, [])
    assert second.status == "ok"
    assert len(second.token_times_s) == 100 - BLOCK


@pytest.mark.parametrize("forced", [False, True])
def test_no_more_of_a_prompt_is_made_than_would_be_taken(forced: bool) -> None:
    long, short = turn([1, 2], tail=2**31 - 200), turn([3], output=2**31 - 1)
    own = session(long), session(short, turn([], tail=2**31 - 200), name="t")
    clients = Clients(own, forced=forced, most_tokens=100)
    first, second = clients.due(0.0)
    assert first.prompt.tolist() == [1] * 64 + [2] * 36
    assert second.prompt.tolist() == [3] * 64
    if forced:
        assert first.answer is not None
        assert second.answer is not None
        assert (len(first.answer), len(second.answer)) == (0, 36)
    (refused, served, refused_too) = play(*own, options=replace(ROOMY, max_model_len=100))
    assert (refused.status, refused.error) == (refused_too.status, refused_too.error)
    assert refused.error == "the prompt leaves no room in max_model_len"
    assert len(served.token_times_s) == 36


def test_a_full_queue_refuses() -> None:
    options = replace(ROOMY, max_num_seqs=1, max_queue_len=1, retries=0)
    many = [session(turn([i], output=2), name=f"{i}", start_s=i / 64) for i in range(4)]
    found = play(*many, options=options)
    assert [o.status for o in found] == ["ok", "ok", "refused", "refused"]
    assert (found[2].http_status, found[2].end_s) == (503, 0.5)


def test_a_closed_loop_keeps_so_many_under_way() -> None:
    many = [session(turn([i], output=2), name=f"{i}", start_s=100.0 - i) for i in range(4)]
    found = play(*many, options=replace(ROOMY, concurrency=2))
    assert [(o.sent_s, o.end_s) for o in found] == [(0.0, 1.0), (0.0, 1.0), (1.0, 2.0), (1.0, 2.0)]


def test_times_of_sessions_are_scaled_and_cut() -> None:
    one = session(turn([1], output=1), turn([2], keep=1, output=1, gap_s=8.0), start_s=5.0)
    far = session(turn([3], output=1), name="t", start_s=25.0)
    found = play(one, far, options=replace(ROOMY, time_scale=0.5))
    assert [o.sent_s for o in found] == [0.0, 4.5, 10.0]  # the first session begins the run
    cut = play(one, far, options=replace(ROOMY, time_scale=0.5, duration_s=10.0))
    assert [o.sent_s for o in cut] == [0.0, 4.5]


@pytest.mark.parametrize(
    ("idle_s", "cached"), [(3.0, [0, BLOCK, 0]), (10.0, [0, BLOCK, 2 * BLOCK])]
)
def test_what_is_idle_for_long_is_dropped(idle_s: float, cached: list[int]) -> None:
    turns = turn([1]), turn([2], keep=1, gap_s=2.0), turn([3], keep=2, gap_s=4.0)
    found = play(session(*turns), options=replace(ROOMY, idle_s=idle_s))
    assert [o.cached_tokens for o in found] == cached


def agents(num_sessions: int, seed: int = 0, most_output: int = 90) -> list[Session]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(num_sessions):
        keep, turns = 0, []
        for k in range(6):
            blocks = range(10_000 * i + 20 * k, 10_000 * i + 20 * k + int(rng.integers(1, 12)))
            lengths = {
                "tail": int(rng.integers(BLOCK)),
                "output": int(rng.integers(1, most_output)),
            }
            cancel = 5 if rng.random() < 0.1 else None
            gap_s = float(rng.exponential(0.4))
            turns.append(turn(blocks, keep=keep, gap_s=gap_s, cancel_after=cancel, **lengths))
            keep = (keep + len(blocks)) if rng.random() < 0.9 else 1
        start_s, user = float(rng.uniform(0, 3)), f"u{i % 3}"
        found.append(session(*turns, name=f"s{i}", start_s=start_s, user=user))
    return found


SPEEDS = {"step": 4e-3, "decode_rows": 3e-4, "prefill_tokens": 2e-5, "context_thousands": 4e-4}


@pytest.mark.parametrize(
    ("pages", "num_dp", "forced"), [(5000, 1, False), (40, 1, False), (40, 1, True), (30, 2, False)]
)
def test_stretches_change_nothing(pages: int, num_dp: int, forced: bool) -> None:
    profile = LinearProfile("fast", SPEEDS, host_s=1e-3)
    options = SimulationOptions(
        num_pages=pages, max_model_len=1920, max_num_seqs=6, max_num_batched_tokens=256
    )
    options = replace(options, forced=forced, noise=0.1, noise_seed=7)
    workload = Workload("w", 0, 1.0, tuple(agents(9, most_output=500)))
    quick, slow = (
        Simulation(
            workload,
            profile,
            replace(options, stretches=stretches),
            num_dp=num_dp,
        )
        for stretches in (True, False)
    )
    for one, other in zip(quick.outcomes(), slow.outcomes(), strict=True):
        assert (one.session, one.number, one.status) == (other.session, other.number, other.status)
        assert one.cached_tokens == other.cached_tokens
        assert times(one) == pytest.approx(times(other), abs=1e-9)
    assert quick.machine.num_steps == slow.machine.num_steps == slow.machine.num_calls
    assert quick.machine.num_calls < slow.machine.num_calls / 2
    same = ("num_preemptions", "prefix_queries", "prefix_hits")
    assert {n: quick.stats()[n] for n in same} == {n: slow.stats()[n] for n in same}
    assert (quick.stats()["num_preemptions"] > 0) == (pages < 5000)


def test_the_same_run_twice_is_the_same() -> None:
    options = replace(ROOMY, noise=0.2, noise_seed=3)
    runs = [play(*agents(4), profile=LinearProfile("f", SPEEDS), options=options) for _ in range(2)]
    assert [times(o) for o in runs[0]] == [times(o) for o in runs[1]]
    other = play(*agents(4), options=replace(options, noise_seed=4))
    assert [times(o) for o in runs[0]] != [times(o) for o in other]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_pages", 0),
        ("page_size", 1.5),
        ("overlap_depth", 2),
        ("time_scale", float("nan")),
        ("time_scale", -1.0),
        ("duration_s", float("inf")),
        ("noise", 1.0),
        ("concurrency", True),
    ],
)
def test_impossible_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(ROOMY, **{field: value})
