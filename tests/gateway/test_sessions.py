# SPDX-License-Identifier: MIT
"""The live table of sessions: what it counts, its bounds, who sees what, pin and drop."""

import asyncio

import pytest

from tests.gateway.harness import gateway
from tests.gateway.test_tenants import spec
from tokenspeed.engine import messages as m
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.request_log import RequestRecord
from tokenspeed.gateway.sessions import Session, Sessions
from tokenspeed.gateway.tenants import ROLES

PROMPT = "hello there, " * 60


def table(**bounds):
    clock = iter(range(1, 1_000_000))
    return Sessions(Keys().pseudonym, clock=lambda: float(next(clock)), **bounds)


def turn(sessions, name, prompt=(1, 2, 3), output=(4,), tenant="t", cached=0):
    record = RequestRecord(tenant=tenant, session=name, model="m", route="r", identified=True)
    sessions.begin(record)
    record.submit([list(prompt)], b"salt")
    record.arrived, record.submitted, record.first, record.last = 0.0, 0.1, 1.0, 3.0
    record.num_cached, record.num_output, record.num_steps = cached, len(output), len(output)
    record.output_ids = list(output)
    sessions.finish(record)
    return sessions.find(tenant, name)


def test_counts():
    sessions = table()
    first = turn(sessions, "a", range(100), range(5))
    assert (first.num_turns, first.num_context, first.hit_rate) == (1, 105, 0.0)
    assert (first.tps_last, first.tps_mean) == (2.0, 2.0)
    again = turn(sessions, "a", range(200), range(9), cached=100)
    assert again is first
    assert (again.num_turns, again.num_context, again.num_output) == (2, 209, 14)
    assert again.hit_rate == 100 / 300
    assert (again.tps_last, again.tps_mean) == (4.0, 3.0)
    assert again.token_ids == [*range(200), *range(9)]
    assert again.first_seen < again.last_seen


def test_what_made_no_token_is_no_turn():
    sessions = table()
    record = RequestRecord(tenant="t", session="a", identified=True)
    sessions.begin(record)
    found = sessions.find("t", "a")
    assert found.num_running == 1
    sessions.finish(record)
    assert (found.num_running, found.num_turns, found.hit_rate) == (0, 0, None)
    sessions.begin(RequestRecord(tenant="t", session=None, identified=True))
    sessions.finish(RequestRecord(tenant="t", session=None, identified=True))
    assert len(sessions.of(None)) == 1


def test_what_the_session_had_is_expected():
    sessions = table()
    turn(sessions, "a", range(100), range(5))
    record = RequestRecord(tenant="t", session="a", identified=True)
    sessions.begin(record)
    assert record.num_expected == 105
    record.submit([[1] * 120], b"")
    assert record.num_charged == 15  # it ended before it had a token


def test_each_tenants_least_recently_seen_go_first():
    sessions = table(max_sessions=3)
    for name in "abc":
        turn(sessions, name, tenant="t")
    turn(sessions, "a", tenant="t")
    for name in "xyz":
        turn(sessions, name, tenant="other")
    turn(sessions, "d", tenant="t")
    assert [one.name for one in sessions.of("t")] == ["d", "a", "c"]
    assert [one.name for one in sessions.of("other")] == ["z", "y", "x"]


def test_ids_are_bounded_and_the_largest_tenant_pays():
    sessions = table(max_ids=1000)
    small = turn(sessions, "small", range(100), tenant="small")
    for i in range(200):
        turn(sessions, f"s{i % 17}", range(60), tenant="large")
        held = sum(one.num_ids for one in sessions.of(None))
        assert held == sessions._num_ids.total() <= 1000
    assert small.num_ids == 101
    assert sum(one.num_ids > 0 for one in sessions.of("large")) > 5
    huge = turn(sessions, "huge", range(5000), tenant="large")
    assert huge.token_ids == []
    assert small.num_ids == 101


def test_a_session_that_was_pushed_out_ends_quietly():
    sessions = table(max_sessions=1)
    record = RequestRecord(tenant="t", session="a", identified=True)
    sessions.begin(record)
    turn(sessions, "b")
    sessions.finish(record)
    assert [one.name for one in sessions.of("t")] == ["b"]


