# SPDX-License-Identifier: MIT
"""Expert-load balancing in a running engine: what it costs, and whether tokens stay the same.

Completes files of the standard library with the demo model in float32 on ranks of this machine:
without balancing, with counting only, and with frequent rebalances; each run in a process of its
own, in turns. The fastest round counts: what slows a round down on a busy machine is not ours.
Ranks that share the cores of one small machine win little by balance: the figures are there to show
its cost. Results: benchmarks/results/eplb.md.

    python benchmarks/eplb_online.py [--ranks 2] [--redundant 2] [--interval 32] [--repeat 3]
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tokenspeed import LLM, SamplingParams

SOURCE = Path(asyncio.__file__).parent
PROMPT, ANSWER, STREAMS, ROUNDS = 128, 64, 16, 5
NEVER = 10**9
STATS = ("mean", "worst", "rebalances", "slots_moved")
MODES = ("off", "counting", "balancing")


def prompts(llm: LLM) -> list[list[int]]:
    """The beginnings of the first files that are long enough."""
    tokenizer = llm.get_tokenizer()
    found = []
    for path in sorted(SOURCE.glob("*.py")):
        ids = tokenizer.encode(path.read_text())
        if len(ids) >= PROMPT:
            found.append(ids[:PROMPT])
    return found[:STREAMS]


def options(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    common: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": PROMPT + ANSWER,
        "num_pages": 256,
        "enable_prefix_caching": False,
        "expert_parallel_size": args.ranks,
    }
    if mode == "off":
        return common
    eplb = {"enable_eplb": True, "num_redundant_experts": args.redundant}
    interval = NEVER if mode == "counting" else args.interval
    return common | eplb | {"eplb_window_steps": args.interval, "eplb_step_interval": interval}


def run(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """One engine: seconds of each round after the first, the answers, and what was balanced."""
    llm = LLM("demo", **options(mode, args))
    batch = prompts(llm)
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
    seconds, answers = [], []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        outputs = llm.generate(batch, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        answers.append([output.outputs[0].token_ids for output in outputs])
    stats = llm._engine.stats()
    llm.close()
    seen = {key: round(getattr(stats, f"expert_load_{key}"), 3) for key in STATS}
    return {"seconds": seconds[1:], "answers": answers, "stats": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--redundant", type=int, default=2)
    parser.add_argument("--interval", type=int, default=32, help="steps between two rebalances")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mode", choices=MODES, help="one run, its results as JSON")
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(run(args.mode, args)))
        return
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for _ in range(args.repeat):
        for mode in MODES:
            command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[mode].append(json.loads(output.splitlines()[-1]))
    results: dict[str, Any] = {"benchmark": "eplb_online", **vars(args)}
    for mode, found in runs.items():
        fastest = min(second for one in found for second in one["seconds"])
        results[mode] = {"tokens_s": round(STREAMS * ANSWER / fastest, 1), **found[-1]["stats"]}
        print(f"{mode:<10} {results[mode]}")
    answers = [ids for found in runs.values() for one in found for ids in one["answers"]]
    results["tokens_identical"] = all(ids == answers[0] for ids in answers)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
