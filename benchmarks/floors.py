# SPDX-License-Identifier: MIT
"""Floors under load: the demo served with pacing and without, and how steps' times are foretold.

Three parts:

- newcomers: eight streams; cold prompts of nearly the longest context arrive one after the other.
  The floor is 60% of what any of these streams has without newcomers in its slowest second once all
  of them run. Fewest tokens of any stream in any second, and how long newcomers wait, with pacing
  and without;
- overload: single requests arrive at random, at several rates, then for minutes at three times the
  rate of most goodput; at last the same without pacing, for a while;
- steps: relative error of the predicted times behind the first 200 steps, on changing load.

The server's kernels have one thread; its gateway and the client share what else there is.

    python benchmarks/floors.py [--parts newcomers overload steps] [--overload-s 300]
        [--json FILE] [--pictures FOLDER]
"""

import argparse
import asyncio
import itertools
import json
import platform
import re
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_clients.load import tokens_per_word
from bench_clients.server import served

from tokenspeed import LLM, SamplingParams, _cpu
from tokenspeed.bench import plots
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.load import LoadOptions, run_load, with_arrivals
from tokenspeed.bench.measure import Summary, summary
from tokenspeed.bench.prompts import Prompts
from tokenspeed.bench.records import RequestRecord, Run
from tokenspeed.bench.series import timeline_of
from tokenspeed.bench.session import Session, Turn, Workload
from tokenspeed.bench.windows import window_rates
from tokenspeed.bench.workloads import fixed
from tokenspeed.engine.messages import GenerateRequest

STREAMS, PROMPT, ANSWER, BLOCK = 8, 512, 2000, 64
LONGEST, SHORT_ANSWER = 3900, 32  # of a newcomer
ARRIVES = (0.2, 0.45, 0.7)  # of the time that the streams take without newcomers
FLOOR_SHARE = 0.6
RATES = (0.5, 1.0, 1.5, 2.0)  # of what a closed loop gets through
OVERLOAD = 3
INPUT, OUTPUT, SPREAD = 512, 200, 0.5
NUM_UNKNOWN = 200  # steps
Json = dict[str, Any]
_ids = itertools.count(1)


def serve_args(*more: str) -> list[str]:
    config = ("--speculative-config", '{"method": "off"}')  # its gains differ by the text
    return ["tokenspeed", "serve", "demo", "--cpu-threads", "1", *config, *more]


def paced(floor: float, wait_s: float) -> list[str]:
    return serve_args("--tps-floor", f"{floor:g}", "--max-queue-wait-s", f"{wait_s:g}")


