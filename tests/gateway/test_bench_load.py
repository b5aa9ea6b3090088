# SPDX-License-Identifier: MIT
"""The load generator against scripted servers on a clock of their own: exact times, no waiting."""

import asyncio
import json
import time

import httpx
import pytest

from tests.gateway.scripted_endpoint import Reply, ScriptedServers, chat_pieces, event, run_virtual
from tokenspeed.bench import compare
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.load import LoadOptions, run_load, with_arrivals
from tokenspeed.bench.measure import Price, summary
from tokenspeed.bench.prompts import Prompts
from tokenspeed.bench.report import summary_table, warnings
from tokenspeed.bench.series import cloud_of
from tokenspeed.bench.session import Session, Turn, Workload
from tokenspeed.bench.turns import Turns

A, B = Endpoint("a", "http://a", "m"), Endpoint("b", "http://b/v1", "m")
TEXTS = Prompts(seed=1)


def turn(blocks, *, gap_s=0.0, out=4, kind="user", **more) -> Turn:
    return Turn(tuple(blocks), 8 * len(blocks), out, gap_s, kind, 0, **more)


def session(name, *turns, start_s=0.0, user="u", parent=None) -> Session:
    return Session(name, turns, 8, start_s, user, parent)


def workload(*sessions) -> Workload:
    return Workload("w", sessions, seed=3, scale=2.0)


def load(servers, sessions, *endpoints, **options):
    """The runs of a workload, on the virtual clock."""
    observe, stop_at = options.pop("observe", None), options.pop("stop_at", None)

    async def run(clock):
        stop = asyncio.Event()
        if stop_at is not None:
            asyncio.get_running_loop().call_at(stop_at, stop.set)
        return await run_load(
            endpoints or (A,),
            workload(*sessions),
            TEXTS,
            LoadOptions(**options),
            observe=observe,
            stop=stop,
            transport=servers,
            clock=clock,
        )

    return run_virtual(run)


def steady(num_tokens=4, step_s=0.5, **how):
    return lambda seen: Reply(chat_pieces(num_tokens, step_s, **how))


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


def test_bursts_are_counted_as_the_events_tell():
    servers = ScriptedServers(steady(10, 0.5, burst=4))
    (run,) = load(servers, [session("s", turn([1], out=10))])
    (record,) = run.records
    assert (record.token_times, record.token_counts) == ([0.5, 1.0, 1.5], [4, 4, 2])
    assert summary(run).stream_tps.p50 == 6.0


def test_events_that_do_not_tell_are_one_token_each_and_the_end_tells_the_whole():
    servers = ScriptedServers(steady(10, 0.5, burst=4, tells=False, cached=None))
    (run,) = load(servers, [session("s", turn([1], out=10))])
    (record,) = run.records
    assert (record.token_counts, record.output_tokens) == ([1, 1, 1], 10)
    assert (record.input_tokens, record.cached_tokens) == (100, None)


def test_usage_in_the_last_event_alone_is_no_burst():
    pieces = [(1.0, event({"choices": [{"delta": {"content": "a"}}]}))] * 2
    last = {"choices": [{"delta": {"content": "b"}, "finish_reason": "stop"}]}
    pieces.append((1.0, event(last | {"usage": {"prompt_tokens": 5, "completion_tokens": 9}})))
    (run,) = load(ScriptedServers(lambda seen: Reply(pieces)), [session("s", turn([1]))])
    assert run.records[0].token_counts == [1, 1, 1]
    assert run.records[0].output_tokens == 9


def test_events_may_be_cut_anywhere():
    whole = b"".join(piece for _, piece in chat_pieces(3, 0.0))
    crlf = whole.replace(b"\n", b"\r\n").replace(b"data: ", b": keep-alive\r\n\r\ndata:")
    for bytes_ in (whole, crlf):
        pieces = [(0.001, bytes_[i : i + 1]) for i in range(len(bytes_))]
        servers = ScriptedServers(lambda seen, pieces=pieces: Reply(pieces))
        (run,) = load(servers, [session("s", turn([1]))])
        assert (run.records[0].status, run.records[0].output_tokens) == ("ok", 3)


