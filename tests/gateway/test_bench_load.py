# SPDX-License-Identifier: MIT
"""The load generator's timing against scripted servers: what is sent, when, and until when."""

import time

import httpx
import pytest

from tests.gateway.bench_loads import TEXTS, A, B, load, session, steady, turn, workload
from tests.gateway.scripted_endpoint import ScriptedServers
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.load import LoadOptions, with_arrivals


def test_a_request_is_recorded_with_its_times():
    servers = ScriptedServers(steady(4, 0.5, first_s=1.0, prompt=70, cached=64))
    (run,) = load(servers, [session("s", turn([1, 2], gap_s=2.0))])
    (record,) = run.records
    assert (record.sent_s, record.first_token_s, record.end_s) == (2.0, 3.5, 5.0)
    assert record.token_times == [3.5, 4.0, 4.5, 5.0]
    assert record.token_counts == [1, 1, 1, 1]
    assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (70, 64, 4)
    assert (record.status, record.http_status, record.error) == ("ok", 200, None)
    assert (record.session_id, record.turn, record.kind) == ("s", 0, "user")
    assert (record.endpoint, record.dialect, record.asked_output_tokens) == ("a", "chat", 4)
    assert (run.duration_s, run.workload, run.seed, run.scale) == (5.0, "w", 3, 2.0)
    assert (run.endpoint, run.base_url, run.model, run.died) == ("a", "http://a", "m", None)


def test_what_is_sent_is_what_the_trace_says():
    servers = ScriptedServers(steady())
    load(servers, [session("s", turn([1, 2], out=7), user="ann", parent="p")])
    (seen,) = servers.seen
    assert seen.url == "http://a/v1/chat/completions"
    assert seen.body == {
        "model": "m",
        "messages": [{"role": "user", "content": TEXTS.text(session("s", turn([1, 2])), 0)}],
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
        "user": "ann",
    }
    assert (seen.headers["x-session-id"], seen.headers["x-parent-session-id"]) == ("s", "p")


def test_a_session_of_any_name_is_sent():
    servers = ScriptedServers(steady())
    names = ["a/b 1:2", "s\u00e9ance", "line\nbreak", "100%"]
    (run,) = load(servers, [session(name, turn([1]), parent="\u00e9") for name in names])
    assert [record.status for record in run.records] == ["ok"] * 4
    sent = [seen.headers["x-session-id"] for seen in servers.seen]
    assert sent == ["a/b 1:2", "s%C3%A9ance", "line%0Abreak", "100%25"]
    assert servers.seen[0].headers["x-parent-session-id"] == "%C3%A9"


def test_an_endpoints_key_headers_and_fields_are_sent():
    servers = ScriptedServers(steady())
    endpoint = Endpoint(
        "c",
        "http://c/v1/",
        api_key="k",
        headers={"x-tokenspeed-tps-floor": "70"},
        extra={"temperature": 0},
        token_counts=False,
    )
    (run,) = load(servers, [session("s", turn([1]))], endpoint, ignore_eos=False)
    (seen,) = servers.seen
    assert seen.url == "http://c/v1/chat/completions"
    assert (seen.headers["authorization"], seen.headers["x-api-key"]) == ("Bearer k", "k")
    assert seen.headers["x-tokenspeed-tps-floor"] == "70"
    assert (seen.body["model"], seen.body["temperature"]) == ("scripted", 0)
    assert seen.body["stream_options"] == {"include_usage": True}
    assert "ignore_eos" not in seen.body
    assert run.model == "scripted"


def test_turns_follow_one_another_after_their_gaps():
    servers = ScriptedServers(steady(4, 0.5))
    turns = [turn([1]), turn([1, 2], gap_s=3.0, kind="tool"), turn([1, 2, 3], gap_s=1.0)]
    (run,) = load(servers, [session("s", *turns)])
    # Each answer takes 2 s.
    assert [(r.sent_s, r.end_s) for r in run.records] == [(0.0, 2.0), (5.0, 7.0), (8.0, 10.0)]
    assert [record.kind for record in run.records] == ["user", "tool", "user"]
    (half,) = load(ScriptedServers(steady(4, 0.5)), [session("s", *turns)], time_scale=0.5)
    assert [record.sent_s for record in half.records] == [0.0, 3.5, 6.0]


