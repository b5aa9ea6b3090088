# SPDX-License-Identifier: MIT
"""Measures of runs whose events have known times; every number is worked out by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tokenspeed.bench.measure import Percentiles, Price, Rates, summary
from tokenspeed.bench.records import RequestRecord, Run, lines_of, read_runs, write_runs
from tokenspeed.bench.windows import weighted_percentile, window_rates, worst_rate


def record(**fields) -> RequestRecord:
    given = {"session_id": "s", "turn": 0, "endpoint": "a", "dialect": "chat", "kind": "user"}
    return RequestRecord(**(given | {"asked_output_tokens": 9, "sent_s": 0.0} | fields))


def stream(times, counts=None, **fields) -> RequestRecord:
    """A record that ended well, with its events."""
    counts = counts or [1] * len(times)
    given = {"first_token_s": times[0], "end_s": times[-1], "output_tokens": sum(counts)}
    return record(token_times=list(times), token_counts=counts, **(given | fields))


def run(*records, **fields) -> Run:
    given = {"endpoint": "a", "base_url": "http://h", "model": "m", "started_at": "2026-01-02"}
    given |= {"duration_s": 60.0, "workload": "w", "seed": 1, "scale": 1.0, "dialect": "chat"}
    return Run(**(given | {"concurrency": 2, "records": list(records)} | fields))


def every(step_s, count, start=0.0):
    return [start + i * step_s for i in range(count)]


@pytest.mark.parametrize("start", [0.0, 0.1, 1234.1, 1e6 + 0.7])
def test_a_steady_stream_has_one_rate_in_all_windows(start):
    rates = window_rates(every(0.1, 21, start), np.ones(21))
    assert rates.tolist() == [10.0] * 11


def test_the_last_window_ends_at_the_last_token():
    assert window_rates([0.0, 0.5, 1.0, 1.05], [1, 1, 1, 1]).tolist() == [2.0, 3.0]
    stalled = window_rates([*every(0.1, 11), 1.95], [1] * 12)
    # From 0.0, 0.1 .. 0.9 and then 0.95: a token at 1.0 is in all but what came before it thins.
    assert stalled.tolist() == [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 2.0]


def test_a_stream_of_less_than_a_second_is_one_window_of_its_own_length():
    assert window_rates([3.0, 3.2, 3.4], [1, 1, 1]).tolist() == [5.0]
    assert window_rates([3.0, 4.0], [1, 7]).tolist() == [7.0]


def test_tokens_of_an_event_count_and_the_first_event_is_before_the_clock():
    assert window_rates([0.0, 0.5, 1.0], [4, 2, 6]).tolist() == [8.0]


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_what_counting_finds(seed):
    random = np.random.default_rng(seed)
    at = np.cumsum(random.integers(0, 400_000, random.integers(2, 40))).tolist()  # microseconds
    counts = random.integers(1, 5, len(at)).tolist()
    whole = at[-1] - at[0]
    length = min(whole, 1_000_000)
    begins = [at[0] + i * 100_000 for i in range(1000) if i * 100_000 + length <= whole]
    begins += [at[-1] - length] if begins[-1] + length < at[-1] else []
    expected = [
        sum(n for t, n in zip(at, counts, strict=True) if begin < t <= begin + length)
        for begin in begins
    ]
    rates = window_rates(np.array(at) / 1e6, counts)
    assert rates.tolist() == pytest.approx([n * 1e6 / length for n in expected], abs=1e-9)


@pytest.mark.parametrize("times", [[], [1.0], [1.0, 1.0]])
def test_one_moment_is_no_stream(times):
    assert window_rates(times, [1] * len(times)).size == 0


def test_percentiles():
    rates = np.arange(101.0)
    assert worst_rate(rates) == 1.0
    assert worst_rate(np.array([10.0, 20.0])) == 10.1
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([8.0, 1.0, 1.0])
    assert [weighted_percentile(values, weights, p) for p in (1, 10, 20, 21, 100)] == [
        1.0,
        1.0,
        2.0,
        3.0,
        3.0,
    ]


FAST = stream(every(0.05, 41), session_id="f", sent_s=-0.5)  # 2 s at 20 TPS
SLOW = stream(every(0.25, 17), session_id="s", sent_s=-1.5)  # 4 s at 4 TPS
SHORT = stream([0.0, 0.5], session_id="t", sent_s=-2.5)  # 0.5 s at 2 TPS


def test_floor_attainment_is_a_share_of_stream_seconds():
    found = summary(run(FAST, SLOW, SHORT), floors=(2.0, 4.0, 4.1, 20.0, 30.0)).floors
    assert [one.attainment for one in found] == [1.0, 6 / 6.5, 2 / 6.5, 2 / 6.5, 0.0]
    assert [one.held_streams for one in found] == [3, 2, 1, 1, 0]
    assert [one.num_streams for one in found] == [3] * 5
    assert [one.held_users for one in found] == [6.5 / 60, 6 / 60, 2 / 60, 2 / 60, 0.0]


def test_a_dip_counts_for_as_long_as_windows_see_it():
    # 2 s at 10 TPS, a second of silence, 2 s at 10 TPS. Of 41 windows those that begin from 1.1 to
    # 2.8 miss a token or more.
    dip = stream([*every(0.1, 21), *every(0.1, 21, 3.0)])
    rates = window_rates(dip.token_times, dip.token_counts)
    assert (len(rates), rates.min(), (rates < 10).sum()) == (41, 1.0, 18)
    (found,) = summary(run(dip), floors=(10.0,)).floors
    assert found.attainment == pytest.approx(23 / 41, abs=1e-12)
    assert found.held_streams == 0
    # One percent of the windows may be below a floor that 99% are above.
    (low,) = summary(run(dip), floors=(worst_rate(rates),)).floors
    assert low.held_streams == 1


def test_what_broke_is_never_held_and_its_seconds_count():
    broken = replace(FAST, status="error", error="gone")
    (found,) = summary(run(broken, SLOW), floors=(4.0,)).floors
    assert (found.attainment, found.num_streams, found.held_streams) == (1.0, 2, 1)
    left = replace(FAST, status="cancelled")
    assert summary(run(left, SLOW), floors=(4.0,)).floors[0].held_streams == 2
    assert summary(run(left, SLOW)).ttft_s.count == 2
    assert summary(run(left, SLOW)).latency_s.count == 1


def test_rates():
    found = summary(run(FAST, SLOW, SHORT))
    assert found.stream_tps == Rates(p50=4.0, p10=2.4, p1=2.04, least=2.0)
    # By time: 0.5 s at 2, 4 s at 4, 2 s at 20.
    assert found.window_tps == Rates(p50=4.0, p10=4.0, p1=2.0, least=2.0)
    assert found.inter_token_s.count == 40 + 16 + 1
    assert found.inter_token_s.p50 == pytest.approx(0.05, abs=1e-12)
    assert found.inter_token_s.p99 == pytest.approx(0.25 + 0.25 * 0.44, abs=1e-12)


def test_tokens_of_one_event_share_its_wait():
    found = summary(run(stream([0.0, 0.3, 0.5], [1, 3, 1])))
    assert found.inter_token_s.count == 4
    assert found.inter_token_s.mean == pytest.approx((0.1 * 3 + 0.2) / 4, abs=1e-12)


def test_events_that_tell_no_numbers_share_all_tokens():
    # 3 events, 12 tokens in all: 4 each.
    found = summary(run(stream([0.0, 1.0, 2.0], output_tokens=12)), floors=(4.0, 4.1))
    assert found.stream_tps == Rates(4.0, 4.0, 4.0, 4.0)
    assert [one.attainment for one in found.floors] == [1.0, 0.0]
    assert found.inter_token_s.p50 == 0.25


def test_cached_and_computed_input_are_apart():
    warm = stream([1.0, 2.0], input_tokens=1000, cached_tokens=960)
    cold = stream([1.0, 2.0], input_tokens=500, cached_tokens=0)
    found = summary(run(warm, cold, duration_s=30.0), devices=2)
    assert (found.cached_input_tokens, found.computed_input_tokens) == (960, 540)
    assert found.cached_input_per_minute == 960.0
    assert found.computed_input_per_minute == 540.0
    assert found.output_tokens_per_minute == 4.0
    assert found.total_tokens_per_minute == 1504.0
    assert found.hit_rate == 0.64


def test_an_answer_without_a_text_has_a_prompt():
    """Its tokens are parts of a letter, or special ones: no event carries them."""
    silent = record(end_s=2.0, input_tokens=400, cached_tokens=300, output_tokens=3)
    found = summary(run(silent, FAST), floors=(4.0,))
    assert (found.computed_input_tokens, found.cached_input_tokens) == (100, 300)
    assert (found.output_tokens, found.hit_rate, found.ttft_s.count) == (44, 0.75, 1)
    assert found.floors[0].num_streams == 1


def test_a_hit_rate_is_of_those_that_tell():
    silent = stream([1.0, 2.0], input_tokens=1000)
    told = stream([1.0, 2.0], input_tokens=100, cached_tokens=25)
    assert summary(run(silent)).hit_rate is None
    found = summary(run(silent, told))
    assert found.hit_rate == 0.25
    assert found.computed_input_tokens == 1075


def test_first_tokens_are_classed_by_what_had_to_be_computed():
    records = [
        stream([3.0, 4.0], sent_s=1.0, input_tokens=100_000, cached_tokens=99_900),
        stream([2.0, 4.0], sent_s=1.0, input_tokens=1023, cached_tokens=0),
        stream([5.0, 6.0], sent_s=1.0, input_tokens=1023),
        stream([9.0, 9.5], sent_s=1.0, input_tokens=70_000, cached_tokens=0),
    ]
    found = summary(run(*records))
    assert [(one.least, one.below, one.ttft_s.count) for one in found.ttft_by_uncached] == [
        (0, 256, 1),
        (256, 1024, 2),
        (65536, None, 1),
    ]
    assert found.ttft_by_uncached[0].ttft_s.p50 == 2.0
    assert found.ttft_by_uncached[1].ttft_s == Percentiles(2, 2.5, 2.5, 3.7, pytest.approx(3.97))
    assert found.ttft_s == Percentiles(4, 3.75, 3.0, pytest.approx(6.8), pytest.approx(7.88))


def test_refusals():
    refused = [
        record(status="refused", http_status=503, sent_s=1.0, end_s=1.25, retry_after_s=4.0),
        record(status="refused", http_status=429, sent_s=1.0, end_s=1.75),
    ]
    found = summary(run(FAST, SLOW, *refused))
    assert found.statuses == {"ok": 2, "refused": 2}
    assert (found.num_requests, found.num_sessions) == (4, 2)
    assert (found.refusals.count, found.refusals.share) == (2, 0.5)
    assert found.refusals.answer_s == Percentiles(2, 0.5, 0.5, 0.7, 0.745)
    assert found.refusals.with_retry_after == 1
    assert found.refusals.retry_after_s.p99 == 4.0


def test_cost_of_a_session():
    one = stream([1.0, 2.0], session_id="a", input_tokens=3_000_000, cached_tokens=2_000_000)
    two = stream([1.0, 2.0], [1, 999_999], session_id="b", input_tokens=0, cached_tokens=0)
    both = run(one, two, duration_s=1800.0)
    assert summary(both).cost_per_session is None
    price = Price(computed_input=3.0, cached_input=0.25, output=15.0, device_hour=2.0)
    # 3 + 0.5 + 15.00003 for tokens and 2 for two devices in half an hour, over two sessions.
    found = summary(both, price=price, devices=2)
    assert found.cost_per_session == pytest.approx((3 + 0.5 + 15.00003 + 2) / 2, abs=1e-9)


def test_a_run_with_nothing_in_it():
    found = summary(run(duration_s=0.0), floors=(70.0,))
    assert (found.num_requests, found.ttft_s, found.stream_tps, found.hit_rate) == (0, *[None] * 3)
    assert (found.floors[0].attainment, found.total_tokens_per_minute) == (0.0, 0.0)
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_floor_must_be_a_rate(floor):
    with pytest.raises(ValueError, match="floors"):
        summary(run(), floors=(floor,))


def test_a_summary_is_json():
    found = json.loads(json.dumps(summary(run(FAST), floors=(10.0,)).to_json(), allow_nan=False))
    assert found["floors"] == [
        {
            "floor": 10.0,
            "attainment": 1.0,
            "num_streams": 1,
            "held_streams": 1,
            "held_users": 2.0 / 60,
        }
    ]


def test_the_raw_file_holds_runs_and_gives_them_back(tmp_path):
    path = tmp_path / "raw.jsonl"
    runs = [run(FAST, SHORT), run(SLOW, endpoint="b", died="ConnectError: gone", rate=0.5)]
    write_runs(path, runs)
    assert read_runs(path) == runs
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["session_id" in line for line in lines] == [False, True, True, False, True]
    assert "records" not in lines[0]
    assert "".join(line for one in runs for line in lines_of(one)) == path.read_text()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda lines: ["{"], ":1: "),
        (lambda lines: ["[]"], ":1: must be a JSON object"),
        (lambda lines: lines[1:], ":1: a record comes before"),
        (lambda lines: [lines[0], lines[1].replace('"ok"', '"fine"')], ":2: status"),
        (lambda lines: [lines[0].replace("seed", "sead")], ":1: .*sead"),
        (lambda lines: [lines[0], lines[1].replace("[0.0,", "[")], ":2: token_counts"),
    ],
)
def test_a_file_of_something_else_is_refused_by_its_line(tmp_path, change, why):
    path = tmp_path / "raw.jsonl"
    path.write_text("\n".join(change("".join(lines_of(run(SHORT))).splitlines())))
    with pytest.raises(ValueError, match=why):
        read_runs(path)