def test_reasoning_and_arguments_are_first_tokens_and_a_role_is_not():
    deltas = [
        {"role": "assistant", "content": ""},
        {"tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"function": {"arguments": "{"}}]},
        {"reasoning_content": "hm"},
        {"content": "x"},
    ]
    pieces = [(1.0, event({"choices": [{"delta": delta}]})) for delta in deltas]
    pieces.append((1.0, event({"choices": [{"delta": {}, "finish_reason": "stop"}]})))
    (run,) = load(ScriptedServers(lambda seen: Reply(pieces)), [session("s", turn([1]))])
    assert run.records[0].first_token_s == 3.0
    assert run.records[0].token_times == [3.0, 4.0, 5.0]


def test_llama_servers_timings_tell_what_was_cached():
    end = {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}
    end |= {"usage": {"prompt_tokens": 9}, "timings": {"cache_n": 6}}
    (run,) = load(
        ScriptedServers(lambda seen: Reply([(0.0, event(end))])), [session("s", turn([1]))]
    )
    assert (run.records[0].input_tokens, run.records[0].cached_tokens) == (9, 6)


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_refusal_is_recorded_and_ends_its_session(status):
    refusal = Reply([(0.0, b'{"error":1}')], status, {"retry-after": "3"}, before_s=0.25)
    servers = ScriptedServers(lambda seen: refusal)
    (run,) = load(servers, [session("s", turn([1]), turn([1, 2])), session("t", turn([4]))])
    assert [(r.session_id, r.status, r.http_status) for r in run.records] == [
        ("s", "refused", status),
        ("t", "refused", status),
    ]
    (record, _) = run.records
    assert (record.retry_after_s, record.end_s, record.error) == (3.0, 0.25, '{"error":1}')
    assert summary(run).refusals.answer_s.p99 == 0.25


def test_retries_come_when_they_were_told_to():
    def answer(seen):
        if seen.at < 6.0:
            return Reply([], 503, {"retry-after": "2.5"})
        return Reply(chat_pieces(4, 0.5))

    servers = ScriptedServers(answer)
    (run,) = load(servers, [session("s", turn([1]), turn([1, 2]))], retries=5)
    assert [(r.sent_s, r.turn, r.status) for r in run.records] == [
        (0.0, 0, "refused"),
        (2.5, 0, "refused"),
        (5.0, 0, "refused"),
        (7.5, 0, "ok"),
        (9.5, 1, "ok"),
    ]
    (few,) = load(ScriptedServers(answer), [session("s", turn([1]), turn([1, 2]))], retries=1)
    assert [record.status for record in few.records] == ["refused", "refused"]
    servers = ScriptedServers(lambda seen: Reply([], 503, {"retry-after": "Thu, 1 Jan 2026"}))
    (blind,) = load(servers, [session("s", turn([1]))], retries=2)
    assert [(r.sent_s, r.retry_after_s) for r in blind.records] == [(0, None), (1, None), (2, None)]


def test_a_turn_that_waits_for_its_retry_at_the_end_was_refused():
    def answer(seen):
        if (name := seen.headers["x-session-id"]) == "mute":
            return Reply([(0.0, None)])
        if name == "late" and seen.at >= 2.0:
            return Reply(chat_pieces(4, 0.5))
        return Reply([], 503, {"retry-after": "4" if name == "never" else "2"})

    sessions = [session(name, turn([1]), turn([1, 2])) for name in ("late", "never", "mute")]
    (run,) = load(ScriptedServers(answer), sessions, retries=9, duration_s=6.25)
    assert sorted((r.session_id, r.turn, r.sent_s, r.status) for r in run.records) == [
        ("late", 0, 0.0, "refused"),
        ("late", 0, 2.0, "ok"),
        ("late", 1, 4.0, "ok"),
        ("mute", 0, 0.0, "cancelled"),
        ("never", 0, 0.0, "refused"),
        ("never", 0, 4.0, "refused"),
    ]
    assert summary(run).turns == Turns(
        planned=6, sent=4, answered=2, hung_up=0, refused=1, failed=0, cut_off=1
    )
    assert summary(run).turns.unanswered == 2


def tried(answer, *sessions, **options):
    """Whether so many sessions at once held a floor of 1 token per second."""

    async def run(clock):
        bench = compare.Bench((A,), workload(*sessions), LoadOptions(**options), words=1.0)
        return await compare.try_floor(bench, compare.Judge((1.0,)), 0.99, len(sessions), 0)

    with pytest.MonkeyPatch.context() as patch:
        servers = ScriptedServers(answer)
        whole = compare.run_load

        async def scripted(*args, **how):
            clock = asyncio.get_running_loop().time
            return await whole(*args, transport=servers, clock=clock, **how)

        patch.setattr(compare, "run_load", scripted)
        return run_virtual(run)


def test_who_got_no_answer_was_not_held():
    def answer(seen):
        if seen.headers["x-session-id"] == "mute":
            return Reply([(0.0, None)])
        return Reply(chat_pieces(10, 0.5))

    one, mute = session("0", turn([1], out=10)), session("mute", turn([2], out=10))
    left = session("left", turn([3], out=10, cancel_after=3))
    assert tried(answer, one, duration_s=60.0).held
    alone = tried(answer, one, mute, duration_s=60.0)
    assert alone.found.statuses == {"cancelled": 1, "ok": 1}
    assert not alone.held
    # Who hangs up amid the tokens was served; where there is nobody else, nothing was answered.
    assert tried(answer, one, left).held
    assert not tried(answer, left).held


def test_who_is_answered_in_the_end_was_held():
    def answer(seen):
        return Reply([], 503, {"retry-after": "3"}) if seen.at < 4.0 else Reply(chat_pieces(4, 0.5))

    one = session("0", turn([1]))
    assert not tried(answer, one, retries=1).held
    assert tried(answer, one, retries=2).held


def test_a_retry_after_that_is_no_time_is_none():
    for told in ("inf", "nan", "-3", "soon"):
        servers = ScriptedServers(lambda seen, told=told: Reply([], 503, {"retry-after": told}))
        (run,) = load(servers, [session("s", turn([1]))], retries=1)
        assert [(r.sent_s, r.retry_after_s) for r in run.records] == [(0, None), (1, None)]


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([event({"error": {"message": "too bad"}})], "too bad"),
        ([event({"choices": [{"delta": {"content": "x"}}]})], "ended before the answer"),
        ([b"data: {nonsense\n\n"], "not JSON"),
        ([b"data: [1]\n\n"], "not an object"),
        ([event({"choices": [None]})], "another shape"),
        ([event({"choices": [{"delta": {"content": 5}}]})], "says 5"),
        ([event({"choices": [], "usage": "many"})], "another shape"),
        ([event({"choices": [], "usage": {"prompt_tokens": "many"}})], "counts 'many'"),
        ([event({"choices": [], "usage": {"completion_tokens": -3}})], "counts -3"),
        ([event({"choices": [], "usage": {"prompt_tokens_details": [1]}})], "another shape"),
        ([httpx.ReadError("reset by peer")], "ReadError: reset by peer"),
    ],
)
def test_an_answer_that_breaks_is_an_error_and_the_rest_goes_on(pieces, why):
    broken = Reply([(0.5, piece) for piece in pieces])

    def answer(seen):
        return broken if seen.headers["x-session-id"] == "s" else Reply(chat_pieces(4, 0.5))

    (run,) = load(
        ScriptedServers(answer), [session("s", turn([1]), turn([1, 2])), session("t", turn([4]))]
    )
    assert [(r.session_id, r.status) for r in run.records] == [("s", "error"), ("t", "ok")]
    assert why in run.records[0].error
    assert run.died is None


