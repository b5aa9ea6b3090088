# SPDX-License-Identifier: MIT
"""Real processes: the gateway with the null engine behind it, killed, stopped, drained and left."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import ROOT
from tests.gateway.processes import BODY, TEXT, Server, limits, server, start_streams, storm


@pytest.fixture(scope="module")
def shared():
    """One server for the tests that do it no harm."""
    with server("--step-s", "0.005") as made:
        yield made


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.full)])
async def test_kill_of_the_engine_under_32_streams(real):
    flags = ("--max-num-seqs", "32") if real else ("--step-s", "0.02")
    with server(*flags, real=real) as s:
        async with httpx.AsyncClient(limits=limits(64)) as client:
            tasks = await start_streams(client, s.url, 32, max_tokens=3000, ignore_eos=True)
            s.engine().kill()
            killed = time.monotonic()
            results = await asyncio.gather(*tasks)
            for text, ended, error in results:
                assert error is None
                assert ended - killed < 2.0
                assert json.loads(text.split("\n\n")[-3][6:])["error"]["code"] == "engine_dead"
            reply = await client.get(f"{s.url}/ready")
            assert (reply.status_code, reply.json()["status"]) == (503, "dead")
            late = await client.post(s.url + TEXT, json=BODY)
            assert late.status_code == 503
        assert s.process.wait(10) == 1


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.full)])
async def test_sigterm_under_32_streams_loses_nothing(real):
    flags = ("--max-num-seqs", "32") if real else ("--step-s", "0.005")
    with server(*flags, "--drain-timeout-s", "120", real=real) as s:
        async with httpx.AsyncClient(limits=limits(64), timeout=120) as client:
            tasks = await start_streams(client, s.url, 32, max_tokens=300, ignore_eos=True)
            s.process.terminate()
            while (await client.get(f"{s.url}/ready")).status_code == 200:
                await asyncio.sleep(0.01)
            refused = await client.post(s.url + TEXT, json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await client.get(f"{s.url}/health")).status_code == 200
            for text, _, error in await asyncio.gather(*tasks):
                assert error is None
                assert text.endswith("data: [DONE]\n\n")
                assert '"finish_reason":"length"' in text
        assert s.process.wait(10) == 0


async def test_drain_ends_at_its_deadline():
    with server("--step-s", "0.05", "--drain-timeout-s", "0.5") as s:
        async with httpx.AsyncClient() as client:
            tasks = await start_streams(client, s.url, 2)
            begin = time.monotonic()
            s.process.terminate()
            for text, _, error in await asyncio.gather(*tasks):
                assert error is None
                assert json.loads(text.split("\n\n")[-3][6:])["error"]["code"] == "draining"
        assert s.process.wait(10) == 0
        assert time.monotonic() - begin < 5.0


async def test_a_second_sigterm_is_fast():
    with server("--step-s", "0.05", "--drain-timeout-s", "60") as s:
        async with httpx.AsyncClient() as client:
            tasks = await start_streams(client, s.url, 2)
            s.process.terminate()
            await asyncio.sleep(0.3)
            assert s.process.poll() is None
            begin = time.monotonic()
            s.process.terminate()
            await asyncio.gather(*tasks)
        assert s.process.wait(10) == 0
        assert time.monotonic() - begin < 4.0


async def test_a_stopped_engine_ends_readiness_until_it_goes_on():
    with server("--step-s", "0.01", "--watchdog-timeout-s", "1.0") as s:
        async with httpx.AsyncClient(timeout=30) as client:
            tasks = await start_streams(client, s.url, 4, max_tokens=200)
            engine = s.engine()
            engine.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            while s.ready() == 200:
                await asyncio.sleep(0.02)
            assert time.monotonic() - stopped < 2.0
            refused = await client.post(s.url + TEXT, json=BODY)
            assert refused.json()["error"]["code"] == "engine_hung"
            engine.send_signal(signal.SIGCONT)
            while s.ready() != 200:
                await asyncio.sleep(0.02)
            for text, _, error in await asyncio.gather(*tasks):
                assert error is None
                assert text.endswith("data: [DONE]\n\n")


def test_the_engine_does_not_outlive_a_killed_gateway():
    with server() as s:
        engine = s.engine()
        s.process.kill()
        s.process.wait(5)
        psutil.wait_procs([engine], timeout=5)
        assert not engine.is_running()


def test_a_killed_gateway_leaves_no_socket_folder():
    made = Server(real=True)
    while not (engines := made.engines()):
        time.sleep(0.02)
    command = engines[0].cmdline()
    folder = Path(command[command.index("--inbox") + 1].removeprefix("ipc://")).parent
    while not (folder / "inbox").exists():
        time.sleep(0.02)
    made.process.kill()
    made.process.communicate()
    _, alive = psutil.wait_procs(engines, timeout=10)
    assert alive == []
    assert not folder.exists()


def test_an_engine_that_cannot_start_ends_the_gateway():
    made = Server("--load-s", "nonsense")
    assert made.process.wait(20) == 2
    made.process.communicate()


def test_a_taken_port_is_a_clear_error(shared):
    command = [sys.executable, "-m", "benchmarks.null_engine", "serve"]
    run = subprocess.run(
        [*command, "--port", str(shared.port)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert f"cannot listen on 127.0.0.1 port {shared.port}" in run.stderr


async def test_200_disconnects_at_random_phases(shared):
    await storm(shared, 200)


@pytest.mark.full
async def test_2000_disconnects_at_random_phases(shared):
    await storm(shared, 2000)


@pytest.mark.full
async def test_2000_disconnects_leave_no_page_and_no_slot_of_the_real_engine():
    with server(real=True) as s:
        await storm(s, 2000)
        assert s.gauge("vllm:generation_tokens_total") > 100


def exchange(port: int, data: bytes, timeout_s: float = 5.0) -> bytes:
    """Sends raw bytes and reads until the server closes or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as conn:
        received = b""
        try:
            conn.sendall(data)
            conn.settimeout(1.0)
            while block := conn.recv(1 << 16):
                received += block
        except (TimeoutError, ConnectionError):
            pass
        return received


