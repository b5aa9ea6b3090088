# SPDX-License-Identifier: MIT
"""Times every CPU kernel against its torch reference, at sizes of real decode and prefill steps.

Inputs are those of the kernels' cases (`tokenspeed/kernels/cases`), timing is that of `tokenspeed
kernels bench`: reference and kernel run in turn, so that a busy machine slows both; what counts is
the ratio of the first quintiles. Weights and KV rotate through more than the caches hold.
Run: python benchmarks/kernels.py [--only NAME] [--seconds S] [--cpu-time]. The last line is JSON.
On a busy machine use --cpu-time: one thread each, and only the time it was really running.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.backend import Ask
from tokenspeed.kernels.cases import cases_of
from tokenspeed.kernels.registry import REGISTRY
from tokenspeed.kernels.timing import Clock, measure

BACKENDS = ("reference", "cpu")
Sizes = Mapping[str, int]

GQA = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128}
MLA = {"num_heads": 16, "latent_dim": 512, "rope_dim": 64}
PROJECTIONS: tuple[Sizes, ...] = (
    {"num_inputs": 1024, "num_outputs": 4096},
    {"num_inputs": 3072, "num_outputs": 1024},
)
EXPERTS = {"num_experts": 16, "hidden_size": 1024, "intermediate_size": 512}
STEPS = ((1, 512), (1, 4096), (8, 512), (512, 512))  # tokens, context before them


def all_sizes() -> Iterator[tuple[str, int, Sizes]]:
    """(op, tokens, what a layer asks for)."""
    for sizes in PROJECTIONS:
        for tokens in (1, 8, 16):
            yield "linear", tokens, sizes
            yield "linear_quant", tokens, {**sizes, "group": 32}
    yield "linear", 1, {"num_inputs": 1024, "num_outputs": 32768}
    for tokens in (1, 8, 512):
        yield "moe", tokens, EXPERTS
        yield "moe_quant", tokens, {**EXPERTS, "group": 32}
    for tokens, context in STEPS:
        yield "attention_gqa", tokens, {**GQA, "context": context}
        yield "attention_mla", tokens, {**MLA, "context": context}
    for tokens in (1, 8, 512):
        yield "rms_norm", tokens, {"size": 1024}
        yield "add_rms_norm", tokens, {"size": 1024}
        yield "silu_mul", tokens, {"size": 3072}
        yield "embedding", tokens, {"size": 1024}
        yield "rope_append_gqa", tokens, GQA
        yield "rope_append_mla", tokens, MLA
        yield "route", tokens, {"num_experts": 16}
    for rows in (1, 8):
        yield "sample", rows, {"vocab_size": 32768, "greedy": 1}
        yield "sample", rows, {"vocab_size": 32768}


def run(op: str, tokens: int, sizes: Sizes, seconds: float, clock: Clock) -> dict[str, object]:
    """One line of the results."""
    cases = cases_of(op)
    dtype = torch.bfloat16 if torch.bfloat16 in cases.tolerance else torch.float32
    ask = Ask(op, "cpu", dtype, sizes)
    backends = [REGISTRY.backends[op][name] for name in BACKENDS]
    timing = measure(cases, ask, tokens, backends, seconds=seconds, clock=clock)
    reference, cpu = (timing.us[name] for name in BACKENDS)
    return {
        "op": op,
        "case": f"T={tokens} " + " ".join(f"{name}={size}" for name, size in sizes.items()),
        "reference_us": round(reference, 1),
        "cpu_us": round(cpu, 1),
        "ratio": round(reference / cpu, 2),
        "gb_per_s": round(timing.rate("cpu")[0], 1),
        "gflop_per_s": round(timing.rate("cpu")[1], 1),
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
    REGISTRY.load(gpu=False)
    print(f"{_cpu.isa()}, {_cpu.num_threads()} threads; torch {torch.get_num_threads()}")
    head = "op case reference_us cpu_us ratio gb_per_s gflop_per_s".split()
    print("{:16} {:64} {:>12} {:>9} {:>7} {:>8} {:>11}".format(*head))
    results = []
    for op, tokens, sizes in all_sizes():
        if options.only not in op:
            continue
        result = run(op, tokens, sizes, options.seconds, clock)
        results.append(result)
        print("{:16} {:64} {:>12} {:>9} {:>7} {:>8} {:>11}".format(*result.values()), flush=True)
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