def test_a_http_error_is_an_error():
    servers = ScriptedServers(lambda seen: Reply([(0.0, b"no such model")], 404))
    (run,) = load(servers, [session("s", turn([1]))])
    (record,) = run.records
    assert (record.status, record.http_status, record.error) == ("error", 404, "no such model")


def test_a_dead_endpoint_keeps_its_records_and_the_other_goes_on():
    servers = ScriptedServers(steady(10, 0.5), a=7.25)
    sessions = [session(str(i), turn([i], out=10), start_s=i * 2.0) for i in range(8)]
    dead, alive = load(servers, sessions, A, B)
    # It dies at 7.25, between two events of the streams that were sent at 4 and 6.
    assert [(r.sent_s, r.status) for r in dead.records] == [
        (0.0, "ok"),
        (2.0, "ok"),
        (4.0, "error"),
        (6.0, "error"),
    ]
    assert dead.died == "ReadError: connection reset"
    assert [record.error for record in dead.records[2:]] == [dead.died] * 2
    assert [len(record.token_times) for record in dead.records] == [10, 10, 6, 2]
    assert [record.end_s for record in dead.records] == [5.0, 7.0, 7.5, 7.5]
    assert dead.duration_s == 7.5
    assert len(servers.seen_by("a")) == 4
    assert [(r.sent_s, r.status) for r in alive.records] == [(i * 2.0, "ok") for i in range(8)]
    assert alive.died is None
    assert summary(dead).statuses == {"error": 2, "ok": 2}


