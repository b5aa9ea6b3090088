# SPDX-License-Identifier: MIT
"""Real processes: the gateway with the null engine behind it, killed, stopped, drained and left."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import psutil
import pytest

from tests.conftest import ROOT

TEXT = "/v1/completions"
BODY = {"prompt": "hello world", "max_tokens": 4000, "stream": True}


class Server:
    """A gateway process and the engine process that it started; `real` serves the demo model."""

    def __init__(self, *flags: str, real: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        module = ["tokenspeed"] if real else ["benchmarks.null_engine"]
        command = [sys.executable, "-m", *module, "serve"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while self.ready() != 200:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ready(self) -> int:
        try:
            return httpx.get(f"{self.url}/ready").status_code
        except httpx.TransportError:
            return 0

    def engine(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        (found,) = [c for c in children if "--inbox" in c.cmdline()]
        return found

    def gauge(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@contextmanager
def server(*flags: str, real: bool = False):
    """A ready server; whatever happens, no process of it is left."""
    made = Server(*flags, real=real)
    try:
        made.wait_ready()
        family = psutil.Process(made.process.pid).children(recursive=True)
        yield made
    finally:
        if made.process.poll() is None:
            made.process.terminate()
        try:
            made.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            made.process.kill()
            made.process.communicate()
            raise
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            process.kill()
        assert alive == []


@pytest.fixture(scope="module")
def shared():
    """One server for the tests that do it no harm."""
    with server("--step-s", "0.005") as made:
        yield made


async def read_stream(client: httpx.AsyncClient, url: str, started: asyncio.Semaphore, **change):
    """Reads a stream to its end; returns (text, seconds at its end, None or the failure)."""
    text = ""
    try:
        async with client.stream("POST", url + TEXT, json={**BODY, **change}) as reply:
            async for piece in reply.aiter_text():
                if not text:
                    started.release()
                text += piece
    except httpx.TransportError as error:
        return text, time.monotonic(), error
    return text, time.monotonic(), None


async def start_streams(client, url, number, **change):
    started = asyncio.Semaphore(0)
    tasks = [
        asyncio.create_task(read_stream(client, url, started, **change)) for _ in range(number)
    ]
    for _ in range(number):
        await started.acquire()
    return tasks


def limits(number: int) -> httpx.Limits:
    return httpx.Limits(max_connections=number)


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


async def leave_at_random(port: int, rng: random.Random) -> None:
    """Opens a connection, sends some or all of a request, reads for a while, and hangs up."""
    body = json.dumps({**BODY, "stream": rng.random() < 0.7, "n": rng.choice([1, 1, 3])}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    data = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    phase = rng.random()
    writer.write(data if phase > 0.2 else data[: rng.randrange(1, len(data))])
    if phase > 0.4:
        try:
            async with asyncio.timeout(rng.random() * 0.2):
                await reader.read(1 << 20)
        except TimeoutError:
            pass
    if rng.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


async def storm(s: Server, number: int) -> None:
    rng = random.Random(7)
    process = psutil.Process(s.process.pid)
    await asyncio.gather(*(leave_at_random(s.port, rng) for _ in range(20)))
    await asyncio.sleep(0.5)
    before = process.num_fds()
    for _ in range(0, number, 50):
        await asyncio.gather(*(leave_at_random(s.port, rng) for _ in range(50)))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = s.gauge("vllm:num_requests_running") + s.gauge("vllm:num_requests_waiting")
        if left == 0 and process.num_fds() <= before + 2:
            break
        await asyncio.sleep(0.05)
    assert left == 0
    assert s.gauge("vllm:kv_cache_usage_perc") == 0
    assert process.num_fds() <= before + 2
    async with httpx.AsyncClient() as client:
        reply = await client.post(s.url + TEXT, json={"prompt": "hello", "max_tokens": 2})
        assert reply.json()["usage"]["completion_tokens"] == 2


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
