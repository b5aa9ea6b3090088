# SPDX-License-Identifier: MIT
"""What the gateway costs per streamed token: events per CPU-second, added latency, memory.

Three processes: the real gateway, an engine that computes nothing (`null_engine.py`) and a load
generator. Every answer is a run of single-letter tokens, so that the load generator can count the
tokens in an event. Added latency is the time from the engine's send to the client's receive, both
read from the machine's monotonic clock. Events per second per core is events over the gateway
process's own CPU time (user and system), so a busy machine or a slow client cannot flatter it.

With several engines the null engines together keep the pace. `routing_ms` is what choosing one of
four engines costs a prompt of so many tokens, every one of whose blocks one engine has.

`--turns N` adds what a turn of a long session costs, and streamed events, in all dialects, beside
vLLM's front end if `--vllm` names an interpreter that has it (see `front_ends.py`).

    python benchmarks/gateway.py [--streams 64 256] [--rate 8000 40000] [--tokens 300]
        [--engines 1] [--turns 9] [--new 700] [--vllm ENVIRONMENT/bin/python]
"""

import argparse
import asyncio
import itertools
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from front_ends import compare

from tokenspeed.engine.routing import Load, PrefixRouter

LETTER = "x"
PAGE_SIZE = 64  # tokens


async def one_stream(port: int, seed: int, tokens: int) -> list[float]:
    """Runs one stream; returns the time at which each token was read, by position."""
    body = {"prompt": LETTER, "max_tokens": tokens, "stream": True, "seed": seed}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    received: list[float] = []
    done = False
    while not done:
        block = await reader.read(1 << 16)
        now = time.monotonic()
        if not block:
            raise ConnectionError("the stream was cut off")
        for part in block.split(b'"text":"')[1:]:
            received += [now] * len(part.partition(b'"')[0])
        done = b"[DONE]" in block
    writer.close()
    return received


def load(port: int, streams: int, tokens: int) -> dict[str, Any]:
    """The load generator: all streams at once. Runs in a process of its own."""
    import uvloop

    async def run() -> list[list[float]]:
        return await asyncio.gather(*(one_stream(port, i, tokens) for i in range(streams)))

    begin = time.monotonic()
    received = uvloop.run(run())
    return {"wall_s": time.monotonic() - begin, "received": received}


