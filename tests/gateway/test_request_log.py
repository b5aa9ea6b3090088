# SPDX-License-Identifier: MIT
"""A line for each request: exactly what it says, and what it never says."""

import asyncio
import json
import logging
import re

import pytest

from tests.gateway.harness import gateway
from tests.gateway.test_tenants import spec
from tokenspeed.engine.messages import CacheReceipt, TokenOutput
from tokenspeed.gateway.limits import Limits
from tokenspeed.gateway.request_log import Journal, RequestRecord, line

HEADERS = {"session-id": "s", "user-agent": "codex_cli_rs/1", "x-request-id": "req-1"}


def done(**more):
    record = RequestRecord(
        id="r1", route="chat/completions", model="demo", tenant="web", session="s1", client="codex"
    )
    record.arrived, record.submitted, record.first, record.last = 10.0, 10.01, 10.5, 12.5
    record.finished, record.status, record.finish = 12.6, 200, "stop"
    record.num_prompt, record.num_cached, record.num_output, record.num_steps = 100, 64, 41, 21
    record.queue_s, record.prefill_s, record.reason = 0.2, 0.25, "diverged"
    for name, value in more.items():
        setattr(record, name, value)
    return record


def test_the_whole_line():
    assert line(done()) == (
        "id=r1 tenant=web session=s1 client=codex route=chat/completions model=demo status=200"
        " finish=stop prompt=100 cached=64 cached_host=0 output=41 calls=0 receipt=diverged"
        " queue_ms=200.0 prefill_ms=250.0 ttft_ms=500.0 accepted_length=1.95 tps=19.5"
        " total_ms=2600.0"
    )


def test_drafts_are_counted():
    record = done()
    record.feed(0, TokenOutput(1, [5], "stop", num_draft_tokens=30, num_accepted_tokens=20))
    record.feed(1, TokenOutput(2, [5], "stop", num_draft_tokens=4, num_accepted_tokens=1))
    assert " accepted_length=1.78 drafts=34 accepted=21 " in line(record)


def test_what_is_not_known_is_left_out():
    record = RequestRecord(id="r", route="messages", model="m", status=429, error="rate_limit")
    record.arrived, record.finished = 1.0, 1.001
    wanted = "id=r route=messages model=m status=429 error=rate_limit total_ms=1.0"
    assert line(record) == wanted


@pytest.mark.parametrize("name", ["two words", 'quo"te', "new\nline", "a=b", "ä"])
def test_one_line_whatever_the_names(name):
    text = line(done(model=name))
    assert "\n" not in text
    assert f"model={json.dumps(name)} status" in text


def test_outputs_are_counted_and_timed():
    record = RequestRecord(session="s")
    record.feed(0, TokenOutput(1, [], receipt=CacheReceipt(2)))
    assert (record.first, record.num_steps) == (0.0, 0)
    record.feed(0, TokenOutput(1, [5, 6]))
    record.feed(1, TokenOutput(2, [7], prefill_s=0.5, queue_s=0.1))
    assert record.first <= record.last
    assert (record.num_steps, record.output_ids) == (2, [5, 6])
    assert (record.queue_s, record.prefill_s) == (0.1, 0.5)


def test_observers_are_told_once():
    told = []

    class Watch:
        def begin(self, record):
            told.append("begin")

        def finish(self, record):
            told.append("finish")

    journal, record = Journal("m", [Watch(), Watch()]), RequestRecord()
    journal.begin(record)
    journal.begin(record)
    journal.finish(record)
    assert told == ["begin", "begin", "finish", "finish"]
    assert record.finished >= record.arrived