def test_silent_streams_of_a_dead_endpoint_are_not_waited_for():
    def answer(seen):
        if seen.headers["x-session-id"] == "silent":
            return Reply([(0.5, event({"choices": [{"delta": {"content": "x"}}]})), (0.0, None)])
        return Reply(chat_pieces(10, 0.5))

    servers = ScriptedServers(answer, a=2.25)
    sessions = [session("silent", turn([1])), session("t", turn([2], out=10))]
    (run,) = load(servers, sessions, concurrency=2)
    assert [(r.session_id, r.status, r.end_s) for r in run.records] == [
        ("silent", "error", 2.5),
        ("t", "error", 2.5),
    ]
    assert run.records[0].token_times == [0.5]
    assert run.records[0].error == "the endpoint died: ReadError: connection reset"


def test_a_closed_loop_sends_nothing_to_the_dead():
    servers = ScriptedServers(steady(10, 0.5), a=2.25)
    sessions = [session(str(i), turn([i], out=10)) for i in range(50)]
    (run,) = load(servers, sessions, concurrency=2)
    assert [record.status for record in run.records] == ["error", "error"]


def test_an_endpoint_that_never_was_there():
    servers = ScriptedServers(steady(), c=0.0)
    nameless = Endpoint("c", "http://c")
    gone, alive = load(servers, [session("s", turn([1]))], nameless, B)
    assert (gone.records, gone.died) == ([], "/v1/models: ConnectError: connection refused")
    assert [record.status for record in alive.records] == ["ok"]


def test_what_could_not_be_sent_is_recorded_too():
    sessions = [session(str(i), turn([i], gap_s=i * 1.0)) for i in range(4)]
    (run,) = load(ScriptedServers(steady(4, 0.5), a=0.5), sessions, concurrency=4)
    assert [(r.session_id, r.end_s, r.error) for r in run.records] == [
        ("0", 0.5, "ReadError: connection reset")
    ]
    (run,) = load(ScriptedServers(steady(), a=0.0), sessions, concurrency=4)
    (record,) = run.records
    assert (record.status, record.http_status, record.input_tokens) == ("error", None, 8)
    assert record.error == run.died == "ConnectError: connection refused"


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


def test_a_client_that_hangs_up_does_so_after_its_tokens_and_goes_on():
    servers = ScriptedServers(steady(10, 0.5))
    turns = [turn([1], out=10, cancel_after=3), turn([1, 2], out=10)]
    (run,) = load(servers, [session("s", *turns)])
    assert [(r.status, r.end_s, r.output_tokens) for r in run.records] == [
        ("cancelled", 1.5, 3),
        ("ok", 6.5, 10),
    ]


def test_what_a_stream_could_not_tell_is_not_taken_for_computed():
    """The endpoint says at the end alone what was cached."""
    servers = ScriptedServers(steady(10, 0.5, tells=False, prompt=90, cached=64))
    turns = [turn([1, 2], out=10, cancel_after=3), turn([1, 2, 3], out=10)]
    (run,) = load(servers, [session("s", *turns)])
    assert [record.cached_tokens for record in run.records] == [None, 64]
    found = summary(run, price=Price(computed_input=1e6))
    assert (found.computed_input_tokens, found.cached_input_tokens) == (26, 64)
    assert (found.untold_requests, found.untold_input_tokens) == (1, 16)
    assert (found.output_tokens, found.cost_per_session) == (13, 26.0)
    assert [(one.least, one.ttft_s.count) for one in found.ttft_by_uncached] == [(0, 1)]
    assert cloud_of(run).uncached_tokens == (26,)
    assert warnings([run]) == [
        "a, all at once: 1 of 2 ended before it was told what of their prompts was cached; these"
        " prompts are left out"
    ]
    assert dict(summary_table([found]).rows)["prompt tokens left out"] == "16 in 1 requests"


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


