# SPDX-License-Identifier: MIT
"""TokenSpeed beside its peers on this CPU: same checkpoints, same weight type, same threads.

Sets up llama.cpp, vLLM, OpenVINO GenAI and onnxruntime-genai from the package index in environments
of their own, builds two checkpoints of random weights, and runs all engines in turns: every figure
is a median of rounds in which each engine had its turn. Everything that is set up stays in
`--peers-dir` for the next time. A peer that fails is reported and left out. Needs transformers for
the reference of logits, and matplotlib for the plot.

    python benchmarks/cpu_peers.py [--models dense,mla-moe] [--weights bf16,int8,int4]
        [--engines tokenspeed,llama.cpp,...] [--measures short,long,streams,warm,logits]
        [--kv-bits 16] [--rounds 5] [--peers-dir FOLDER] [--setup-only] [--out FILE]
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

from peers import reference, report, roofs, summary
from peers.checkpoints import CONFIGS
from peers.engines import ENGINES, KV_TOKENS, MODELS
from peers.figures import MEASURES, logits_error
from peers.lineup import Lineup
from peers.roofs import BITS, Roofs
from peers.setup import Home
from peers.worker import Worker

LOGITS = "logits"
MB = 1e6


def main() -> None:
    options = parse()
    home = Home(options.peers_dir)
    if options.setup_only:
        return set_up(home, options)
    results = head(options)
    measured = roofs.measure(options.threads)
    groups: list[dict[str, Any]] = []
    for model in options.models:
        for weights in options.weights:
            groups.append(run_group(home, model, weights, measured, options))
            latest = roofs.measure(options.threads)  # a roof is what is reached at any time
            measured = Roofs(*map(max, zip(_tuple(measured), _tuple(latest), strict=True)))
    for group in groups:
        conclude(group, measured, options.kv_bits)
        show(group)
    results |= {"roofs": dataclasses.asdict(measured), "groups": groups}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(report.markdown(results))
        report.plot(results, options.out.with_suffix(".png"))
    print(json.dumps(brief(results)))
    return None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)

    def names(known: list[str]) -> Any:
        def read(text: str) -> list[str]:
            found = text.split(",")
            if unknown := [name for name in found if name not in known]:
                raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; known: {known}")
            return found

        return read

    every = [*MEASURES, LOGITS]
    parser.add_argument("--models", type=names(list(MODELS)), default=list(MODELS))
    parser.add_argument("--weights", type=names(list(BITS)), default=list(BITS))
    parser.add_argument("--engines", type=names(list(ENGINES)), default=list(ENGINES))
    parser.add_argument(
        "--kv-bits", type=int, choices=(16, 8), default=16, help="8: only engines that can"
    )
    parser.add_argument("--measures", type=names(every), default=every)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="of engines that start in 20 s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers-dir", type=Path, default=Path("~/.cache/tokenspeed/peers"))
    parser.add_argument("--setup-only", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON; .md and .png are written beside it")
    return parser.parse_args()


def set_up(home: Home, options: argparse.Namespace) -> None:
    """Makes everything that a run would need, and says what cannot be made."""
    for model in options.models:
        for weights in options.weights:
            lineup = line_up(home, model, weights, options)
            lineup.prepare()
        reference.logits(home.model(model))


def line_up(home: Home, model: str, weights: str, options: argparse.Namespace) -> Lineup:
    """Those of the engines asked for that serve this model with these weights and such KV."""
    engines = [ENGINES[name] for name in options.engines]
    able = [e for e in engines if weights in e.formats and model in e.models]
    names = [e.name for e in able if options.kv_bits == 16 or e.kv8]
    return Lineup(home, model, weights, options.threads, names, options.kv_bits)


def command(arguments: list[str]) -> str:
    """What was run, without the folders of this machine."""
    words = ["python", *arguments]
    for option in ("--peers-dir", "--out"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return " ".join(words)


def head(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, the time and the command."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "memory_gb": round(memory / 1e9, 1),
            "kernel": platform.release(),
            "load": [round(x, 2) for x in os.getloadavg()],
        },
        "date": time.strftime("%Y-%m-%d"),
        "command": command(sys.argv),
        "threads": options.threads,
        "rounds": options.rounds,
        "kv_tokens": KV_TOKENS,
        "kv_bits": options.kv_bits,
    }


def run_group(
    home: Home, model: str, weights: str, measured: Roofs, options: argparse.Namespace
) -> dict[str, Any]:
    """All rounds of one model with one weight type."""
    lineup = line_up(home, model, weights, options)
    lineup.prepare()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in lineup.ready}
    errors = reference.logits(home.model(model)) if LOGITS in options.measures else None
    begin = time.perf_counter()
    loads = []
    try:
        lineup.start(options.starts)
        for name, seconds in lineup.starts.items():
            found[name]["start"] = seconds
        for round_index in range(-1, options.rounds):  # the first one warms up
            loads.append(round(os.getloadavg()[0], 2))
            run_round(lineup, found, round_index, options)
        last_words(lineup, found, errors)
    finally:
        lineup.close()
    return {
        "model": model,
        "weights": weights,
        "seconds": round(time.perf_counter() - begin),
        "rounds": found,
        "loads": loads,
        "left_out": lineup.left_out,
        "versions": lineup.versions,
    }


def run_round(
    lineup: Lineup,
    found: dict[str, dict[str, list[float]]],
    index: int,
    options: argparse.Namespace,
) -> None:
    """Each measure by each engine in turn, the same prompts for all; another one begins each time.

    Of round -1 only the first measure is run, and not kept.
    """
    measures = [name for name in options.measures if name in MEASURES]
    for measure in measures if index >= 0 else measures[:1]:
        engines = lineup.ready
        shift = index % max(1, len(engines))
        for name in engines[shift:] + engines[:shift]:
            prompts = random.Random(f"{options.seed} {index} {measure}")

            def work(worker: Worker) -> None:
                figures = MEASURES[measure](worker.generate, prompts)  # noqa: B023
                if index >= 0:
                    note(found[worker.name], figures)
                    said = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
                    print(f"round {index + 1} {worker.name}: {said}", flush=True)

            lineup.turn(name, work)


def note(found: dict[str, list[float]], figures: dict[str, float]) -> None:
    for key, value in figures.items():
        found.setdefault(key, []).append(value)


def last_words(
    lineup: Lineup,
    found: dict[str, dict[str, list[float]]],
    expected: list[list[float]] | None,
) -> None:
    """Memory after everything, then the errors of logits."""

    def work(worker: Worker) -> None:
        memory, own = worker.memory(), found[worker.name]
        note(own, {"memory": memory.pss / MB, "memory_anonymous": memory.anonymous / MB})
        note(own, {"memory_mapped": memory.mapped / MB})
        for prompt, row in zip(reference.prompts(), expected or (), strict=False):
            rms, largest = logits_error(worker.logits(prompt), row)
            note(own, {"error_rms": rms, "error_max": largest})

    for name in lineup.ready:
        lineup.turn(name, work)


def conclude(group: dict[str, Any], measured: Roofs, kv_bits: int) -> None:
    """Adds medians, roofs, comparison and limits."""
    model, weights = group["model"], group["weights"]
    config = CONFIGS[model]
    middle = summary.medians(group["rounds"])
    aims = summary.aims_of(model, weights) if kv_bits == 16 else {}
    lines = summary.compare(group["rounds"], aims)
    group["medians"] = middle
    group["roof"] = roofs.at_most(config, weights, measured, kv_bits)
    group["comparison"] = [dataclasses.asdict(line) | {"met": line.met} for line in lines]
    held = roofs.held_bytes(config, weights) + KV_TOKENS * roofs.kv_token_bytes(config, kv_bits)
    group["limits"] = summary.limits(middle.get(summary.OURS, {}), group["roof"], held / MB)


def show(group: dict[str, Any]) -> None:
    print(f"\n{report.title(group)} ({group['seconds']} s)")
    print(report.text(report.table(group)))
    print(report.text(report.ratios(group)))
    for limit in group["limits"]:
        verdict = "yes" if limit["met"] else "NO"
        print(f"{limit['what']}: {limit['value']} (limit {limit['limit']}) {verdict}")
    for name, why in group["left_out"].items():
        print(f"left out: {name}: {why}")


def brief(results: dict[str, Any]) -> dict[str, Any]:
    """The results without single rounds."""
    groups = [{k: v for k, v in group.items() if k != "rounds"} for group in results["groups"]]
    return results | {"groups": groups}


def _tuple(measured: Roofs) -> tuple[float, ...]:
    return dataclasses.astuple(measured)


if __name__ == "__main__":
    main()