def test_an_open_loop_sends_when_the_workload_says():
    servers = ScriptedServers(steady(4, 0.5))
    sessions = [session(str(i), turn([i]), start_s=10.0 + i / 4) for i in range(8)]
    (run,) = load(servers, sessions)
    assert [record.sent_s for record in run.records] == [i / 4 for i in range(8)]
    assert servers.most_open == 8
    assert (run.concurrency, run.rate) == (None, 4.0)


def test_a_closed_loop_keeps_so_many_sessions_under_way():
    servers = ScriptedServers(steady(4, 0.5))
    sessions = [session(str(i), turn([i]), start_s=100.0 * i) for i in range(7)]
    (run,) = load(servers, sessions, concurrency=3)
    assert [record.sent_s for record in run.records] == [0.0] * 3 + [2.0] * 3 + [4.0]
    assert servers.most_open == 3
    assert (run.concurrency, run.rate, run.duration_s) == (3, None, 6.0)


def test_arrivals_at_random_have_their_rate_and_their_seed():
    sessions = workload(*(session(str(i), turn([i])) for i in range(4000)))
    made = with_arrivals(sessions, 8.0, seed=5)
    starts = [one.start_s for one in made.sessions]
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(500.0, rel=0.05)
    assert made == with_arrivals(sessions, 8.0, seed=5) != with_arrivals(sessions, 8.0, seed=6)
    with pytest.raises(ValueError, match="rate"):
        with_arrivals(sessions, 0.0)


FAMILY = (
    session("a", turn([1]), start_s=10.0),
    session("b/x", turn([2]), start_s=12.0, parent="b"),  # begins with the one that starts it
    session("b", turn([3]), start_s=12.0),
    session("b/x/y", turn([4]), start_s=15.0, parent="b/x"),
    session("c", turn([5]), start_s=20.0),
    session("a/x", turn([6]), start_s=24.0, parent="a"),
)


def test_a_rate_is_of_sessions_that_nobody_started():
    made = with_arrivals(workload(*FAMILY), 2.0)
    alone = with_arrivals(workload(*(one for one in FAMILY if one.parent is None)), 2.0)
    starts = {one.session_id: one.start_s for one in made.sessions}
    assert [one.session_id for one in made.sessions if one.parent is None] == ["a", "b", "c"]
    for one in alone.sessions:  # the same draws, whatever they start
        assert starts[one.session_id] == pytest.approx(one.start_s, abs=1e-9)
    assert starts["b/x"] - starts["b"] == pytest.approx(0.0, abs=1e-9)
    assert starts["b/x/y"] - starts["b"] == pytest.approx(3.0, abs=1e-9)
    assert starts["a/x"] - starts["a"] == pytest.approx(14.0, abs=1e-9)
    assert [one.start_s for one in made.sessions] == sorted(starts.values())
    (run,) = load(ScriptedServers(steady(4, 0.5)), FAMILY)
    assert run.rate == 2 / 10.0
    assert [record.sent_s for record in run.records] == [0.0, 2.0, 2.0, 5.0, 10.0, 14.0]


def test_endpoints_take_turns_and_their_clocks_stand_still_meanwhile():
    servers = ScriptedServers(steady(4, 0.5))
    sessions = [session(str(i), turn([i])) for i in range(4)]
    first, second = load(servers, sessions, A, B, concurrency=1, rounds=2)
    hosts = [httpx.URL(seen.url).host for seen in servers.seen]
    assert hosts == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert [seen.at for seen in servers.seen] == [2.0 * i for i in range(8)]
    for run in (first, second):
        assert [record.sent_s for record in run.records] == [0.0, 2.0, 4.0, 6.0]
        assert [record.session_id for record in run.records] == ["0", "1", "2", "3"]
        assert run.duration_s == 8.0
    assert servers.seen[0].body == servers.seen[2].body