def single(start_s: float, tokens: int, output: int) -> Session:
    """One request that shares nothing with any other."""
    number = next(_ids)
    blocks = tuple(range(number * 10_000, number * 10_000 + tokens // BLOCK))
    turn = Turn(blocks, tokens, output, 0.0, "user", tokens % BLOCK)
    return Session(f"session-{number}", (turn,), BLOCK, start_s, f"user-{number}", None)


def sent(url: str, name: str, workload: Workload, options: LoadOptions) -> Run:
    """The workload's run, its prompts new to the server."""
    texts = Prompts(workload.seed, tokens_per_word(url))
    [run] = asyncio.run(run_load([Endpoint(name, url)], workload, texts, options))
    if run.died:
        raise RuntimeError(f"{name}: {run.died}")
    return run


def draw(run: Run, floor: float, file: Path) -> None:
    """The run over time, in colours that no page need set."""
    picture = plots.timeline(timeline_of(run), floor=floor)
    file.write_text(re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", picture), encoding="utf-8")


# ---- Newcomers -----------------------------------------------------------------------------------


def crowd(answer: int = ANSWER, newcomers_s: Iterable[float] = ()) -> Workload:
    streams = [single(0.0, PROMPT, answer) for _ in range(STREAMS)]
    cold = [single(at, LONGEST, SHORT_ANSWER) for at in newcomers_s]
    return Workload("newcomers", (*streams, *cold), next(_ids), 1.0)


def least_rate(records: Sequence[RequestRecord], begin_s: float = 0.0) -> float:
    """Of any stream in any second behind `begin_s`."""
    rates = []
    for record in records:
        first = bisect_left(record.token_times, begin_s)
        rates.append(window_rates(record.token_times[first:], record.token_counts[first:]).min())
    return float(min(rates))


def newcomers(args: argparse.Namespace, folder: Path) -> Json:
    options, warm_up = LoadOptions(), crowd(400, [0.5])
    with served(serve_args(), args.port, folder / "free.log") as url:
        sent(url, "warm-up", warm_up, options)
        alone = sent(url, "unloaded", crowd(), options)
        began_s = max(one.first_token_s or 0.0 for one in alone.records)
        rate = least_rate(alone.records, began_s)
        arrive_s = [at * alone.duration_s for at in ARRIVES]
        without = sent(url, "no pacing", crowd(ANSWER, arrive_s), options)
    floor = float(int(FLOOR_SHARE * rate))
    with served(paced(floor, 60), args.port, folder / "paced.log") as url:
        sent(url, "warm-up", warm_up, options)
        within = sent(url, "pacing", crowd(ANSWER, arrive_s), options)
    found: Json = {"unloaded_tps": round(rate, 1), "floor": floor}
    print(f"newcomers: unloaded {rate:.1f} TPS, floor {floor:g}")
    for run in (without, within):
        found[run.endpoint] = newcomers_row(run, floor)
        print(f"  {run.endpoint}: " + "  ".join(f"{k} {v}" for k, v in found[run.endpoint].items()))
        if args.pictures:
            draw(run, floor, args.pictures / f"newcomers_{run.endpoint.replace(' ', '_')}.svg")
    return found


def newcomers_row(run: Run, floor: float) -> Json:
    streams = [one for one in run.records if one.asked_output_tokens != SHORT_ANSWER]
    cold = [one for one in run.records if one.asked_output_tokens == SHORT_ANSWER]
    if not all(one.status == "ok" for one in run.records):
        raise RuntimeError(f"{run.endpoint}: {[one.error for one in run.records if one.error]}")
    [found] = summary(run, [floor]).floors
    return {
        "least_window_tps": round(least_rate(streams), 1),
        "least_over_floor": round(least_rate(streams) / floor, 3),
        "attainment": round(found.attainment, 5),
        "newcomers_finished": len(cold),
        "newcomer_tokens": [one.input_tokens for one in cold],
        "newcomer_ttft_s": [round(one.ttft_s or 0.0, 2) for one in cold],
    }


# ---- Overload ------------------------------------------------------------------------------------


def arrivals(rate: float, seconds: float) -> Workload:
    """Requests that arrive for so long."""
    count = max(1, round(rate * seconds))
    made = fixed.make(
        requests=count,
        seed=next(_ids),
        input_tokens=INPUT,
        output_tokens=OUTPUT,
        range_ratio=SPREAD,
    )
    return with_arrivals(made, rate)


def overload(args: argparse.Namespace, folder: Path, floor: float) -> Json:
    with served(paced(floor, args.wait_s), args.port, folder / "overload.log") as url:
        closed = fixed.make(
            requests=150, seed=next(_ids), input_tokens=INPUT, output_tokens=OUTPUT,
            range_ratio=SPREAD,
        )  # fmt: skip
        run = sent(url, "closed loop", closed, LoadOptions(concurrency=2 * STREAMS))
        pace = sum(one.status == "ok" for one in run.records) / run.duration_s
        rows = {
            f"{rate * pace:.2f} a second": overload_row(
                sent(url, "pacing", arrivals(rate * pace, args.sweep_s), LoadOptions()), floor
            )
            for rate in RATES
        }
        for name, row in rows.items():
            print(f"  {name}: {row}", flush=True)
        most = max(rows.values(), key=lambda row: row["goodput_users"])
        rate = OVERLOAD * most["rate"]
        over = overloaded(url, "pacing", rate, args.overload_s, floor, args.pictures)
    share = over["goodput_users"] / most["goodput_users"]
    print(f"  goodput {share:.3f} of its peak", flush=True)
    with served(serve_args(), args.port, folder / "unpaced.log") as url:
        without = overloaded(url, "no pacing", rate, args.unpaced_s, floor, args.pictures)
    return {
        "floor": floor, "max_queue_wait_s": args.wait_s, "rates": rows, "overload": over,
        "goodput_of_peak": round(share, 4), "no pacing": without,
    }  # fmt: skip


def overloaded(
    url: str, name: str, rate: float, seconds: float, floor: float, pictures: Path | None
) -> Json:
    options = LoadOptions(duration_s=seconds)
    run = sent(url, name, arrivals(rate, seconds), options)
    row = overload_row(run, floor)
    print(f"  {name}, {rate:.2f} a second for {seconds:g} s: {row}", flush=True)
    if pictures:
        draw(run, floor, pictures / f"overload_{name.replace(' ', '_')}.svg")
    return row


def overload_row(run: Run, floor: float) -> Json:
    told: Summary = summary(run, [floor])
    [held] = told.floors
    refusals = told.refusals
    return {
        "rate": run.rate,
        "attainment": round(held.attainment, 5),
        "goodput_users": round(held.held_users, 3),
        "statuses": told.statuses,
        "output_tokens_per_s": round(told.output_tokens_per_minute / 60, 1),
        "ttft_s": told.ttft_s and {k: round(v, 3) for k, v in asdict(told.ttft_s).items()},
        "refused": refusals.count,
        "refused_with_retry_after": refusals.with_retry_after,
        "refusal_answer_s": refusals.answer_s
        and {k: round(v, 4) for k, v in asdict(refusals.answer_s).items()},
    }


# ---- Steps ---------------------------------------------------------------------------------------


def changing(llm: LLM) -> Iterator[None]:
    """Steps of loads that change: few and many streams, short and long prompts."""
    engine: Any = llm._engine
    random, ids = np.random.default_rng(5), itertools.count(1)
    for phase in range(12):
        for _ in range(int(random.integers(1, 17))):
            prompt = random.integers(10, 4000, int(random.integers(20, 1500))).tolist()
            how = SamplingParams(max_tokens=int(random.integers(20, 200)), ignore_eos=True)
            engine.add_request(GenerateRequest(next(ids), prompt, how, []))
        for _ in range(60 + 20 * (phase % 3)):
            engine.step()
            yield


def steps(args: argparse.Namespace) -> Json:
    _cpu.set_num_threads(1)
    errors: list[float] = []
    with LLM("demo", tps_floor=1.0, max_num_seqs=64, num_pages=4000) as llm:
        times: Any = llm._engine._times
        before = (0, 0.0, 0.0)
        for _ in changing(llm):
            now = (times.num_steps, times.predicted_s, times.measured_s)
            if now[0] > max(before[0], NUM_UNKNOWN):
                errors.append(abs((now[1] - before[1]) / (now[2] - before[2]) - 1))
            before = now
    p50, p90 = np.percentile(errors, [50, 90]).tolist()
    found = {"steps": len(errors), "median_error": round(p50, 4), "p90_error": round(p90, 4)}
    print(f"steps: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = ("steps", "newcomers", "overload")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--floor", type=float, help="of the overload; unset: the newcomers'")
    parser.add_argument("--wait-s", type=float, default=2.0, help="that requests may wait")
    parser.add_argument("--sweep-s", type=float, default=40.0, help="at each rate")
    parser.add_argument("--overload-s", type=float, default=300.0)
    parser.add_argument("--unpaced-s", type=float, default=120.0)
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--pictures", type=Path, help="a folder for runs over time, as SVG")
    args = parser.parse_args()
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    if "overload" in args.parts and args.floor is None and "newcomers" not in args.parts:
        parser.error("overload needs --floor, or the newcomers")
    found: Json = {"benchmark": "floors", "python": platform.python_version()}
    found["torch"] = torch.__version__
    with tempfile.TemporaryDirectory() as folder:
        if "steps" in args.parts:
            found["steps"] = steps(args)
        if "newcomers" in args.parts:
            found["newcomers"] = newcomers(args, Path(folder))
        if "overload" in args.parts:
            floor = args.floor or found["newcomers"]["floor"]
            print(f"overload: floor {floor:g}")
            found["overload"] = overload(args, Path(folder), floor)
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