def metric(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def wait_ready(url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/ready")
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("the gateway did not become ready")


def reach_all(url: str) -> None:
    """Returns once every gateway answers: what has a name waits for its own."""
    for i in range(32):
        body = json.dumps({"prompt": LETTER, "max_tokens": 1}).encode()
        headers = {"content-type": "application/json", "session-id": f"warm{i}"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def routing_ms(num_tokens: int) -> float:
    """Median time to choose an engine for a prompt and to record it."""
    router = PrefixRouter([4 * num_tokens // PAGE_SIZE] * 4, PAGE_SIZE)
    prompt = random.Random(0).choices(range(150_000), k=num_tokens)
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        route = router.choose(prompt, b"", [Load()] * 4)
        assert route is not None
        router.record(route)
        times.append(time.perf_counter() - begin)
    return round(percentile(times, 0.5) * 1e3, 2)


def sent_times(folder: str) -> dict[int, list[float]]:
    """When each stream's tokens left their engine, by the stream's seed."""
    sent: dict[int, list[float]] = {}
    for file in Path(folder).glob("stamps.*"):
        for seed, times in json.loads(file.read_text()).items():
            sent[int(seed)] = sorted(sent.get(int(seed), []) + times)
    return sent


def cpu_seconds(gateways: list[psutil.Process]) -> float:
    """User and system time of all gateway processes."""
    return float(sum(t.user + t.system for t in (g.cpu_times() for g in gateways)))


def family(pid: int) -> list[psutil.Process]:
    """The gateway process and, of several, the further ones."""
    first = psutil.Process(pid)
    further = [c for c in first.children() if "tokenspeed.gateway.further" in c.cmdline()]
    return [first, *further]


def measure(
    streams: int, rate: float, tokens: int, port: int, engines: int, gateways: int = 1
) -> dict[str, Any]:
    """One run with `streams` streams that together ask for `rate` tokens a second."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.null_engine", "serve", "--port", str(port)]
        command += ["--step-s", str(streams / rate), "--stamps", f"{folder}/stamps"]
        command += ["--data-parallel-size", str(engines), "--num-gateways", str(gateways)]
        gateway = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_ready(url)
            if gateways > 1:
                reach_all(url)
            process = psutil.Process(gateway.pid)
            # Warms up; these stamps come first and are cut off below.
            start_load(port, 8, 20, Path(folder, "warm.json")).wait()
            processes = family(gateway.pid)
            idle_bytes = process.memory_info().rss
            before, writes = cpu_seconds(processes), metric(url, "vllm:generation_tokens_total")
            result = Path(folder, "result.json")
            child = start_load(port, streams, tokens, result)
            peak = idle_bytes
            while child.poll() is None:
                peak = max(peak, process.memory_info().rss)
                time.sleep(0.2)
            after = cpu_seconds(processes)
            counted = metric(url, "vllm:generation_tokens_total") - writes
            found = json.loads(result.read_text())
        finally:
            gateway.terminate()
            gateway.wait(20)
        sent = sent_times(folder)
    assert counted == streams * tokens, f"{counted} tokens, not {streams * tokens}"
    received = found["received"]
    assert all(len(times) == tokens for times in received)
    added = [
        arrived - left
        for seed, times in enumerate(received)
        for left, arrived in zip(sent[seed][-tokens:], times, strict=True)
    ]
    writes_seen = sum(len(set(times)) for times in received)
    cpu_s = after - before
    return {
        "engines": engines,
        "gateways": gateways,
        "streams": streams,
        "tokens": streams * tokens,
        "asked_tokens_per_s": rate,
        "tokens_per_s": round(streams * tokens / found["wall_s"]),
        "gateway_cpu_s": round(cpu_s, 2),
        "tokens_per_cpu_s": round(streams * tokens / cpu_s),
        "reads_per_token": round(writes_seen / (streams * tokens), 3),
        "added_p50_ms": round(percentile(added, 0.5) * 1e3, 2),
        "added_p99_ms": round(percentile(added, 0.99) * 1e3, 2),
        "kib_per_stream": round((peak - idle_bytes) / streams / 1024, 1),
    }


def start_load(port: int, streams: int, tokens: int, result: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--load", str(port)]
    options = {"--streams": streams, "--tokens": tokens, "--result": result}
    return subprocess.Popen([*command, *(str(x) for pair in options.items() for x in pair)])


def _table(rows: list[dict[str, Any]]) -> None:
    for row in [{name: name for name in rows[0]}, *rows]:
        print("  ".join(f"{row[name]:>{max(len(name), 10)}}" for name in rows[0]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rate", type=float, nargs="+", default=[8000, 40000])
    parser.add_argument("--tokens", type=int, default=300, help="of each stream")
    parser.add_argument("--engines", type=int, nargs="+", default=[1])
    parser.add_argument("--gateways", type=int, nargs="+", default=[1], help="processes")
    parser.add_argument("--port", type=int, default=8311)
    parser.add_argument("--turns", type=int, default=0, help="of a session of 100,000 tokens")
    parser.add_argument("--new", type=int, default=700, help="tokens of such a turn")
    parser.add_argument("--vllm", help="interpreter of an environment that has vLLM")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        args.result.write_text(json.dumps(load(args.load, args.streams[0], args.tokens)))
        return
    cases = itertools.product(args.gateways, args.engines, args.streams, args.rate)
    runs = [measure(s, r, args.tokens, args.port, e, g) for g, e, s, r in cases]
    _table(runs)
    ends: dict[str, Any] = {}
    if args.turns:
        ends = compare(args.turns, args.new, args.vllm, args.port)
        _table(ends["sessions"])
        _table(ends["streams"])
    versions = {p: __import__(p).__version__ for p in ("uvicorn", "uvloop", "msgspec")}
    machine = {"python": platform.python_version(), "machine": platform.machine(), **versions}
    routing = {str(n): routing_ms(n) for n in (1_000, 10_000, 100_000)}
    line = json.dumps(
        {"benchmark": "gateway", **machine, "runs": runs, "routing_ms": routing} | ends
    )
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