def test_ids_tell_nothing_and_differ_by_tenant():
    sessions = table()
    a, b = turn(sessions, "same", tenant="a"), turn(sessions, "same", tenant="b")
    assert isinstance(a, Session)
    assert a.id != b.id
    assert "same" not in a.id
    assert sessions.find("a", b.id) is None
    assert sessions.find(None, b.id) is b
    assert sessions.find(None, "same") is None  # names are of tenants


def ask(g, key="k", session="s", path="/v1/completions", **more):
    headers = {"x-api-key": key, "session-id": session, "user-agent": "codex_cli_rs/1"}
    return g.post(path, {"prompt": PROMPT, "max_tokens": 5} | more, headers=headers)


async def get(g, path="", key="k"):
    return (await g.http.get(f"/v1/sessions{path}", headers={"x-api-key": key})).json()


async def test_a_session_over_http():
    async with gateway(keys=("k",)) as g:
        assert await get(g) == {"object": "list", "data": []}
        usage = [(await ask(g)).json()["usage"] for _ in range(2)][-1]
        (found,) = (await get(g))["data"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached > 0
        wanted = {
            "object": "session",
            "session": "s",
            "tenant": "key1",
            "state": "idle",
            "client": "codex_cli_rs",
            "model": "null",
            "route": "completions",
            "turns": 2,
            "context_tokens": usage["total_tokens"],
            "kv_tokens": (usage["total_tokens"] - 1) // 64 * 64,
            "hit_rate": cached / (2 * usage["prompt_tokens"]),
            "output_tokens": 10,
            "pinned": False,
        }
        assert wanted.items() <= found.items()
        assert found["tps_last"] > 0
        assert found["tps_mean"] > 0
        assert await get(g, f"/{found['id']}") == await get(g, "/s") == found


async def test_a_running_session_is_running():
    async with gateway(keys=("k",)) as g:
        g.client.paused = True
        task = asyncio.create_task(ask(g))
        while not g.client.requests:
            await asyncio.sleep(0)
        assert (await get(g, "/s"))["state"] == "running"
        g.client.paused = False
        await task
        assert (await get(g, "/s"))["state"] == "idle"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_every_dialect_has_sessions(path):
    async with gateway() as g:
        body = {"messages": [{"role": "user", "content": "hi"}], "input": "hi", "model": "null"}
        reply = await ask(g, path=path, max_output_tokens=5, prompt=None, **body)
        assert reply.status_code == 200
        found = await get(g, "/s")
        assert (found["turns"], found["route"]) == (1, path.removeprefix("/v1/"))
        ids = g.client.requests[0].prompt_ids
        assert g.service.sessions.find("", "s").token_ids[: len(ids)] == ids


async def test_a_background_response_is_running_until_it_ends():
    async with gateway() as g:
        g.client.paused = True
        body = {"input": "hi", "background": True, "store": True, "max_output_tokens": 3}
        reply = await g.post("/v1/responses", body, headers={"session-id": "s"})
        assert reply.status_code == 200
        assert (await get(g, "/s"))["state"] == "running"
        g.client.paused = False
        while g.service.responses.running:
            await asyncio.sleep(0.001)
        found = await get(g, "/s")
        assert (found["state"], found["turns"]) == ("idle", 1)


async def test_who_sees_what():
    tenants = [spec("a", "ka"), spec("b", "kb"), spec("ops", "ko", roles=("admin",))]
    tenants += [spec("all", "kx", roles=ROLES), spec("m", "km", roles=("metrics",))]
    async with gateway(tenants=tenants) as g:
        for key in ("ka", "kb", "kx"):
            await ask(g, key, session="same")
        own = await get(g, "/same", "ka")
        other = await get(g, "/same", "kb")
        assert (own["tenant"], other["tenant"]) == ("a", "b")
        assert [one["tenant"] for one in (await get(g, key="ka"))["data"]] == ["a"]
        assert {one["tenant"] for one in (await get(g, key="ko"))["data"]} == {"a", "b", "all"}
        assert (await get(g, f"/{other['id']}", "ko"))["tenant"] == "b"
        assert (await get(g, "/same", "kx"))["tenant"] == "all"
        for method, end in (("GET", ""), ("DELETE", ""), ("POST", "/pin")):
            for key in ("ka", "ko"):
                for name in (other["id"], "ses_0", "nothing") if key == "ka" else ("ses_0", "same"):
                    path = f"/v1/sessions/{name}{end}"
                    reply = await g.http.request(method, path, headers={"x-api-key": key})
                    assert reply.status_code == 404
                    assert reply.json()["error"]["code"] == "session_not_found"
        assert (await g.http.get("/v1/sessions", headers={"x-api-key": "km"})).status_code == 403
        assert not [x for x in g.client.sent if isinstance(x, m.RetainPrefix | m.ReleasePrefix)]


async def test_pin_and_drop():
    async with gateway(keys=("k",)) as g:
        headers = {"x-api-key": "k"}
        await ask(g, cache_salt="own")
        request = g.client.requests[0]
        pages = len(request.prompt_ids) // 64
        reply = await g.http.post("/v1/sessions/s/pin", headers=headers)
        assert (reply.status_code, reply.json()["pinned"]) == (200, True)
        assert reply.json()["pages"] == pages > 0
        order = g.client.sent[-1]
        assert (order.salt, order.retention) == (request.salt, m.Retention(pinned=True))
        assert order.token_ids[: len(request.prompt_ids)] == request.prompt_ids
        assert len(order.token_ids) == len(request.prompt_ids) + 5
        await ask(g, cache_salt="own")  # what it adds is pinned, too
        assert g.client.requests[-1].retention == m.Retention(pinned=True)
        for wish, wanted in (("30m", m.Retention(1800.0)), ("none", m.Retention())):
            reply = await g.post("/v1/sessions/s/pin", {"retention": wish}, headers=headers)
            assert (reply.status_code, reply.json()["pinned"]) == (200, False)
            assert g.client.sent[-1].retention == wanted
        for wrong in ({"retention": "long"}, {"retention": 3}, [], {"retention": "25h"}):
            reply = await g.post("/v1/sessions/s/pin", wrong, headers=headers)
            assert reply.status_code == 400
        reply = await g.http.delete("/v1/sessions/s", headers=headers)
        assert reply.json()["deleted"] is True
        assert reply.json()["pages"] == pages
        assert isinstance(g.client.sent[-1], m.ReleasePrefix)
        assert (await get(g))["data"] == []
        usage = (await ask(g, cache_salt="own")).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0


async def test_what_cannot_be_pinned():
    async with gateway() as g:
        g.client.paused = True
        task = asyncio.create_task(ask(g))
        while not g.client.requests:
            await asyncio.sleep(0)
        reply = await g.post("/v1/sessions/s/pin")
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "session_unknown")
        reply = await g.http.delete("/v1/sessions/s")  # it is at work: it stays
        assert reply.json()["pages"] == 0
        assert (await get(g, "/s"))["state"] == "running"
        g.client.paused = False
        await task
        g.client.die()
        await asyncio.sleep(0.01)
        assert (await g.post("/v1/sessions/s/pin")).status_code == 503


async def test_an_engine_that_dies_before_it_answers(monkeypatch):
    async with gateway() as g:
        await ask(g)
        monkeypatch.setattr(g.client, "send", lambda *_: None)
        task = asyncio.create_task(g.post("/v1/sessions/s/pin"))
        await asyncio.sleep(0.01)
        g.client.die()
        assert (await task).status_code == 503
        assert g.client._orders == {}


async def test_an_engine_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("tokenspeed.gateway.engine_pool.ORDER_TIMEOUT_S", 0.01)
    async with gateway() as g:
        await ask(g)
        monkeypatch.setattr(g.client, "send", lambda *_: None)
        assert (await g.post("/v1/sessions/s/pin")).status_code == 503
        assert g.client._orders == {}
