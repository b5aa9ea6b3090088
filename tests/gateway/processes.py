# SPDX-License-Identifier: MIT
"""Gateway processes for tests: started, read from, stormed, and never left behind."""

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import psutil

from tests.conftest import ROOT

TEXT = "/v1/completions"
BODY = {"prompt": "hello world", "max_tokens": 4000, "stream": True}


class Server:
    """A gateway process and its engine processes; `real` serves the demo model."""

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

    def engines(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [c for c in children if "--inbox" in _command(c)]

    def engine(self) -> psutil.Process:
        (found,) = self.engines()
        return found

    def gauge(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@contextmanager
def server(*flags: str, real: bool = False):
    """A ready server; whatever happens, no process of it is left."""
    made, family = Server(*flags, real=real), []
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


def _command(process: psutil.Process) -> list[str]:
    """Its words; none if it has ended meanwhile."""
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie too
        return []