def fields(caplog):
    lines = [r.getMessage() for r in caplog.records if r.name == "tokenspeed.requests"]
    return [dict(pair.split("=", 1) for pair in one.split()) for one in lines]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "model": "any"}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
        ("/v1/completions", {"prompt": "hi there"}),
    ],
)
async def test_every_dialect_is_logged(caplog, path, body, stream):
    caplog.set_level(logging.INFO, "tokenspeed.requests")
    async with gateway() as g:
        reply = await g.post(path, {"max_tokens": 2, "stream": stream} | body, headers=HEADERS)
        assert reply.status_code == 200
    (found,) = fields(caplog)
    wanted = {"id": "req-1", "session": "s", "client": "codex_cli_rs", "model": "null"}
    wanted |= {"route": path.removeprefix("/v1/"), "status": "200", "finish": "length"}
    wanted |= {"output": "2", "cached": "0", "calls": "0", "accepted_length": "1.00"}
    assert wanted.items() <= found.items()
    times = float(found["ttft_ms"]), float(found["total_ms"])
    assert 0 < times[0] <= times[1]
    assert int(found["prompt"]) > 0


async def test_refusals_and_errors_are_logged(caplog):
    caplog.set_level(logging.INFO, "tokenspeed.requests")
    text = {"prompt": "hi", "max_tokens": 1}
    limits = Limits(requests_per_minute=2)
    async with gateway(tenants=[spec("web", "k", limits=limits)]) as g:
        headers = {"x-api-key": "k"}
        await g.post("/v1/completions", text | {"temperature": -1}, headers=headers)
        await g.post("/v1/completions", text | {"model": "other"}, headers=headers)
        await g.post("/v1/completions", text, headers=headers)
        await g.post("/v1/completions", text)
        await g.http.get("/v1/models", headers=headers)
    found = fields(caplog)
    assert [one["status"] for one in found] == ["400", "404", "429"]
    wanted = ["invalid_value", "model_not_found", "rate_limit_exceeded"]
    assert [one["error"] for one in found] == wanted
    assert {one["tenant"] for one in found} == {"web"}
    assert all("prompt" not in one for one in found)


async def test_a_client_that_goes_away(caplog):
    caplog.set_level(logging.INFO, "tokenspeed.requests")
    async with gateway() as g:
        g.client.paused = True
        sent, over = [], asyncio.Event()

        async def receive():
            if not sent:
                sent.append(1)
                body = b'{"prompt":"hi","max_tokens":4}'
                return {"type": "http.request", "body": body, "more_body": False}
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        task = asyncio.create_task(g.app(scope, receive, send))
        while not g.client.requests:
            await asyncio.sleep(0)
        over.set()
        await task
        g.client.paused = False
    (found,) = fields(caplog)
    assert (found["status"], found["finish"], found["output"]) == ("499", "abort", "0")
    assert "ttft_ms" not in found


async def test_a_line_never_has_contents_keys_or_addresses(caplog):
    caplog.set_level(logging.INFO, "tokenspeed.requests")
    secret = "zanzibar"
    async with gateway(tenants=[spec("web", f"key-{secret}")]) as g:
        headers = {"authorization": f"Bearer key-{secret}", "x-forwarded-for": secret}
        body = {
            "messages": [{"role": "user", "content": secret}],
            "tools": [{"type": "function", "function": {"name": secret, "parameters": {}}}],
            "user": secret,
            "metadata": {"user_id": f"{secret}_session_s"},
            "max_tokens": 3,
        }
        reply = await g.post("/v1/chat/completions", body, headers=headers)
        assert reply.status_code == 200
        wrong = {"model": secret, "messages": [], secret: secret}
        await g.post("/v1/chat/completions", wrong, headers=headers)
    text = "\n".join(r.getMessage() for r in caplog.records if r.name == "tokenspeed.requests")
    assert len(text.splitlines()) == 2
    assert secret not in text
    assert not re.search(r"\d+\.\d+\.\d+\.\d+", text)


async def test_silent_unless_asked_for(caplog):
    caplog.set_level(logging.WARNING, "tokenspeed.requests")
    async with gateway() as g:
        await g.post("/v1/completions", {"prompt": "hi", "max_tokens": 1})
    assert fields(caplog) == []
