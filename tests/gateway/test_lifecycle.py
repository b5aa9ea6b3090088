# SPDX-License-Identifier: MIT
"""Disconnects, silence, slow clients, a dead engine, a hung engine, full queues: in process."""

import asyncio
import json
import random

import pytest

from benchmarks.null_engine import Echo
from tests.gateway.harness import TOKENIZER, gateway, parse_events
from tokenspeed.engine import messages as m
from tokenspeed.gateway import mailbox

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY = {"prompt": "hello world", "max_tokens": 1000}


class Client:
    """One ASGI call by hand: sees each message as it is sent and can go away at any time."""

    def __init__(self, g, path: str, body: dict, *, slow: bool = False) -> None:
        raw = json.dumps(body).encode()
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        }
        self.inbox: asyncio.Queue = asyncio.Queue()
        self.inbox.put_nowait({"type": "http.request", "body": raw})
        self.sent: list[dict] = []
        self.slow = slow
        self.task = asyncio.create_task(g.app(self.scope, self.inbox.get, self.send))

    async def send(self, message: dict) -> None:
        self.sent.append(message)
        if self.slow:
            await asyncio.Event().wait()

    def leave(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})

    @property
    def body(self) -> str:
        return b"".join(s.get("body", b"") for s in self.sent).decode()

    @property
    def status(self) -> int:
        return self.sent[0]["status"]


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_while_tokens_flow_aborts(stream):
    async with gateway() as g:
        client = Client(g, TEXT, {**BODY, "stream": stream})
        await until(lambda: any(r.num_out > 3 for r in g.echo.running.values()))
        client.leave()
        await client.task
        await until(lambda: not g.echo.running)
        assert g.echo.num_aborted == 1
        assert g.client.metrics.finished == {"abort": 1}


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_the_queue_aborts(stream):
    async with gateway(echo=Echo(max_num_seqs=1)) as g:
        first = Client(g, TEXT, {**BODY, "max_tokens": 4000})
        await until(lambda: g.echo.running)
        second = Client(g, TEXT, {**BODY, "stream": stream, "n": 3})
        await until(lambda: len(g.echo.waiting) == 3)
        second.leave()
        await second.task
        assert g.echo.waiting == {}
        assert second.sent == []
        first.leave()
        await first.task


async def test_leaving_before_the_body_is_whole():
    async with gateway() as g:
        client = Client(g, TEXT, BODY)
        client.inbox.get_nowait()
        client.inbox.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        client.leave()
        await client.task
        assert client.sent == []


async def test_leaving_while_the_prompt_is_rendered():
    slow = "{% for i in range(9999) %}{% for j in range(150) %}{% endfor %}{% endfor %}x"
    async with gateway(template=slow) as g:
        client = Client(g, CHAT, {"messages": [{"role": "user", "content": "x"}]})
        await asyncio.sleep(0.05)
        client.leave()
        await client.task
        assert client.sent == []
        assert not any(isinstance(s, m.GenerateRequest) for s in g.client.sent)


async def test_disconnects_at_random_phases_leave_nothing():
    random.seed(1)
    async with gateway(echo=Echo(max_num_seqs=16)) as g:
        clients = []
        for i in range(200):
            body = {**BODY, "stream": i % 2 == 0, "n": 1 + i % 3, "max_tokens": 40}
            clients.append(Client(g, TEXT, body))
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
            random.choice(clients).leave()
        for client in clients:
            client.leave()
        await asyncio.gather(*(c.task for c in clients))
        await until(lambda: not g.echo.running and not g.echo.waiting)
        reply = await g.post(TEXT, {**BODY, "max_tokens": 2})
        assert reply.json()["choices"][0]["text"] == "hello"


async def test_keepalive_comments_during_a_long_prefill():
    async with gateway(keepalive_s=0.25) as g:
        g.client.paused = True
        client = Client(g, TEXT, {**BODY, "max_tokens": 2, "stream": True})
        await until(lambda: client.body.count(": keep-alive\n\n") >= 2)
        assert client.status == 200
        g.client.paused = False
        await client.task
        assert "".join(e["choices"][0]["text"] for e in parse_events(client.body)) == "hello"


