# SPDX-License-Identifier: MIT
"""The load generator against the real gateway over a socket, in every dialect, and its death."""

import asyncio
import time

import pytest

from tests.gateway.processes import server
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.load import LoadOptions, run_load
from tokenspeed.bench.measure import summary
from tokenspeed.bench.prompts import Prompts
from tokenspeed.bench.session import Session, Turn, Workload

TEXTS = Prompts(seed=1)
STEP_S = 0.01


def workload(num_sessions: int, num_turns: int, out: int) -> Workload:
    """Turns that ask the same again, which the engine behind finds in its cache."""
    turn = Turn((1, 2, 3, 4), 256, out, 0.0, "user", 0)
    names = (f"s{i}" for i in range(num_sessions))
    return Workload(
        "w",
        tuple(Session(name, (turn,) * num_turns, 64, 0.0, name, None) for name in names),
        seed=1,
        scale=1.0,
    )


async def test_every_dialect_then_a_death():
    with server("--step-s", str(STEP_S)) as s:
        endpoints = [Endpoint(name, s.url, None, name) for name in ("chat", "responses")]
        endpoints.append(Endpoint("messages", f"{s.url}/v1", "null", "messages"))
        runs = await run_load(endpoints, workload(2, 2, 24), TEXTS, LoadOptions(2, rounds=2))
        for run in runs:
            _check(run)
        # They all ask the same, so a second round finds all of the prompt but its end.
        assert {record.cached_tokens for run in runs[1:] for record in run.records[2:]} == {
            (runs[1].records[-1].input_tokens - 1) // 64 * 64
        }
        await _kill(s)


def _check(run) -> None:
    assert [record.error for record in run.records] == [None] * 4, run.endpoint
    assert run.died is None
    sizes = {record.input_tokens for record in run.records}
    assert len(sizes) == 1
    assert 128 < sizes.pop() < 1024
    for record in run.records:
        assert (record.status, record.http_status) == ("ok", 200)
        assert record.output_tokens == 24
        assert 0 <= record.sent_s < record.first_token_s <= record.token_times[-1]
        assert record.token_times[-1] <= record.end_s <= run.duration_s
        assert sum(record.token_counts) <= 24
        if run.dialect == "chat":
            assert sum(record.token_counts) == 24
    found = summary(run, floors=(1.0,))
    assert found.floors[0].held_streams == 4
    assert 1.0 < found.stream_tps.p50 < 2 / STEP_S
    assert found.hit_rate > 0.5


async def _kill(s) -> None:
    """The whole server goes in the middle of 4 streams."""
    alive = Endpoint("killed", s.url, "null")
    load = run_load([alive], workload(40, 1, 2000), TEXTS, LoadOptions(4))
    task = asyncio.create_task(load)
    while s.gauge("vllm:num_requests_running") < 4:
        await asyncio.sleep(0.02)
    engine = s.engine()
    s.process.kill()  # before its engine, of whose death it would tell the next four
    engine.kill()
    (run,) = await asyncio.wait_for(task, 20)
    assert run.died is not None
    assert {record.status for record in run.records} == {"error"}
    assert len(run.records) == 4
    assert all(record.error for record in run.records)


async def test_a_request_is_sent_when_its_last_byte_is():
    marks, reads_from = [], []

    def clock():
        marks.append(time.monotonic())
        return marks[-1]

    async def answer(reader, writer):
        await asyncio.sleep(0.3)  # while the client waits for room in the socket
        reads_from.append(time.monotonic())
        length = int((await reader.readuntil(b"\r\n\r\n")).lower().split(b"length: ")[1].split()[0])
        await reader.readexactly(length)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\ndata: " + LAST + b"\n\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        endpoint = Endpoint("slow", f"http://127.0.0.1:{port}", "m", extra={"x": "x" * (1 << 24)})
        (run,) = await run_load([endpoint], workload(1, 1, 1), TEXTS, LoadOptions(1), clock=clock)
    (record,) = run.records
    assert (record.status, record.error) == ("ok", None)
    assert reads_from[0] < marks[0] + record.sent_s <= marks[0] + record.first_token_s


LAST = b'{"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}'


@pytest.mark.full
async def test_many_streams_at_once():
    with server("--step-s", "0.02") as s:
        endpoint = Endpoint("many", s.url)
        (run,) = await run_load([endpoint], workload(64, 3, 40), TEXTS, LoadOptions(64))
    assert summary(run).statuses == {"ok": 192}
    assert {record.output_tokens for record in run.records} == {40}
