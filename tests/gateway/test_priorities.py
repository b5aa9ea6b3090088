# SPDX-License-Identifier: MIT
"""How soon and how fast, in every dialect: what the engine is told, and how it refuses."""

import asyncio
import itertools
import json
from typing import Any

import pytest

from benchmarks.null_engine import Echo
from tests.gateway.harness import gateway
from tests.gateway.test_tenants import one, write
from tokenspeed.config import EngineConfig, PacingOptions, ServerOptions
from tokenspeed.engine import messages as m
from tokenspeed.errors import RequestError
from tokenspeed.gateway.serving import _keys, _reload, prepare
from tokenspeed.gateway.tenants import read_tenants
from tokenspeed.gateway.urgency import Standing, Urgency, urgency_of

USER = [{"role": "user", "content": "hi"}]
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER, "max_tokens": 3},
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 3},
    "/v1/messages": {"model": "m", "messages": USER, "max_tokens": 3},
}
FLOOR, WAIT = "x-tokenspeed-tps-floor", "x-tokenspeed-max-wait-s"
BUSY = {path: 529 if path == "/v1/messages" else 503 for path in DIALECTS}

every_dialect = pytest.mark.parametrize("path", DIALECTS)


@every_dialect
async def test_the_engine_is_told(path):
    cases = [
        ({}, {}, (None, 0, None)),
        ({"priority": -1000}, {FLOOR: "70"}, (70.0, -1000, None)),
        ({"priority": 1000}, {FLOOR: "0.5", WAIT: "0"}, (0.5, 1000, 0.0)),
        ({"service_tier": "auto"}, {FLOOR: "10000", WAIT: "2.5"}, (10000.0, 0, 2.5)),
        ({"service_tier": "priority"}, {}, (None, -10, None)),
        ({"service_tier": "flex"}, {}, (0.0, 10, None)),
        ({"service_tier": "flex", "priority": 3}, {FLOOR: "20"}, (20.0, 3, None)),
        ({"service_tier": None, "priority": None}, {}, (None, 0, None)),
    ]
    async with gateway() as g:
        for body, headers, expected in cases:
            reply = await g.post(path, DIALECTS[path] | body, headers=headers)
            assert reply.status_code == 200, reply.text
            request = g.client.requests[-1]
            assert (request.tps_floor, request.priority, request.max_wait_s) == expected


WRONG = [
    *[(FLOOR, {FLOOR: t}, {}) for t in ("0", "0.0", "nan", "1000000", "-1", "inf", "1e3", "")],
    *[(WAIT, {WAIT: t}, {}) for t in ("-1", "nan", "86401", "soon")],
    *[("priority", {}, {"priority": p}) for p in (1001, -1001, 2**70, 0.5, "1", True)],
    *[("service_tier", {}, {"service_tier": t}) for t in ("scale", "", 5)],
]


@every_dialect
async def test_what_says_nothing_known_is_refused_by_name(path):
    async with gateway() as g:
        for field, headers, body in WRONG:
            reply = await g.post(path, DIALECTS[path] | body, headers=headers)
            assert reply.status_code == 400, (headers, body)
            assert reply.json()["error"]["message"].startswith(f"{field}: ")
        assert g.client.requests == []


async def test_the_answer_tells_its_tier():
    async with gateway() as g:
        for tier, openai, anthropic in (
            ("auto", "default", "standard"),
            ("flex", "flex", "standard"),
            ("priority", "priority", "priority"),
        ):
            replies = {
                path: (await g.post(path, body | {"service_tier": tier})).json()
                for path, body in DIALECTS.items()
            }
            assert replies["/v1/chat/completions"]["service_tier"] == openai
            assert replies["/v1/responses"]["service_tier"] == openai
            assert replies["/v1/messages"]["usage"]["service_tier"] == anthropic
        plain = await g.post("/v1/chat/completions", DIALECTS["/v1/chat/completions"])
        assert "service_tier" not in plain.json()


# -- tenants


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        (Standing(5, 40.0), {}, Urgency(40.0, 5)),
        (Standing(5, 40.0), {"tier": "flex"}, Urgency(0.0, 10, tier="flex")),
        (Standing(20), {"tier": "flex"}, Urgency(0.0, 20, tier="flex")),
        (Standing(5, 40.0), {"tier": "priority"}, Urgency(40.0, 5)),
        (Standing(-10), {"tier": "priority"}, Urgency(None, -10, tier="priority")),
        (Standing(-50), {"tier": "priority"}, Urgency(None, -50, tier="priority")),
        (Standing(5), {"priority": 5}, Urgency(None, 5)),
        (Standing(tps_floor=40.0), {"priority": -7}, Urgency(40.0, -7)),
        (Standing(5, 40.0), {"floor": b"39.5"}, Urgency(39.5, 5)),
        (Standing(-5), {"priority": 0, "floor": b"9000"}, Urgency(9000.0, 0)),
    ],
)
def test_a_tenant_gives_its_own_unasked_and_no_more(own, asked, expected):
    asked = dict(asked)
    floor = asked.pop("floor", None)
    headers = {} if floor is None else {FLOOR.encode(): floor}
    assert urgency_of(headers, own, **asked) == expected


def test_a_tenant_asks_for_no_more_than_it_has():
    with pytest.raises(RequestError, match="priority: this key's requests have 5"):
        urgency_of({}, Standing(5), priority=4)
    with pytest.raises(RequestError, match=f"{FLOOR}: this key's requests have 40,"):
        urgency_of({FLOOR.encode(): b"40.1"}, Standing(tps_floor=40.0))


