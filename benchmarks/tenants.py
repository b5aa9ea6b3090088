# SPDX-License-Identifier: MIT
"""Whether one tenant learns from the cache what another has asked: shared pages, and time.

A real server with two tenants. First, pairs: both send the same prompt, one after the other in
turns, and the pages that the second one found cached are counted. Then, probes: before each, one
tenant sends a prompt; the other then asks for the first token of that very prompt (`seen`), of one
that nobody has sent (`unseen`), or of one that it has sent itself (`own`, to show that a hit would
be noticed). If nothing leaks, `seen` and `unseen` are times of one distribution, and so are both
tenants' times of prompts that they send first: a two-sample Kolmogorov-Smirnov test.

    python -m benchmarks.tenants [--pairs 10000] [--probes 500] [--prompt 512] [--seed 0]
"""

import argparse
import http.client
import json
import math
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

KEYS = {"first": "key-of-first", "second": "key-of-second"}
PAGE_SIZE = 16
PAIR_TOKENS = 49  # three whole pages, and the token that is always computed
THREADS = 8
ALPHA = 0.01


def ks(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The two-sample Kolmogorov-Smirnov statistic and its p-value.

    The p-value is the asymptotic one with Stephens' correction for small samples.
    """
    x, y = sorted(a), sorted(b)
    d = max(abs(bisect_right(x, v) / len(x) - bisect_right(y, v) / len(y)) for v in x + y)
    root = math.sqrt(len(x) * len(y) / (len(x) + len(y)))
    at = (root + 0.12 + 0.11 / root) * d
    if at < 0.2:
        return d, 1.0  # the series converges slowly there, to 1
    terms = (2 * (-1) ** (j - 1) * math.exp(-2 * (j * at) ** 2) for j in range(1, 101))
    return d, min(1.0, max(0.0, sum(terms)))


class Client:
    """One tenant's connection."""

    def __init__(self, port: int, tenant: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = {"x-api-key": KEYS[tenant], "content-type": "application/json"}

    def ask(self, prompt: list[int]) -> tuple[float, int]:
        """Seconds to the first token, which is the only one, and how many were cached."""
        body = json.dumps({"prompt": prompt, "max_tokens": 1, "ignore_eos": True})
        begin = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body, self._headers)
        data = self._connection.getresponse().read()
        seconds = time.perf_counter() - begin
        return seconds, json.loads(data)["usage"]["prompt_tokens_details"]["cached_tokens"]


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(32, 127) for _ in range(length)]


def pairs(port: int, count: int, seed: int) -> dict[str, int]:
    """How many pages the second of each pair found, and the first if it asks again."""

    def some(thread: int) -> tuple[int, int]:
        rng = random.Random(f"{seed} {thread}")
        clients = [Client(port, tenant) for tenant in KEYS]
        shared = own = 0
        for i in range(thread, count, THREADS):
            ids = prompt(rng, PAIR_TOKENS)
            early, late = clients if i % 2 else clients[::-1]
            early.ask(ids)
            shared += late.ask(ids)[1] // PAGE_SIZE
            if i % 100 < THREADS:
                own += early.ask(ids)[1] // PAGE_SIZE
        return shared, own

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(some, range(THREADS)))
    return {
        "pairs": count,
        "shared_pages": sum(s for s, _ in found),
        "own": sum(o for _, o in found),
    }


def probes(port: int, count: int, length: int, seed: int) -> dict[str, list[float]]:
    """Seconds to the first token by kind, in a random order; `first` is the other tenant's."""
    rng = random.Random(seed)
    first, second = (Client(port, tenant) for tenant in KEYS)
    times: dict[str, list[float]] = defaultdict(list)
    kinds = ["seen", "unseen", "own"] * count
    rng.shuffle(kinds)
    for _ in range(20):
        first.ask(prompt(rng, length))
    for kind in kinds:
        ids = prompt(rng, length)
        if kind == "own":
            second.ask(ids)
        else:
            before = ids if kind == "seen" else prompt(rng, length)
            times["first"].append(first.ask(before)[0])
        times[kind].append(second.ask(ids)[0])
    return times


def report(args: argparse.Namespace, port: int) -> dict[str, Any]:
    counted = pairs(port, args.pairs, args.seed)
    times = probes(port, args.probes, args.prompt, args.seed)
    tests = {}
    for a, b in (("seen", "unseen"), ("first", "unseen"), ("own", "unseen")):
        tests[f"{a}/{b}"] = dict(zip(("d", "p"), ks(times[a], times[b]), strict=True))
    print(f"{counted['pairs']:,} pairs: {counted['shared_pages']} pages shared", end="")
    print(f" ({counted['own']} found by who had sent them)")
    print(f"\n{'prompt':8} {'probes':>7} {'median ms':>10}")
    for kind, found in times.items():
        print(f"{kind:8} {len(found):7} {median(found) * 1000:10.3f}")
    print(f"\n{'two samples':14} {'D':>7} {'p':>10}")
    for name, one in tests.items():
        print(f"{name:14} {one['d']:7.4f} {one['p']:10.3g}")
    told = [name for name in ("seen/unseen", "first/unseen") if tests[name]["p"] <= ALPHA]
    blind = tests["own/unseen"]["p"] > ALPHA or counted["own"] == 0
    medians = {f"{kind}_ms": median(found) * 1000 for kind, found in times.items()}
    result = counted | medians | {"tests": tests, "prompt_tokens": args.prompt}
    return result | {"passed": not (counted["shared_pages"] or told or blind)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--probes", type=int, default=500, help="of each kind")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a probe")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tenants = [{"name": name, "keys": [key]} for name, key in KEYS.items()]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        file = Path(folder) / "tenants.json"
        file.write_text(json.dumps({"tenants": tenants}))
        flags = ("--port", str(port), "--tenants", str(file), "--page-size", str(PAGE_SIZE))
        server = subprocess.Popen([sys.executable, "-m", "tokenspeed", "serve", "demo", *flags])
        try:
            wait_ready(server, port)
            result = report(args, port)
        finally:
            server.terminate()
            server.wait(30)
    print(json.dumps({"machine": platform.machine(), **result}))
    return 0 if result["passed"] else 1


def wait_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise RuntimeError("the server did not become ready")


if __name__ == "__main__":
    raise SystemExit(main())
