# SPDX-License-Identifier: MIT
"""What expert-load balancing gains on recorded loads: heaviest rank over the mean, and what moves.

Records the demo model's router on Python files (real counts, 8 experts, top 2), makes a synthetic
load (a Zipf law over 256 experts whose ranking drifts), and replays both: a placement is solved
from the window before it and judged on the records after it. Figures are means over layers and
intervals; "moved" is the share of slots that a rebalance changes. Results:
benchmarks/results/eplb.{json,md,png}.

    python benchmarks/eplb.py [--record FILE] [--recording FILE] [--source FOLDER] [--json FILE]
        [--plot FILE]
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.models.build import load_model
from tokenspeed.models.hub import DEMO_FOLDER
from tokenspeed.spmd.expert_replay import (
    Interval,
    Recording,
    read_recording,
    replay,
    write_recording,
)
from tokenspeed.spmd.expert_solver import Solver
from tokenspeed.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 256  # tokens of a file in one step
DEEPSEEK_EXPERT_BYTES = 3 * 7168 * 2048  # FP8, DeepSeek V3


@dataclass(frozen=True)
class Case:
    """One replay. Intervals and windows are in records."""

    name: str
    recording: Recording
    solver: Solver
    interval: int
    window: int
    expert_bytes: int


def record_demo(folder: Path, steps_per_record: int) -> Recording:
    """The demo model's routing of every Python file below `folder`, a chunk of a file a step."""
    model = load_model(DEMO_FOLDER, torch.float32, torch.device("cpu"))
    counts: list[list[Any]] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            _spy(layer.mlp.gate, counts)
    steps = []
    specs = model.cache_specs()
    with torch.inference_mode():
        for ids in _chunks(folder):
            caches = [tuple(torch.zeros(1, CHUNK, *s) for s in spec.shapes) for spec in specs]
            counts.clear()
            model.forward(_batch(ids), caches)
            steps.append(counts.copy())
    whole = len(steps) // steps_per_record * steps_per_record
    loads = np.array(steps[:whole], np.int64)
    records: Recording = loads.reshape(-1, steps_per_record, *loads.shape[1:]).sum(1)
    return records


def _spy(gate: Any, counts: list[list[Any]]) -> None:
    """Appends to `counts` how many of the router's choices fell on each expert."""
    route, num_experts = gate.forward, gate.routing.num_experts

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = route(x)
        counts.append(torch.bincount(ids.flatten(), minlength=num_experts).tolist())
        return weights, ids

    gate.forward = forward


def _chunks(folder: Path) -> Iterator[list[int]]:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    for path in sorted(folder.rglob("*.py")):
        ids = tokenizer.encode(path.read_text())
        yield from (ids[at : at + CHUNK] for at in range(0, len(ids) - CHUNK + 1, CHUNK))


def _batch(ids: list[int]) -> ForwardBatch:
    count = len(ids)
    return ForwardBatch(
        token_ids=torch.tensor(ids),
        positions=torch.arange(count, dtype=torch.int32),
        cache_index=torch.arange(count),
        q_start=torch.tensor([0, count], dtype=torch.int32),
        kv_len=torch.tensor([count], dtype=torch.int32),
        slots=torch.zeros(1, dtype=torch.int32),
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        logits_index=torch.zeros(0, dtype=torch.int64),
        max_q_len=count,
        max_kv_len=count,
    )


def zipf_with_drift(
    records: int, layers: int, experts: int, *, power: float, drift: float, seed: int = 0
) -> Recording:
    """Shares 1/rank^power in an order of each layer's own; their logarithms walk at random.

    `drift`: standard deviation of a record's step. A record routes 8 x 4,096 choices.
    """
    rng = np.random.default_rng(seed)
    shares = -power * np.log(np.arange(1, experts + 1))
    logs = np.stack([rng.permutation(shares) for _ in range(layers)])
    found = np.empty((records, layers, experts), np.int64)
    for record in found:
        share = np.exp(logs)
        record[:] = rng.multinomial(8 * 4096, share / share.sum(1, keepdims=True))
        logs += rng.normal(0, drift, logs.shape)
    return found