async def test_the_tenants_file_says_it(tmp_path):
    path = write(tmp_path / "t", one(priority=-3, tps_floor=12.5))
    tenants = read_tenants(path)
    assert tenants[0].standing == Standing(-3, 12.5)
    async with gateway(tenants=tenants) as g:
        headers = {"authorization": "Bearer k"}
        reply = await g.post("/v1/completions", {"prompt": "hi", "max_tokens": 1}, headers=headers)
        assert reply.status_code == 200
        assert (g.client.requests[0].tps_floor, g.client.requests[0].priority) == (12.5, -3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("priority", p) for p in (1001, -1001, 0.5, "1", True)],
        *[("tps_floor", f) for f in (0, -1, 10_001, 1_000_000, "70", True)],
    ],
)
def test_a_file_with_what_says_nothing_is_refused_by_name(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"tenants\[0\].{field}"):
        read_tenants(write(tmp_path / "t", one(**{field: value})))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_a_file_with_a_floor_that_is_no_number_is_refused(tmp_path, text):
    body = json.dumps(one(tps_floor=1)).replace('"tps_floor": 1', f'"tps_floor": {text}')
    with pytest.raises(ValueError, match="tenants"):
        read_tenants(write(tmp_path / "t", body))


def test_a_floor_that_the_server_does_not_keep_is_refused_when_it_starts(tmp_path):
    path = write(tmp_path / "t", one(name="web", tps_floor=12.5))
    options = ServerOptions(tenants=path)
    with pytest.raises(ValueError, match=r"'web' has a tps_floor of 12\.5, .*--tps-floor"):
        prepare(EngineConfig(), options)
    for pacing in (PacingOptions(tps_floor=20.0), PacingOptions(max_queue_wait_s=5.0)):
        assert _keys(EngineConfig(pacing=pacing), options)
    write(tmp_path / "t", one(name="web", priority=-3))
    assert _keys(EngineConfig(), options)


def test_nor_is_it_taken_when_the_file_is_read_again(tmp_path, caplog):
    path = write(tmp_path / "t", one(name="web"))
    config, options = EngineConfig(), ServerOptions(tenants=path)
    keys = _keys(config, options)
    write(tmp_path / "t", one(name="web", tps_floor=12.5))
    _reload(config, options, keys)
    assert "the tenants stay as they were: tenants: 'web' has a tps_floor" in caplog.text


# -- refusals


class Full(Echo):
    """Refuses whatever comes, before any token."""

    def __init__(self, wait_s: float | None) -> None:
        super().__init__()
        self.wait_s = wait_s

    def step(self) -> list[m.TokenOutput]:
        self.admit()
        refused, self.running = list(self.running), {}
        why = "no stream's floor would hold with one more"
        return [
            m.TokenOutput(i, [], "error", error=why, code="overloaded", retry_after_s=self.wait_s)
            for i in refused
        ]


@every_dialect
async def test_no_room_comes_back_with_the_time_to_try_again(path):
    waits = {2.1: "3", 0.05: "1", 60.0: "60", None: "1"}
    async with gateway(echo=Full(None)) as g:
        for (wait_s, header), stream in itertools.product(waits.items(), (False, True)):
            g.echo.wait_s = wait_s
            reply = await g.post(path, DIALECTS[path] | {"stream": stream})
            assert (reply.status_code, reply.headers["retry-after"]) == (BUSY[path], header)
            error = reply.json()["error"]
            assert error["message"] == "no stream's floor would hold with one more"
            if path == "/v1/messages":
                assert error["type"] == "overloaded_error"
            else:
                assert (error["type"], error["code"]) == ("server_error", "overloaded")
        assert g.pool.metrics.rejections == {"overloaded": 8}


@every_dialect
async def test_a_queue_that_is_full_is_the_same_to_clients(path):
    async with gateway(config={"max_num_seqs": 1, "max_queue_len": 1}) as g:
        g.client._limit = 0
        reply = await g.post(path, DIALECTS[path])
        assert (reply.status_code, reply.headers["retry-after"]) == (BUSY[path], "1")


@every_dialect
async def test_who_takes_none_at_all_says_503(path):
    async with gateway() as g:
        g.pool.draining = True
        reply = await g.post(path, DIALECTS[path])
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")


@every_dialect
async def test_after_a_sign_of_life_it_is_an_event(path):
    async with gateway(echo=Full(5.0), keepalive_s=0.1) as g:
        g.client.paused = True
        asked = asyncio.create_task(g.post(path, DIALECTS[path] | {"stream": True}))
        while not any(mailbox.sending == 2 for mailbox in g.pool._mailboxes):
            await asyncio.sleep(0.01)
        g.client.paused = False
        reply = await asked
        assert reply.status_code == 200
        assert "no stream's floor would hold" in reply.text.partition(": keep-alive")[2]


async def test_in_the_background_it_is_the_responses_error():
    async with gateway(echo=Full(5.0)) as g:
        made = (await g.post("/v1/responses", {"input": "hi", "background": True})).json()
        while made["status"] == "in_progress":
            await asyncio.sleep(0.001)
            made = (await g.http.get(f"/v1/responses/{made['id']}")).json()
        assert made["status"] == "failed"
        assert made["error"]["code"] == "server_error"


async def test_an_error_without_a_code_is_a_fault_as_ever():
    class Broken(Full):
        def step(self) -> list[m.TokenOutput]:
            return [m.TokenOutput(o.request_id, [], "error", error="x") for o in super().step()]

    async with gateway(echo=Broken(None)) as g:
        reply = await g.post("/v1/completions", DIALECTS["/v1/completions"])
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "generation_failed")
        assert g.pool.metrics.rejections == {}