def test_a_run_is_cut_off_at_its_time():
    servers = ScriptedServers(steady(10, 0.5))
    sessions = [session(str(i), turn([i], out=10)) for i in range(9)]
    (run,) = load(servers, sessions, concurrency=2, duration_s=7.25)
    assert [(r.status, r.end_s) for r in run.records] == [
        ("ok", 5.0),
        ("ok", 5.0),
        ("cancelled", 7.25),
        ("cancelled", 7.25),
    ]
    assert [len(record.token_times) for record in run.records[2:]] == [4, 4]
    assert run.records[2].output_tokens == 4
    assert (run.duration_s, servers.open) == (7.25, 0)


def test_who_asks_to_stop_gets_what_there_is():
    servers = ScriptedServers(steady(10, 0.5))
    done = []
    sessions = [session(str(i), turn([i], out=10)) for i in range(9)]
    runs = load(servers, sessions, A, B, concurrency=1, stop_at=6.25, observe=done.append)
    assert [record.status for record in runs[0].records] == ["ok", "cancelled"]
    assert runs[1].records == []
    assert done == runs[0].records


def test_answers_go_back_where_the_recorded_ones_stood():
    servers = ScriptedServers(steady(4, 0.5))
    turns = [turn([1, 2], out=8), turn([1, 2, 3, 4], out=8), turn([1, 2, 3, 4, 5, 6], out=8)]
    one = session("s", *turns)
    load(servers, [one], history="answers")
    recorded = TEXTS.conversation(one, 2)
    assert [role for role, _ in recorded] == ["user", "assistant", "user", "assistant", "user"]
    said = [message["content"] for message in servers.seen[2].body["messages"]]
    came = "word " * 4
    assert said == [recorded[0][1], came, recorded[2][1], came, recorded[4][1]]
    assert servers.seen[2].body["messages"][:3] == servers.seen[1].body["messages"]


def test_dictated_answers_are_the_recorded_ones():
    servers = ScriptedServers(steady(4, 0.5))
    one = session("s", turn([1, 2], out=8), turn([1, 2, 3, 4], out=20))
    (run,) = load(servers, [one], forced=True)
    for index, asked in ((0, 8), (1, 20)):
        ids = [len(word) for word in TEXTS.answer(one, index).split()]
        assert servers.seen[index].body["forced_output_ids"] == (ids * 20)[:asked]
    assert run.forced


def test_a_wall_clock_that_jumps_moves_nothing(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: -1e9)
    (run,) = load(ScriptedServers(steady(4, 0.5)), [session("s", turn([1]))])
    assert run.records[0].end_s == 2.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"rounds": 0},
        {"time_scale": -1.0},
        {"time_scale": float("nan")},
        {"duration_s": 0.0},
        {"duration_s": float("inf")},
        {"retries": -1},
        {"stall_s": 0.0},
        {"stall_s": -1.0},
        {"stall_s": float("nan")},
        {"stall_s": float("inf")},
        {"history": "none"},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoadOptions(**wrong)


def test_a_load_needs_endpoints_with_names_and_sessions():
    with pytest.raises(ValueError, match="endpoints"):
        load(ScriptedServers(steady()), [session("s", turn([1]))], A, A)
    with pytest.raises(ValueError, match="workload"):
        load(ScriptedServers(steady()), [])
    with pytest.raises(ValueError, match="workload: each session needs an id"):
        load(ScriptedServers(steady()), [session("s", turn([1])), session("s", turn([2]))])
    with pytest.raises(ValueError, match="dialect"):
        Endpoint("a", "http://a", dialect="telepathy")
    with pytest.raises(ValueError, match="base_url"):
        Endpoint("a", "a:80")
    with pytest.raises(ValueError, match="base_url: Invalid port"):
        Endpoint("a", "http://a:port")
    with pytest.raises(ValueError, match="headers: "):
        Endpoint("a", "http://a", headers={"x-name": "s\u00e9ance"})