def test_heads_that_are_not_http(shared):
    post = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    cases = {
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 100_000 + b"\r\n\r\n": 431,
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 1_000_000: 431,
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n": 431,
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n": 431,
        b"nonsense\r\n\r\n": 400,
        b"GET / HTTP/9.9\r\n\r\n": 400,
        b"GET /\xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n": 400,
        post + b"content-length: -1\r\n\r\n": 400,
        post + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n": 400,
        post + b"transfer-encoding: chunked\r\n\r\nzz\r\n": 400,
        post + b"content-type: application/json\r\ncontent-length: 99999999999\r\n\r\n": 413,
        b"GET /v1/models HTTP/1.1\r\nhost: evil.example\r\n\r\n": 403,
        b"GET http://evil.example/v1/models HTTP/1.1\r\nhost: evil.example\r\n\r\n": 403,
        b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n": 404,
        b"GET /ready HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\n"
        b"connection: upgrade\r\n\r\n": 200,
    }
    memory = psutil.Process(shared.process.pid).memory_info().rss
    for data, status in cases.items():
        reply = exchange(shared.port, data)
        assert reply.startswith(b"HTTP/1.1 %d " % status), (data[:80], reply[:200])
        if status != 200:
            error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
            assert set(error) == {"message", "type", "param", "code"}
    assert shared.ready() == 200
    assert psutil.Process(shared.process.pid).memory_info().rss - memory < 64 << 20


def test_pipelined_requests_are_answered_in_order(shared):
    one = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"
    two = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    reply = exchange(shared.port, one + two)
    assert re.findall(rb"HTTP/1.1 (\d+)", reply) == [b"200", b"200"]
    assert reply.index(b'"version"') < reply.index(b'"status"')


def test_exactly_the_announced_listeners(shared):
    found = psutil.Process(shared.process.pid).net_connections("tcp")
    assert {c.laddr for c in found if c.status == "LISTEN"} == {("127.0.0.1", shared.port)}
    for child in psutil.Process(shared.process.pid).children():
        assert [c for c in child.net_connections("tcp") if c.status == "LISTEN"] == []
    line = os.read(shared.process.stdout.fileno(), 1000).decode()
    assert f"{shared.url}/ready" in line