@pytest.mark.parametrize(
    ("path", "field"),
    [("/tokenize", "prompt"), ("/tokenize", "content"), ("/extras/tokenize", "input"), ("", "")],
)
def test_servers_are_asked_to_tokenize_as_they_know_it(path, field):
    def answer(request):
        assert request.headers["x-api-key"] == "k"
        body = json.loads(request.content)
        if (request.url.path, field in body) != (path, True):
            return httpx.Response(400, json={"error": "unknown field"})
        return httpx.Response(200, json={"tokens": [1, 2] * len(body[field].split())})

    endpoint = Endpoint("a", "http://a/v1", "m", api_key="k")
    words, reason = asyncio.run(compare.calibrate([endpoint], httpx.MockTransport(answer)))
    if path:
        assert (words, reason) == (2.0, None)
    else:
        assert words == 1.0
        assert reason.startswith("a: HTTPError: does not tokenize (/tokenize with 'prompt': HTTP")


@pytest.mark.parametrize("said", [b"none", b"[]", b'{"tokens": "x"}', b'{"tokens": [null]}'])
def test_what_is_no_ids_is_an_error_of_its_request(said):
    answer = httpx.MockTransport(lambda request: httpx.Response(200, content=said))
    (run,) = load(answer, [session("s", turn([1]))], forced=True)
    assert (run.records[0].status, run.died) == ("error", None)
    assert run.records[0].error.startswith("HTTPError: does not tokenize")


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


RESPONSES = [
    {"type": "response.created", "response": {}},
    {"type": "response.reasoning_text.delta", "delta": "hm"},
    {"type": "response.output_text.delta", "delta": "x"},
    {"type": "response.function_call_arguments.delta", "delta": "{"},
    {
        "type": "response.completed",
        "response": {
            "usage": {
                "input_tokens": 90,
                "output_tokens": 3,
                "input_tokens_details": {"cached_tokens": 64},
            }
        },
    },
]
MESSAGES = [
    {
        "type": "message_start",
        "message": {
            "usage": {
                "input_tokens": 16,
                "cache_creation_input_tokens": 10,
                "cache_read_input_tokens": 64,
                "output_tokens": 1,
            }
        },
    },
    {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}},
    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "x"}},
    {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{"}},
    {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 3}},
    {"type": "message_stop"},
]


@pytest.mark.parametrize(
    ("dialect", "events", "path"),
    [("responses", RESPONSES, "/v1/responses"), ("messages", MESSAGES, "/v1/messages")],
)
def test_the_other_dialects(dialect, events, path):
    pieces = [(1.0, b"event: e\n" + event(one)) for one in events]
    servers = ScriptedServers(lambda seen: Reply(pieces))
    endpoint = Endpoint("a", "http://a", "m", dialect)
    (run,) = load(servers, [session("s", turn([1], out=7))], endpoint, forced=True)
    (record,) = run.records
    assert (record.status, record.error) == ("ok", None)
    assert (record.first_token_s, record.token_times) == (2.0, [2.0, 3.0, 4.0])
    assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (90, 64, 3)
    (seen,) = servers.seen
    assert seen.url == f"http://a{path}"
    assert len(seen.body["forced_output_ids"]) == 7
    assert 7 in (seen.body.get("max_tokens"), seen.body.get("max_output_tokens"))
    assert json.dumps(seen.body).count(TEXTS.text(session("s", turn([1])), 0)) == 1


@pytest.mark.parametrize(
    ("dialect", "last"),
    [
        ("responses", {"type": "response.failed", "response": {"error": {"message": "bad"}}}),
        ("responses", {"type": "error", "message": "bad"}),
        ("messages", {"type": "error", "error": {"message": "bad"}}),
    ],
)
def test_the_other_dialects_errors(dialect, last):
    servers = ScriptedServers(lambda seen: Reply([(1.0, event(last))]))
    (run,) = load(servers, [session("s", turn([1]))], Endpoint("a", "http://a", "m", dialect))
    assert (run.records[0].status, run.records[0].error) == ("error", "bad")
