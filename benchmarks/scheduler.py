# SPDX-License-Identifier: MIT
"""What the control plane costs, through its Python binding: steps and admissions at long contexts.

Decode: `next_plan` + `commit` with many decoding requests, whose lengths are spread over one
page, at a long and at a short context. Admission: `submit` + the `next_plan` that admits a fully
cached prompt (its hashing and the comparison of its tokens included), alone and beside the decoding
requests. Micro-steps: the same decoding on a pipeline of 4, a quarter of the requests a step.
Match: what a router asks of each scheduler about that prompt. Runs no model: every sampled id is 5.
Results: benchmarks/results/scheduler.json.

    python benchmarks/scheduler.py [--requests 256] [--long 80000] [--short 8000] [--steps 640]
        [--clock wall|cpu] [--json FILE]
"""

import argparse
import json
import platform
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenspeed._scheduler import Scheduler
from tokenspeed.execution.plan_view import ROW_SAMPLE, PlanView

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}
PAGE_SIZE = 64
ADMISSIONS = 100
MICRO_STEPS = 4
ROOM = 4096  # tokens each decoding request may still generate


def result_for(plan: NDArray[np.int32]) -> NDArray[np.int32]:
    """The StepResult of a model that always says 5."""
    view = PlanView(plan)
    counts = view.flags & ROW_SAMPLE
    return view.result(np.full(counts.sum(), 5), counts, np.zeros(view.num_rows, np.bool_))


def prompt(seed: int, length: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(10, 100_000, length, dtype=np.int32)


def make(num_requests: int, context: int, num_micro_steps: int = 1) -> Scheduler:
    pages_each = (context + ROOM) // PAGE_SIZE + 1
    return Scheduler(
        num_pages=(num_requests + 2) * pages_each,
        page_size=PAGE_SIZE,
        max_num_seqs=num_requests + 1,
        max_num_batched_tokens=16384,
        max_model_len=context + ROOM,
        num_micro_steps=num_micro_steps,
        hash_key=bytes(range(16)),
    )


def decoding(num_requests: int, context: int, num_micro_steps: int = 1) -> Scheduler:
    """A scheduler with `num_requests` distinct requests, all past their prefill."""
    scheduler = make(num_requests, context, num_micro_steps)
    share = -(-num_requests // num_micro_steps)
    for i in range(num_requests):
        scheduler.submit(i, prompt(i, context - i % PAGE_SIZE), max_tokens=ROOM)
    while True:
        plan = scheduler.next_plan()
        assert plan is not None
        scheduler.commit(result_for(plan))
        view = PlanView(plan)
        if view.num_rows == len(view.tokens) == share:
            return scheduler


def time_steps(
    scheduler: Scheduler, num_steps: int, clock: Clock, num_micro_steps: int = 1
) -> NDArray[np.float64]:
    """Microseconds of next_plan + commit, one per step."""
    times = np.empty(num_steps)
    in_flight: deque[NDArray[np.int32]] = deque()
    for i in range(-num_micro_steps, num_steps):  # the first steps fill the pipeline
        start = clock()
        plan = scheduler.next_plan()
        planned = clock()
        assert plan is not None
        in_flight.append(result_for(plan))
        if len(in_flight) < num_micro_steps:
            continue
        resumed = clock()
        scheduler.commit(in_flight.popleft())
        times[i] = planned - start + clock() - resumed
    while in_flight:
        scheduler.commit(in_flight.popleft())
    return times * 1e6


def time_admissions(scheduler: Scheduler, context: int, clock: Clock) -> NDArray[np.float64]:
    """Microseconds of submit + the next_plan that admits a fully cached prompt."""
    tokens = prompt(1 << 20, context)
    times = np.empty(ADMISSIONS + 1)
    for i in range(ADMISSIONS + 1):
        request_id = (1 << 32) + i
        start = clock()
        scheduler.submit(request_id, tokens, max_tokens=1)
        plan = scheduler.next_plan()
        times[i] = clock() - start
        assert plan is not None
        done = False
        while not done:
            updates = scheduler.commit(result_for(plan))
            done = request_id in updates.request_ids
            plan = plan if done else scheduler.next_plan()
            assert plan is not None
        hit = updates.num_cached[updates.request_ids == request_id][0]
        assert i == 0 or hit == (context - 1) // PAGE_SIZE * PAGE_SIZE
    return times[1:] * 1e6


def time_matches(scheduler: Scheduler, context: int, clock: Clock) -> NDArray[np.float64]:
    """Microseconds of match_prefix of a fully cached prompt."""
    tokens = prompt(1 << 20, context)
    times = np.empty(ADMISSIONS)
    for i in range(ADMISSIONS):
        start = clock()
        found = scheduler.match_prefix(tokens)
        times[i] = clock() - start
        assert found == (context - 1) // PAGE_SIZE * PAGE_SIZE
    return times * 1e6


def summary(times: NDArray[np.float64]) -> dict[str, float]:
    median, p99 = np.percentile(times, [50, 99])
    return {"median_us": round(float(median), 1), "p99_us": round(float(p99), 1)}


def measure(num_requests: int, long: int, short: int, steps: int, clock: Clock) -> dict[str, Any]:
    busy, alone = decoding(num_requests, long), make(1, long)
    pipeline = decoding(num_requests, long, MICRO_STEPS)
    figures: dict[str, Any] = {
        "decode_long": summary(time_steps(busy, steps, clock)),
        "decode_short": summary(time_steps(decoding(num_requests, short), steps, clock)),
        "decode_micro": summary(time_steps(pipeline, steps, clock, MICRO_STEPS)),
        "admit_alone": summary(time_admissions(alone, long, clock)),
        "admit_beside": summary(time_admissions(busy, long, clock)),
        "match": summary(time_matches(alone, long, clock)),
    }
    ratio = figures["decode_long"]["median_us"] / figures["decode_short"]["median_us"]
    return figures | {"long_over_short": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--long", type=int, default=80_000)
    parser.add_argument("--short", type=int, default=8_000)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: of the thread"
    )
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    args = parser.parse_args()
    figures = measure(args.requests, args.long, args.short, args.steps, CLOCKS[args.clock])
    labels = {
        "decode_long": f"next_plan + commit, {args.requests} decoding at {args.long} tokens",
        "decode_short": f"next_plan + commit, {args.requests} decoding at {args.short} tokens",
        "decode_micro": f"one of {MICRO_STEPS} micro-steps of these, at {args.long} tokens",
        "admit_alone": f"admit {args.long} cached tokens, nothing else running",
        "admit_beside": f"admit {args.long} cached tokens beside {args.requests} decoding",
        "match": f"match_prefix of {args.long} cached tokens",
    }
    print(f"{'':58} {'median us':>10} {'p99 us':>10}")
    for name, label in labels.items():
        print(f"{label:58} {figures[name]['median_us']:10.1f} {figures[name]['p99_us']:10.1f}")
    print(
        f"{'median at the long context / at the short one':58} {figures['long_over_short']:10.3f}"
    )
    options = {key: value for key, value in vars(args).items() if key != "json"}
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    line = json.dumps({"benchmark": "scheduler", **options, **versions, **figures})
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
