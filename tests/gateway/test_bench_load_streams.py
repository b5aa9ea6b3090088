# SPDX-License-Identifier: MIT
"""What the load generator reads out of streams: times, counts, what was cached, in each dialect."""

import asyncio
import json

import httpx
import pytest

from tests.gateway.bench_loads import TEXTS, load, session, steady, turn
from tests.gateway.scripted_endpoint import Reply, ScriptedServers, chat_pieces, event
from tokenspeed.bench import compare
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.measure import Price, summary
from tokenspeed.bench.report import summary_table, warnings
from tokenspeed.bench.series import cloud_of


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
    (run,) = load(ScriptedServers(lambda seen: Reply(pieces)), [session("s", turn([1], out=9))])
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


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "said", [b"none", b"[]", DEEP, b'{"tokens": "x"}', b'{"tokens": [null]}'], ids=range(5)
)
def test_what_is_no_ids_is_an_error_of_its_request(said):
    answer = httpx.MockTransport(lambda request: httpx.Response(200, content=said))
    (run,) = load(answer, [session("s", turn([1]))], forced=True)
    assert (run.records[0].status, run.died) == ("error", None)
    assert run.records[0].error.startswith("HTTPError: does not tokenize")


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