def cases(demo: Recording) -> Iterator[Case]:
    expert = 3 * 256 * 128 * 2  # bfloat16
    for ranks, redundant in ((3, 1), (2, 2), (4, 4)):
        yield Case(
            f"demo, {ranks} ranks + {redundant}", demo, Solver(8, ranks, redundant), 8, 16, expert
        )
    for ranks in (8, 16, 32):
        load = zipf_with_drift(64, 8, 256, power=0.8, drift=0.02)
        solver = Solver(256, ranks, 32)
        yield Case(f"zipf 0.8, {ranks} ranks + 32", load, solver, 8, 8, DEEPSEEK_EXPERT_BYTES)
    load = zipf_with_drift(64, 8, 256, power=0.8, drift=0.02)
    solver = Solver(256, 32, 32, num_nodes=4, num_groups=8)
    yield Case("zipf 0.8, 4 nodes x 8 ranks + 32", load, solver, 8, 8, DEEPSEEK_EXPERT_BYTES)
    yield Case("zipf 0.8, 32 ranks + 0", load, Solver(256, 32), 8, 8, DEEPSEEK_EXPERT_BYTES)


def figures(case: Case, intervals: list[Interval]) -> dict[str, Any]:
    """Over all intervals after the first, which has nothing to look back on."""
    before, after = (np.array([getattr(i, n) for i in intervals[1:]]) for n in ("before", "after"))
    moved = [i.num_moved for i in intervals[1:]]
    sent = float(np.mean([i.num_sent for i in intervals[1:]])) * case.expert_bytes
    slots = (case.solver.num_experts + case.solver.num_redundant) * case.recording.shape[1]
    return {
        "before": round(float(before.mean()), 3),
        "after": round(float(after.mean()), 3),
        "after_worst": round(float(after.max()), 3),
        "moved_first": round(moved[0] / slots, 3),
        "moved_later": round(float(np.mean(moved[1:])) / slots, 3),
        "mb_per_rank": round(sent / case.solver.num_ranks / 1e6, 1),
    }


def solve_seconds() -> float:
    """One solve of 58 layers x 256 experts on 32 ranks with 32 redundant ones, after drift."""
    load = zipf_with_drift(2, 58, 256, power=0.8, drift=0.2)
    solver = Solver(256, 32, 32)
    old = solver.solve(load[0])
    start = time.thread_time()
    solver.solve(load[1], old)
    return round(time.thread_time() - start, 3)


def plot(path: Path, replays: dict[str, list[Interval]]) -> None:
    """Imbalance over time, mean of the layers, with and without balancing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(replays) // 4)
    figure, axes = pyplot.subplots(rows, 4, figsize=(15, 3 * rows), squeeze=False)
    for axis, (name, intervals) in zip(axes.flat, replays.items(), strict=False):
        ends = [i.begin for i in intervals] + [intervals[-1].end]
        for label in ("before", "after"):
            values = [float(getattr(i, label).mean()) for i in intervals]
            axis.stairs(values, ends, label=label, linewidth=2, baseline=None)
        axis.axhline(1.1, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=name, ylim=(0.95, None), xlabel="record", ylabel="heaviest rank / mean")
    axes.flat[0].legend()
    for axis in axes.flat[len(replays) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    fixture = ROOT / "tests" / "data" / "demo_expert_loads.npz"
    parser.add_argument(
        "--record", type=Path, help="record the demo model into this file, and stop"
    )
    parser.add_argument("--recording", type=Path, default=fixture, help="of the demo model")
    parser.add_argument(
        "--source", type=Path, default=ROOT / "tokenspeed", help="Python files to record"
    )
    parser.add_argument("--steps-per-record", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    parser.add_argument("--plot", type=Path, help="draw the imbalance over time (matplotlib)")
    args = parser.parse_args()
    if args.record:
        recording = record_demo(args.source, args.steps_per_record)
        write_recording(args.record, recording)
        print(f"{args.record}: {recording.shape}, {args.record.stat().st_size} bytes")
        return
    table = Table(title="Heaviest rank over the mean, without and with balancing")
    for column in ("load", "before", "after", "worst", "moved first", "later", "MB per rank"):
        table.add_column(column, justify="left" if column == "load" else "right")
    results, replays = {}, {}
    for case in cases(read_recording(args.recording)):
        intervals = replay(case.recording, case.solver, interval=case.interval, window=case.window)
        results[case.name], replays[case.name] = figures(case, intervals), intervals
        table.add_row(case.name, *(str(v) for v in results[case.name].values()))
    Console(width=110).print(table)
    if args.plot:
        plot(args.plot, replays)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    line = json.dumps(
        {"benchmark": "eplb", **versions, "solve_58_layers_s": solve_seconds(), "cases": results}
    )
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
