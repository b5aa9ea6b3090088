# SPDX-License-Identifier: MIT
"""Where the time of a model's step goes on this CPU, op by op, and how near memory's pace it is.

A step of `--rows` rows of `--tokens` tokens each at a context is run again and again with a clock
around every kernel; contents are random. The first of each op's columns is the median of a call.
What a step takes beside its kernels is Python's (the engine replays captured decode steps: there it
is nothing). Run: python benchmarks/step_profile.py MODEL [--rows 8] [--tokens 1] [--context 512]
[--quantization int8] [--group 32] [--threads 2]. The last line is JSON.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tokenspeed import _cpu
from tokenspeed.execution.kv_cache import KVCache
from tokenspeed.kernels.quant import Quantization
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.layer import Target
from tokenspeed.models.build import load_model
from tokenspeed.models.causal_lm import CausalLM

PAGE = 64
CPU = torch.device("cpu")
Times = dict[str, list[float]]


class Timed:
    """A kernel with a clock around it; its layer's `pack` finds the kernel itself."""

    def __init__(self, op: str, kernel: Callable[..., Any], times: Times) -> None:
        self.name, self.kernel, self._times = op, kernel, times

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        result = self.kernel(*arguments, **named)
        self._times[self.name].append(time.perf_counter() - begin)
        return result


def timed_model(options: argparse.Namespace, times: Times) -> CausalLM:
    """The model, every kernel of which notes its times."""
    kernel_of, pack_of = Target.kernel, Target.pack

    def kernel(target: Target, op: str, **shapes: int) -> Timed:
        sizes = ",".join(str(size) for size in shapes.values())
        return Timed(f"{op} {sizes}", kernel_of(target, op, **shapes), times)

    def pack(target: Target, kernel: Any, weight: torch.Tensor) -> Any:
        return pack_of(target, getattr(kernel, "kernel", kernel), weight)

    form = options.quantization
    held = None if form is None else Quantization(form, options.group)
    Target.kernel, Target.pack = kernel, pack  # type: ignore[method-assign,assignment]
    try:
        return load_model(options.model, torch.bfloat16, CPU, None, quantization=held)
    finally:
        Target.kernel, Target.pack = kernel_of, pack_of  # type: ignore[method-assign]


def batch_of(rows: int, tokens: int, context: int) -> tuple[ForwardBatch, int]:
    """Rows of `tokens` tokens that end at `context`, and the pages that they need."""
    each = -(-context // PAGE)
    table = torch.arange(rows * each, dtype=torch.int32).view(rows, each)
    positions = torch.arange(context - tokens, context).repeat(rows, 1)
    index = table.gather(1, positions // PAGE).long() * PAGE + positions % PAGE
    starts = torch.arange(rows + 1, dtype=torch.int32) * tokens
    batch = ForwardBatch(
        torch.randint(0, 1000, (rows * tokens,)),
        positions.flatten().int(),
        index.flatten(),
        starts,
        torch.full((rows,), context, dtype=torch.int32),
        torch.arange(rows, dtype=torch.int32),
        table,
        starts[1:].long() - 1,
        tokens,
        context,
    )
    return batch, rows * each


@torch.inference_mode()
def main() -> None:
    options = parse()
    times: Times = defaultdict(list)
    model = timed_model(options, times)
    _cpu.set_num_threads(options.threads)
    torch.set_num_threads(1)
    batch, pages = batch_of(options.rows, options.tokens, options.context)
    cache = KVCache(model.cache_specs(), num_pages=pages, page_size=PAGE, device=CPU)
    for tensor in (t for layer in cache.layers for t in layer):
        tensor.normal_()
    steps: list[float] = []
    for step in range(options.steps + 2):
        if step == 2:  # the first ones warm up
            times.clear()
            steps.clear()
        begin = time.perf_counter()
        model.logits(model.forward(batch, cache.layers)[batch.logits_index])
        steps.append(time.perf_counter() - begin)
    show(times, steps, options)


def show(times: Times, steps: list[float], options: argparse.Namespace) -> None:
    whole = median(steps)
    rows: list[dict[str, Any]] = [
        {
            "op": op,
            "calls": len(found) // len(steps),
            "us": round(median(found) * 1e6, 1),
            "share": round(median(found) * len(found) / len(steps) / whole, 3),
        }
        for op, found in times.items()
    ]
    rows.sort(key=lambda row: -row["share"])
    print(f"step {whole * 1e3:.2f} ms, median of {len(steps)}")
    print(f"{'op':44}{'calls':>6}{'us each':>10}{'of the step':>13}")
    for row in rows:
        print(f"{row['op']:44}{row['calls']:6}{row['us']:10.1f}{row['share']:12.1%}")
    asked = {k: v for k, v in vars(options).items() if k != "model"}
    print(json.dumps({**asked, "step_ms": round(whole * 1e3, 3), "ops": rows}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1, help="of each row")
    parser.add_argument("--context", type=int, default=512, help="these tokens included")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if not 1 <= options.tokens <= options.context or options.rows < 1 or options.steps < 1:
        parser.error("--rows and --steps must be at least 1, --tokens in [1, --context]")
    return options


if __name__ == "__main__":
    main()
