# SPDX-License-Identifier: MIT
"""Recorded agents replayed on the demo, scaled down: what the prefix cache gave, and what one
without limits would.

Answers are dictated, so that prompts repeat what was recorded; gaps are left out, and so are
sessions that do not fit into the demo's context. There is room for all pages, which are small, as
the prompts are. Needs the recorded sessions (`TOKENSPEED_TRACES`).

    python benchmarks/replay.py [--sessions 40] [--scale 32] [--concurrency 4] [--json FILE]
"""

import argparse
import asyncio
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from bench_clients.load import tokens_per_word
from bench_clients.server import served

from tokenspeed.bench.cache_bound import hit_rate
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.load import LoadOptions, run_load
from tokenspeed.bench.measure import summary
from tokenspeed.bench.prompts import Prompts
from tokenspeed.bench.records import Run
from tokenspeed.bench.session import Workload
from tokenspeed.bench.workloads import traces
from tokenspeed.config import traces_place

CONTEXT, MARGIN = 4096, 1.05  # the demo's; of tokens that words are made of
PAGE = 4  # tokens
NEAR = 0.01  # of a rate


def workload_of(args: argparse.Namespace) -> Workload:
    """Of the recorded sessions those that fit into the demo's context."""
    whole = traces.make(
        traces_place(), sessions=args.sessions, seed=args.seed, scale=float(args.scale)
    )
    fitting = tuple(
        session
        for session in whole.sessions
        if max(turn.total for turn in session.turns) * MARGIN + 64 <= CONTEXT
    )
    return replace(whole, sessions=fitting)


def replay(url: str, workload: Workload, concurrency: int) -> Run:
    options = LoadOptions(concurrency=concurrency, time_scale=0, forced=True)
    texts = Prompts(workload.seed, tokens_per_word(url))
    [run] = asyncio.run(run_load([Endpoint("tokenspeed", url)], workload, texts, options))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=40, help="of those recorded")
    parser.add_argument("--scale", type=int, default=32, help="divides lengths")
    parser.add_argument("--concurrency", type=int, default=4, help="sessions at once")
    parser.add_argument("--seed", type=int, default=0, help="which sessions")
    parser.add_argument("--port", type=int, default=8160)
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    args = parser.parse_args()
    workload = workload_of(args)
    pages = sum(len(s.turns[-1].prompt_blocks) * s.block_size + s.output_tokens
                for s in workload.sessions) // PAGE * 2 + CONTEXT  # fmt: skip
    serve = [
        *("tokenspeed", "serve", "demo", "--enable-forced-output", "--page-size", str(PAGE)),
        *("--num-pages", str(pages)),
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        served(serve, args.port, Path(folder) / "log") as url,
    ):
        run = replay(url, workload, args.concurrency)
    for record in run.records:
        if record.error:
            print(f"{record.session_id}, turn {record.turn}: {record.error}")
    told, bound = summary(run), hit_rate(workload)
    found = {
        "benchmark": "replay",
        "sessions": len(workload.sessions),
        "scale": args.scale,
        "turns": told.turns.planned,
        "answered": told.turns.answered,
        "failed": told.turns.unanswered,
        "input_tokens": told.cached_input_tokens + told.computed_input_tokens,
        "output_tokens": told.output_tokens,
        "duration_s": round(told.duration_s, 1),
        "hit_rate": round(told.hit_rate or 0.0, 4),
        "bound": round(bound, 4),
    }
    for name, value in found.items():
        print(f"{name:16}{value}")
    near = abs((told.hit_rate or 0.0) - bound) <= NEAR
    print(f"within {NEAR:.0%} of a cache without limits: {'yes' if near else 'NO'}")
    line = json.dumps(found)
    print(line)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