async def test_tokens_that_queue_up_share_one_write():
    async with gateway() as g:
        g.client.paused = True
        client = Client(g, TEXT, {**BODY, "max_tokens": 40, "stream": True})
        await until(lambda: g.client._open)
        for _ in range(40):
            g.client._up(m.Outputs(g.echo.step()))
        g.client.paused = False
        await client.task
        assert len(client.sent) == 3  # the head, all tokens with [DONE], the end
        events = parse_events(client.body)
        assert len(events) == 1
        assert events[0]["choices"][0]["finish_reason"] == "length"


async def test_a_client_that_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(mailbox, "STALL_S", 0.6)
    async with gateway() as g:
        slow = Client(g, TEXT, {**BODY, "max_tokens": 4000, "stream": True}, slow=True)
        begin = asyncio.get_running_loop().time()
        await asyncio.wait_for(slow.task, 5)
        # Not the 5 seconds: a task that is cancelled by them ends without complaint, too.
        assert 0.5 < asyncio.get_running_loop().time() - begin < 4.0
        assert g.pool.num_open == 0
        await until(lambda: not g.echo.running)


async def test_a_client_that_reads_too_slowly_is_bounded(monkeypatch):
    monkeypatch.setattr(mailbox, "MAX_UNREAD", 100)
    async with gateway() as g:
        slow = Client(g, TEXT, {**BODY, "max_tokens": 4000, "stream": True}, slow=True)
        begin = asyncio.get_running_loop().time()
        await asyncio.wait_for(slow.task, 5)
        assert asyncio.get_running_loop().time() - begin < 4.0
        await until(lambda: not g.echo.running)


async def test_engine_death_answers_everybody():
    async with gateway() as g:
        g.client.paused = True
        waiting = [Client(g, TEXT, {**BODY, "stream": i % 2 == 0}) for i in range(8)]
        await until(lambda: len(g.client._open) == 8)
        g.client._up(m.Outputs(g.echo.step()))
        streaming = [c for i, c in enumerate(waiting) if i % 2 == 0]
        await until(lambda: all(c.sent for c in streaming))
        g.client.die()
        await asyncio.wait_for(asyncio.gather(*(c.task for c in waiting)), 2)
        for client in waiting:
            if client in streaming:
                assert client.status == 200
                last = client.body.split("\n\n")[-3]
                assert json.loads(last[6:])["error"]["code"] == "engine_dead"
                assert client.body.endswith("data: [DONE]\n\n")
            else:
                assert client.status == 503
                assert json.loads(client.body)["error"]["code"] == "engine_dead"
        ready = await g.http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "dead")
        assert (await g.http.get("/health")).status_code == 503
        late = await g.post(TEXT, BODY)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_dead")
        assert "retry-after" in late.headers


async def test_a_request_that_fails_in_the_engine_fails_alone():
    (bad,) = TOKENIZER.encode("!")[:1]

    class Failing(Echo):
        def step(self):
            outputs = super().step()
            for i, output in enumerate(outputs):
                if output.token_ids == [bad]:
                    self.running.pop(output.request_id)
                    outputs[i] = m.TokenOutput(output.request_id, [], "error", error="not finite")
            return outputs

    async with gateway(echo=Failing()) as g:
        failed, narrow, fine = await asyncio.gather(
            g.post(TEXT, {"prompt": "! a", "max_tokens": 9}),
            g.post(TEXT, {"prompt": "! a", "max_tokens": 9, "allowed_token_ids": [bad]}),
            g.post(TEXT, {"prompt": "a b", "max_tokens": 2}),
        )
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "generation_failed")
        assert (narrow.status_code, narrow.json()["error"]["code"]) == (400, "no_token_left")
        assert fine.json()["choices"][0]["text"] == "a b"


