# SPDX-License-Identifier: MIT
"""The load generator where servers refuse, break off or die: what is recorded, and what goes on."""

import asyncio

import httpx
import pytest

from tests.gateway.bench_loads import A, B, load, session, steady, turn, workload
from tests.gateway.scripted_endpoint import Reply, ScriptedServers, chat_pieces, event, run_virtual
from tokenspeed.bench import compare
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.load import LoadOptions
from tokenspeed.bench.measure import summary
from tokenspeed.bench.turns import Turns


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
        ([b"data: " + b"[" * 100_000 + b"\n\n"], "not JSON"),
        (
            [event({"choices": [], "usage": {"completion_tokens": 5}})],
            "counts 5 tokens of at most 4",
        ),
        ([event({"choices": [], "usage": {"prompt_tokens": 2**31}})], "counts 2147483648 tokens"),
        (
            [
                event(
                    {
                        "choices": [],
                        "usage": {"prompt_tokens_details": {"cached_tokens": 10**9 * 9}},
                    }
                )
            ],
            "counts 9000000000 tokens",
        ),
        ([event({"error": {"message": "half a \ud800"}})], "half a ?"),
        ([httpx.ReadError("reset by peer")], "ReadError: reset by peer"),
    ],
    ids=range(16),
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


def test_usage_is_read_as_far_as_events_have_told_it():
    """Each of these alone would be no count at all."""
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 9}}}
    later = {"type": "message_delta", "usage": {"cache_creation_input_tokens": "many"}}
    reply = Reply([(0.5, event(start)), (0.5, event(later))])
    endpoint = Endpoint("a", "http://a", "m", "messages")
    (run,) = load(ScriptedServers(lambda seen: reply), [session("s", turn([1]))], endpoint)
    (record,) = run.records
    assert (record.status, record.input_tokens) == ("error", 9)
    assert record.error.startswith("DecodingError: an event of another shape")


@pytest.mark.parametrize(
    ("models", "why"),
    [
        (b"[" * 100_000, "DecodingError: nested too deeply"),
        (b'{"data": [{"id": "m\\ud800"}]}', "UnicodeEncodeError: "),
        (b'{"data": []}', "IndexError: "),
    ],
    ids=range(3),
)
def test_an_endpoint_whose_models_have_no_name_is_dead(models, why):
    answer = httpx.MockTransport(lambda request: httpx.Response(200, content=models))
    (run,) = load(answer, [session("s", turn([1]))], Endpoint("a", "http://a"))
    assert run.records == []
    assert run.died.startswith(f"/v1/models: {why}")


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
