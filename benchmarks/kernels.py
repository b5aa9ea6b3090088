# SPDX-License-Identifier: MIT
"""Times every CPU kernel against its torch reference, at sizes of real decode and prefill steps.

Knows ops and sizes, no engine. Reference and kernel run in turn, so that a busy machine slows both;
what counts is the ratio of the first quintiles. Weights and KV rotate through 256 MiB.
Run: python benchmarks/kernels.py [--only NAME] [--seconds S] [--cpu-time]. The last line is JSON.
On a busy machine use --cpu-time: one thread each, and only the time it was really running.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenspeed import _cpu
from tokenspeed.kernels import select

BF16 = torch.bfloat16
COLD_BYTES = 256 << 20  # of weights and KV, so that they come from memory as in a whole model


@dataclass(frozen=True)
class Case:
    """`arguments(i)` is the i-th of `copies` equal argument lists in memory of their own."""

    op: str
    name: str
    arguments: Callable[[int], tuple[object, ...]]
    copies: int
    dtype: torch.dtype = BF16
    bytes: int = 0  # of weights and KV that one call must read


def rand(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def copies_of(size: int) -> int:
    return max(1, min(64, COLD_BYTES // max(size, 1)))


def linear_case(tokens: int, size: int, out: int) -> Case:
    count = copies_of(size * out * 2)
    weights = [rand(out, size, scale=size**-0.5) for _ in range(count)]
    x = rand(tokens, size)
    name = f"T={tokens} {size}->{out}"
    return Case("linear", name, lambda i: (x, weights[i], None), count, bytes=size * out * 2)


def moe_case(tokens: int, size: int, inner: int, experts: int, top_k: int) -> Case:
    total = experts * 3 * inner * size * 2
    count = copies_of(total)
    w13 = [rand(experts, 2 * inner, size, scale=size**-0.5) for _ in range(count)]
    w2 = [rand(experts, size, inner, scale=inner**-0.5) for _ in range(count)]
    x, weights = rand(tokens, size), torch.rand(tokens, top_k)
    ids = torch.rand(tokens, experts).topk(top_k)[1].int()
    used = len(torch.unique(ids)) * 3 * inner * size * 2
    name = f"T={tokens} {size}x{inner} top {top_k} of {experts}"
    return Case("moe", name, lambda i: (x, w13[i], w2[i], weights, ids), count, bytes=used)


def tables(rows: int, q_len: int, kv_len: int, page: int) -> tuple[int, tuple[Tensor, ...]]:
    pages = -(-kv_len // page)
    table = torch.randperm(rows * pages).view(rows, pages).int()
    start = torch.arange(rows + 1, dtype=torch.int32) * q_len
    length = torch.full((rows,), kv_len, dtype=torch.int32)
    return rows * pages, (table, torch.arange(rows, dtype=torch.int32), start, length)


def gqa_case(rows: int, q_len: int, kv_len: int, heads: int, kv_heads: int, dim: int) -> Case:
    pages, batch = tables(rows, q_len, kv_len, 64)
    size = pages * 64 * kv_heads * dim * 4
    count = copies_of(size)
    shape = (pages, 64, kv_heads, dim)
    caches = [(rand(*shape), rand(*shape)) for _ in range(count)]
    q = rand(rows * q_len, heads, dim)
    name = f"R={rows} q={q_len} kv={kv_len} {heads}/{kv_heads}x{dim}"
    arguments = lambda i: (q, *caches[i], *batch, dim**-0.5)  # noqa: E731
    return Case("attention_gqa", name, arguments, count, bytes=size)


def mla_case(rows: int, q_len: int, kv_len: int, heads: int, latent: int, rope: int) -> Case:
    pages, batch = tables(rows, q_len, kv_len, 64)
    size = pages * 64 * (latent + rope) * 2
    count = copies_of(size)
    caches = [rand(pages, 64, latent + rope) for _ in range(count)]
    q, pe = rand(rows * q_len, heads, latent), rand(rows * q_len, heads, rope)
    name = f"R={rows} q={q_len} kv={kv_len} {heads}x{latent}+{rope}"
    arguments = lambda i: (q, pe, caches[i], *batch, 0.1)  # noqa: E731
    return Case("attention_mla", name, arguments, count, bytes=size)


def small_cases(tokens: int) -> Iterator[Case]:
    x, weight = rand(tokens, 1024), rand(1024)
    yield Case("rms_norm", f"T={tokens} 1024", lambda i: (x, weight, 1e-6), 1)
    yield Case("add_rms_norm", f"T={tokens} 1024", lambda i: (x, x, weight, 1e-6), 1)
    gate = rand(tokens, 6144)
    yield Case("silu_mul", f"T={tokens} 3072", lambda i: (gate,), 1)
    q, k, v = rand(tokens, 16, 128), rand(tokens, 8, 128), rand(tokens, 8, 128)
    table, index = torch.rand(4096, 128), torch.arange(tokens)
    caches = rand(16, 64, 8, 128), rand(16, 64, 8, 128)
    arguments = (q, k, v, table, index.int(), index, *caches, False)
    yield Case("rope_append_gqa", f"T={tokens} 16/8x128", lambda i: arguments, 1)
    logits, bias = torch.randn(tokens, 16), torch.randn(16)
    rule = ("sigmoid", 4, 2, "top2", True, 2.5)
    f32 = torch.float32
    yield Case("route", f"T={tokens} 4 of 16", lambda i: (logits, bias, 4, *rule), 1, f32)


def _same(arguments: tuple[object, ...], _: int) -> tuple[object, ...]:
    return arguments


def sample_cases(rows: int) -> Iterator[Case]:
    logits = torch.randn(rows, 32768) * 3
    for name, t, k, p in [
        ("greedy", 0.0, 0, 1.0),
        ("plain", 1.0, 0, 1.0),
        ("k50 p.9", 0.7, 50, 0.9),
    ]:
        ones = torch.ones(rows)
        settings = (ones * t, ones.int() * k, ones * p, ones * 0, ones.long(), ones.long())
        arguments = (logits, *settings)
        name = f"B={rows} V=32768 {name}"
        yield Case("sample", name, partial(_same, arguments), 1, torch.float32)


def all_cases(only: str) -> Iterator[Case]:
    if only in "linear":
        for tokens in (1, 8, 16):
            yield linear_case(tokens, 1024, 4096)
            yield linear_case(tokens, 3072, 1024)
        yield linear_case(1, 1024, 32768)
    if only in "moe":
        for tokens in (1, 8, 512):
            yield moe_case(tokens, 1024, 512, 16, 4)
    for rows, q_len, kv_len in ((1, 1, 512), (1, 1, 4096), (8, 1, 512), (1, 512, 1024)):
        if only in "attention_gqa":
            yield gqa_case(rows, q_len, kv_len, 16, 8, 128)
        if only in "attention_mla":
            yield mla_case(rows, q_len, kv_len, 16, 512, 64)
    for tokens in (1, 8, 512):
        yield from (c for c in small_cases(tokens) if only in c.op)
    for rows in (1, 8):
        yield from (c for c in sample_cases(rows) if only in c.op)


def measure(case: Case, seconds: float, clock: Callable[[], float]) -> dict[str, object]:
    """First quintiles of interleaved calls, in microseconds: a busy machine has a long tail."""
    runs = {b: select(case.op, dtype=case.dtype, backend=b) for b in ("reference", "cpu")}
    times: dict[str, list[float]] = {backend: [] for backend in runs}
    end, i = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or i < 6:
        arguments = case.arguments(i % case.copies)
        for backend in ("reference", "cpu") if i % 2 else ("cpu", "reference"):
            other = case.arguments((i + (backend == "cpu") * case.copies // 2) % case.copies)
            start = clock()
            runs[backend](*(other if case.copies > 1 else arguments))
            times[backend].append(clock() - start)
        i += 1
    reference, cpu = (sorted(times[b][2:])[len(times[b][2:]) // 5] * 1e6 for b in runs)
    return {
        "op": case.op,
        "case": case.name,
        "reference_us": round(reference, 1),
        "cpu_us": round(cpu, 1),
        "ratio": round(reference / cpu, 2),
        "gb_per_s": round(case.bytes / cpu / 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its CPU time")
    options = parser.parse_args()
    clock = time.thread_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
        _cpu.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    print(f"{_cpu.isa()}, {_cpu.num_threads()} threads; torch {torch.get_num_threads()}")
    print(f"{'op':16} {'case':34} {'reference us':>12} {'cpu us':>9} {'ratio':>6} {'GB/s':>6}")
    results = []
    for case in all_cases(options.only):
        r = measure(case, options.seconds, clock)
        results.append(r)
        print(
            f"{r['op']:16} {r['case']:34} {r['reference_us']:>12} {r['cpu_us']:>9} "
            f"{r['ratio']:>6} {r['gb_per_s']:>6}"
        )
    print(
        json.dumps(
            {
                "benchmark": "kernels",
                "isa": _cpu.isa(),
                "cpu_time": options.cpu_time,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
