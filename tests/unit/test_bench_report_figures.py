# SPDX-License-Identifier: MIT
"""Figures by their definitions: vLLM's names, tables of summaries, and the search for capacity."""

from dataclasses import dataclass

import pytest

from tokenspeed.bench.capacity import find_capacity
from tokenspeed.bench.html import Table
from tokenspeed.bench.measure import Price, summary
from tokenspeed.bench.records import RequestRecord, Run
from tokenspeed.bench.report import (
    curves_of,
    json_line,
    number,
    overview_table,
    summary_table,
    text,
    ttft_table,
    warnings,
)
from tokenspeed.bench.serving import serving_result, serving_text


def record(sent: float, times: list[float], status: str = "ok", **given: object) -> RequestRecord:
    values: dict[str, object] = {
        "session_id": "s", "turn": 0, "endpoint": "ours", "dialect": "chat", "kind": "user",
        "asked_output_tokens": len(times), "sent_s": sent, "status": status, "input_tokens": 100,
        "first_token_s": times[0] if times else None, "end_s": times[-1] if times else sent,
        "output_tokens": len(times), "token_times": times, "token_counts": [1] * len(times),
    }  # fmt: skip
    return RequestRecord(**(values | given))  # type: ignore[arg-type]


def run_of(*records: RequestRecord, **given: object) -> Run:
    values: dict[str, object] = {
        "endpoint": "ours", "base_url": "http://h", "model": "m", "started_at": "", "workload": "w",
        "duration_s": 10.0, "seed": 0, "scale": 1.0, "dialect": "chat", "concurrency": 2,
    }  # fmt: skip
    return Run(**(values | given), records=list(records))  # type: ignore[arg-type]


ANSWERED = record(1.0, [1.5, 2.0, 2.5, 3.0], cached_tokens=40)  # 2 TPS, TTFT 0.5 s
REFUSED = record(2.0, [], "refused", end_s=2.04, retry_after_s=3.0, error="too\n  busy")


def test_serving_figures_are_those_of_vllm() -> None:
    slow = record(0.0, [1.0, 3.0, 5.0])  # TTFT 1 s, TPOT 2 s
    found = serving_result(
        run_of(ANSWERED, slow, REFUSED), ["ttft", "tpot", "itl", "e2el"], [50.0, 99.9]
    )
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (200, 7)
    assert found["request_throughput"] == pytest.approx(0.2)
    assert found["output_throughput"] == pytest.approx(0.7)
    assert found["total_token_throughput"] == pytest.approx(20.7)
    assert found["mean_ttft_ms"] == pytest.approx(750.0)
    assert found["std_ttft_ms"] == pytest.approx(250.0)
    assert found["p99.9_ttft_ms"] == pytest.approx(999.5)
    assert found["mean_tpot_ms"] == pytest.approx(1250.0)
    assert found["median_itl_ms"] == pytest.approx(500.0)  # 500, 500, 500, 2000, 2000
    assert found["mean_e2el_ms"] == pytest.approx(3500.0)
    assert "P99.9 TTFT (ms):                            999.50" in serving_text(found, ["ttft"])


def test_who_hung_up_has_not_failed() -> None:
    left = record(0.0, [1.0, 2.0], "cancelled", session_id="left")
    run = run_of(ANSWERED, left, num_turns=4)
    found = serving_result(run, ["ttft"], [50.0])
    assert (found["completed"], found["failed"], found["cancelled"]) == (1, 0, 1)
    assert "Cancelled requests:                              1" in serving_text(found, ["ttft"])
    assert "Cancelled" not in serving_text(serving_result(run_of(ANSWERED), [], []), [])
    (row,) = overview_table([summary(run)]).rows
    assert row[-2:] == ("0", "1")
    rows = dict(summary_table([summary(run)]).rows)
    assert (rows["failed"], rows["cancelled"], rows["turns sent"]) == ("0", "1", "2 of 4")
    assert rows["turns without an answer"] == "0"


def test_a_turn_is_what_its_last_request_was() -> None:
    again = record(3.0, [3.5, 4.0], turn=1)
    mute = record(4.0, [], "cancelled", turn=2)
    runs = [run_of(record(2.0, [], "refused", turn=1), again, mute), run_of(REFUSED)]
    rows = {row[0]: row[1:] for row in summary_table([summary(run) for run in runs]).rows}
    assert rows["turns sent"] == ("2", "1")
    assert rows["turns without an answer"] == ("1: 1 cut off", "1: 1 refused")
    assert rows["refused"] == ("1 (33.3%), 0 with Retry-After", "1 (100.0%), 1 with Retry-After")


def test_serving_figures_of_nothing_are_left_out() -> None:
    found = serving_result(run_of(REFUSED, duration_s=0.0), ["ttft"], [99.0])
    assert "mean_ttft_ms" not in found
    assert found["output_throughput"] == 0.0