async def test_a_hung_engine_ends_readiness_and_comes_back():
    async with gateway(watchdog_timeout_s=0.5) as g:
        assert (await g.http.get("/ready")).status_code == 200
        begin = asyncio.get_running_loop().time()
        steps = 0
        while (await g.http.get("/ready")).status_code == 200:
            g.client._up(m.Heartbeat(7, True))  # alive, but no step is ever done
            await asyncio.sleep(0.02)
            steps += 1
        assert 0.4 < asyncio.get_running_loop().time() - begin < 1.5
        refused = await g.post(TEXT, BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_hung")
        for number in range(8, 30):
            g.client._up(m.Heartbeat(number, True))
            await asyncio.sleep(0.02)
        assert (await g.http.get("/ready")).status_code == 200


async def test_an_idle_engine_is_not_hung():
    async with gateway(watchdog_timeout_s=0.5) as g:
        for _ in range(40):
            g.client._up(m.Heartbeat(7, False))
            await asyncio.sleep(0.02)
            assert g.client.state == "ready"


async def test_full_queues_are_answered_503_with_retry_after():
    config = {"max_num_seqs": 2, "max_queue_len": 3, "max_num_batched_tokens": 8}
    async with gateway(config=config) as g:
        g.client.paused = True
        taken = [Client(g, TEXT, BODY) for _ in range(5)]
        await until(lambda: len(g.client._open) == 5)
        refused = await g.post(TEXT, BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert g.pool.metrics.rejections == {"full": 1}
        taken[0].leave()
        await taken[0].task
        g.client.paused = False
        assert (await g.post(TEXT, {**BODY, "max_tokens": 1})).status_code == 200
        for client in taken[1:]:
            client.leave()
        await asyncio.gather(*(c.task for c in taken))


async def test_loading_shows_and_refuses():
    async with gateway() as g:
        ready, g.client.ready = g.client.ready, None
        g.client._up(m.Loading(0.25, "loading weights"))
        shown = await g.http.get("/ready")
        assert shown.status_code == 503
        assert shown.json() == {"status": "loading", "progress": 0.25, "doing": "loading weights"}
        assert (await g.http.get("/health")).status_code == 200
        refused = await g.post(TEXT, BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        g.client.ready = ready


async def test_malformed_engine_messages_are_dropped():
    async with gateway() as g:
        for data in (b"", b"\x01", b"\x01\x06\xff\xff", b"\x02\x06\x90", b"\x01\x00\x90"):
            assert g.client._decoder.decode(data) is None
        assert g.client._decoder.num_dropped == 5
        assert (await g.post(TEXT, {**BODY, "max_tokens": 1})).status_code == 200


async def test_metrics_after_some_requests():
    async with gateway() as g:
        await g.post(TEXT, {**BODY, "max_tokens": 5})
        await g.events(TEXT, {**BODY, "max_tokens": 5})
        reply = await g.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in reply.text.splitlines() if line[0] != "#")
    of = '{engine="0",model_name="null"}'
    reason = '{engine="0",finished_reason="length",model_name="null"}'
    assert float(lines["vllm:generation_tokens_total" + of]) == 10
    assert float(lines["vllm:request_success_total" + reason]) == 2
    assert float(lines["vllm:time_to_first_token_seconds_count" + of]) == 2
    assert float(lines["vllm:inter_token_latency_seconds_count" + of]) == 8
    assert float(lines["vllm:num_requests_waiting" + of]) == 0
    blocks = '{block_size="64",engine="0",model_name="null",num_gpu_blocks="65536"}'
    assert float(lines["vllm:cache_config_info" + blocks]) == 1
    assert float(lines["vllm:request_prefill_kv_computed_tokens_sum" + of]) == 8
    assert float(lines["vllm:corrupted_requests_total" + of]) == 0
    assert float(lines["process_resident_memory_bytes"]) > 1e6
    for bound in ("0.001", "0.0125", "0.0143", "0.025", "+Inf"):
        labels = f'{{engine="0",le="{bound}",model_name="null"}}'
        assert "vllm:inter_token_latency_seconds_bucket" + labels in lines
    assert "hello" not in reply.text