def test_a_summary_becomes_rows() -> None:
    run = run_of(ANSWERED, REFUSED)
    table = summary_table([summary(run, [1.5, 4.0], Price(output=1e6), devices=2)])
    assert table.header == ("", "ours, 2 at once")
    rows = dict(table.rows)
    assert rows["answered"] == "1"
    assert rows["refused"] == "1 (50.0%), 1 with Retry-After"
    assert rows["refused after, ms, p50 / p90 / p99"] == "40.0 / 40.0 / 40.0"
    assert rows["time to first token, ms, p50 / p90 / p99"] == "500 / 500 / 500"
    assert rows["between tokens, ms, p50 / p90 / p99"] == "500 / 500 / 500"
    assert rows["output tokens a minute and device"] == "12"  # 4 in 10 s on 2 devices
    assert rows["computed prompt tokens a minute and device"] == "180"
    assert rows["cached prompt tokens a minute and device"] == "120"
    assert rows["all tokens a minute and device"] == "312"
    assert rows["cache hit rate"] == "40.0%"
    assert rows["cost of a session"] == "4"
    assert rows["floor 1.5: share of stream-seconds"] == "100.0%"
    assert rows["floor 1.5: streams held at p99"] == "1 of 1"
    assert rows["floor 4: streams held at p99"] == "0 of 1"
    plain = summary_table([summary(run)])
    assert "cost of a session" not in {row[0] for row in plain.rows}


def test_first_tokens_stand_in_their_class() -> None:
    long = record(0.0, [8.0, 9.0], input_tokens=70_000)
    table = ttft_table([summary(run_of(ANSWERED, long)), summary(run_of(ANSWERED, endpoint="b"))])
    assert table.rows == [
        ("0 to 255", "0.5 / 0.5 / 0.5", "0.5 / 0.5 / 0.5"),
        ("65,536 or more", "8 / 8 / 8", "–"),
    ]


def test_a_frontier_is_of_one_endpoint() -> None:
    fast = record(1.0, [1.5, 1.6, 1.7])
    runs = [run_of(fast, concurrency=8), run_of(fast, endpoint="b"), run_of(ANSWERED), run_of()]
    curves = curves_of([summary(run) for run in runs], lambda one: one.output_tokens_per_minute)
    assert [(c.name, [p.load for p in c.points]) for c in curves] == [
        ("ours", ["2", "8"]),
        ("b", ["2"]),
    ]
    assert curves[0].points[0].tps_per_user == pytest.approx(2.0)
    assert curves[0].points[0].tokens_per_minute == pytest.approx(24.0)
    assert curves[0].points[1].tps_per_user == pytest.approx(10.0)


def test_the_overview_has_a_row_for_each_run() -> None:
    runs = [run_of(ANSWERED, REFUSED), run_of(endpoint="silent")]
    table = overview_table([summary(run, [1.5]) for run in runs])
    assert table.rows == [
        ("ours, 2 at once", "2", "2", "24", "624", "500", "500", "40.0%", "1", "0", "100.0%"),
        ("silent, 2 at once", "–", "–", "0", "0", "–", "–", "–", "0", "0", "–"),
    ]
    assert len(table.header) == len(table.rows[0])


def test_warnings_say_what_a_figure_hides() -> None:
    broken = record(1.0, [2.0], "error", error="boom")
    said = warnings([run_of(broken, ANSWERED, REFUSED, died="gone"), run_of(record(0, [1, 2]))])
    assert said == [
        "ours, 2 at once: the endpoint died after 10.0 s: gone",
        "ours, 2 at once: 1 of 3 failed: boom",
        "ours, 2 at once: 1 of 3 were refused: too busy",
        "ours, 2 at once: 1 of 3 ended before it was told what of their prompts was cached; these"
        " prompts are left out",
        "ours, 2 at once: does not tell cached tokens; all count as computed",
    ]


def test_the_json_line_is_one() -> None:
    line = json_line("agentic", [summary(run_of(ANSWERED))], {"command": "x"})
    assert "\n" not in line
    assert line.startswith('{"benchmark": "agentic", "command": "x", "runs": [{"endpoint": "ours"')


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (3.0, "3"), (0.01234, "0.0123"), (12.34, "12.3"), (1234.5, "1,234")],
)
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_a_wide_table_is_folded() -> None:
    table = Table("T", ("", *("c" * 10 for _ in range(5))), [("row", *map(str, range(5)))])
    lines = text(table, width=32).splitlines()
    assert max(map(len, lines)) <= 32
    assert [line.split() for line in lines if line.startswith("  row")] == [
        ["row", "0", "1"], ["row", "2", "3"], ["row", "4"],
    ]  # fmt: skip


@dataclass
class Tried:
    held: bool


@pytest.mark.parametrize("start", [1, 3, 20])
@pytest.mark.parametrize("most", [1, 2, 20, 64])
async def test_capacity_is_found_everywhere(start: int, most: int) -> None:
    if start > most:
        with pytest.raises(ValueError, match="start must be"):
            await find_capacity(None, start=start, most=most)  # type: ignore[arg-type]
        return
    for true in range(most + 1):

        async def trial(streams: int, true: int = true) -> Tried:
            assert 1 <= streams <= most
            return Tried(streams <= true)

        found = await find_capacity(trial, start=start, most=most)
        assert (found.streams, found.capped) == (true, true == most)
        streams = [tried for tried, _ in found.trials]
        assert len(set(streams)) == len(streams) <= 13
