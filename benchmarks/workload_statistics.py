# SPDX-License-Identifier: MIT
"""Made-up agents against recorded ones: two-sample KS by column, and what a cache could spare.

The columns are those of a published table of 710 recorded sessions (its quantiles stand below);
where 500 of these sessions are at hand (`TOKENSPEED_TRACES`) the samples themselves are compared.
Requests of one session resemble each other, so the distance that chance explains is taken for as
many independent values as there are sessions: a column below it is called alike. No server, no
clock.

    python benchmarks/workload_statistics.py [--sessions 500] [--seed 0] [--json FILE] [--plot FILE]
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenspeed.bench.cache_bound import hit_rates
from tokenspeed.bench.session import Workload, shared_blocks
from tokenspeed.bench.workloads import checks, generated, traces
from tokenspeed.bench.workloads.habits import CLIENTS, FITTED, MEASURED
from tokenspeed.config import traces_place

SHARES = (0.10, 0.25, 0.50, 0.75, 0.90, 0.99)
TABLE = {
    "system tokens": (2048, 2324, 2773, 3004, 3732, 5964),
    "tool-schema tokens": (9292, 10_660, 12_260, 12_590, 12_970, 15_160),
    "first request input": (15_500, 18_600, 24_500, 104_000, 259_000, 716_000),
    "input per request": (43_000, 68_000, 105_000, 139_000, 236_000, 500_000),
    "last request input": (56_000, 93_000, 135_000, 185_000, 338_000, 791_000),
    "output per request": (105, 137, 216, 429, 899, 3663),
    "uncached suffix": (230, 372, 705, 1675, 4077, 65_900),
    "prefix share": (0.952, 0.983, 0.993, 0.997, 0.998, 0.999),
    "tool gap, s": (4, 5, 9, 19, 74, 924),
    "user gap, s": (16, 40, 127, 409, 1543, 6854),
    "steps per user message": (1, 1, 2, 4, 17, 80),
    "user messages per session": (1, 2, 4, 10, 27, 101),
    "requests per session": (7, 18, 45, 94, 156, 330),
}
TTLS_S = (10, 30, 60, 120, 300, 600, 1800, 3600, math.inf)
TABLE_HITS = (0.447, 0.697, 0.774, 0.835, 0.896, 0.923, 0.948, 0.958, 0.963)
TABLE_EVENTS = {"shrinks": 0.009, "reuses less than half": 0.02, "reuses less than 90%": 0.053}

Floats = npt.NDArray[np.float64]


def columns(workload: Workload) -> dict[str, Floats]:
    """Of the sessions of people: side calls and subagents are left out, as in the table."""
    found: dict[str, list[float]] = {name: [] for name in TABLE}
    for session in workload.sessions:
        if session.parent is not None:
            continue
        turns, size = session.turns, session.block_size
        found["first request input"].append(turns[0].input_tokens)
        found["last request input"].append(turns[-1].input_tokens)
        found["requests per session"].append(len(turns))
        found["input per request"] += [turn.input_tokens for turn in turns]
        found["output per request"] += [turn.output_tokens for turn in turns]
        for before, turn in pairwise(turns):
            kept = shared_blocks(before.prompt_blocks, turn.prompt_blocks) * size
            found["uncached suffix"].append(turn.input_tokens - kept)
            found["prefix share"].append(kept / turn.input_tokens)
            # Recorded times are whole seconds.
            found["tool gap, s" if turn.kind == "tool" else "user gap, s"].append(round(turn.gap_s))
        begins = [i for i, turn in enumerate(turns) if turn.kind == "user" or i == 0]
        found["user messages per session"].append(len(begins))
        found["steps per user message"] += [b - a for a, b in pairwise([*begins, len(turns)])]
    return {name: np.asarray(values, float) for name, values in found.items()}


def recorded(path: Path) -> tuple[Workload, dict[str, Floats]]:
    workload = traces.make(path)
    rows = [checks.parsed(where, line) for where, line in checks.lines(path)]
    own = {
        "system tokens": np.asarray([row["system_tokens"] for row in rows], float),
        "tool-schema tokens": np.asarray([row["tool_tokens"] for row in rows], float),
    }
    return workload, columns(workload) | own


def distance(one: Floats, other: Floats) -> float:
    """The two-sample Kolmogorov-Smirnov statistic: the most that the two shares differ anywhere."""
    places = np.sort(np.concatenate([one, other]))
    shares = (np.searchsorted(np.sort(x), places, side="right") / len(x) for x in (one, other))
    return float(np.max(np.abs(np.subtract(*shares))))


def table_distance(sample: Floats, quantiles: Sequence[float]) -> float:
    """The same at a table's quantiles; where the sample ties, its share there is a range."""
    worst = 0.0
    for share, value in zip(SHARES, quantiles, strict=True):
        below, upto = float(np.mean(sample < value)), float(np.mean(sample <= value))
        worst = max(worst, below - share, share - upto)
    return worst


def by_chance(first: int, second: int) -> float:
    """The distance of two samples of one distribution that 5% exceed."""
    return 1.358 * math.sqrt((first + second) / (first * second))


def compared(made: dict[str, Floats], real: dict[str, Floats] | None) -> list[dict[str, Any]]:
    found = []
    for name, quantiles in TABLE.items():
        sample = made[name]
        row: dict[str, Any] = {"column": name, "n": len(sample)}
        row["quantiles"] = [float(f"{q:.4g}") for q in np.quantile(sample, SHARES)]
        row["table"] = list(quantiles)
        row["distance_to_table"] = round(table_distance(sample, quantiles), 4)
        if real is not None:
            row["n_recorded"] = len(real[name])
            row["ks"] = round(distance(sample, real[name]), 4)
        found.append(row)
    return found


def layer_columns() -> dict[str, Floats]:
    client = CLIENTS["claude"]
    return {
        "system tokens": np.asarray(client.system, float),
        "tool-schema tokens": np.asarray(client.tools, float),
    }


def events(workload: Workload) -> dict[str, float]:
    """Shares of the steps behind a session's first whose prompt shrinks, or reuses little."""
    shrinks, reused = [], []
    for session in workload.sessions:
        for before, turn in pairwise(session.turns if session.parent is None else ()):
            kept = shared_blocks(before.prompt_blocks, turn.prompt_blocks) * session.block_size
            shrinks.append(turn.input_tokens < before.input_tokens)
            reused.append(kept / turn.input_tokens)
    half, most = (float(np.mean(np.asarray(reused) < share)) for share in (0.5, 0.9))
    return {
        "shrinks": round(float(np.mean(shrinks)), 4),
        "reuses less than half": round(half, 4),
        "reuses less than 90%": round(most, 4),
    }


def hits(workload: Workload) -> list[float]:
    return [round(rate, 4) for rate in hit_rates(workload, TTLS_S)]


def show(result: dict[str, Any]) -> None:
    print(f"alike below {result['by_chance']} (so many sessions, 5%)")
    for habits in ("fitted", "measured"):
        print(f"\n{habits:26}{'KS':>8}{'table':>8}  quantiles 10 25 50 75 90 99 %")
        for row in result[habits]:
            told = " ".join(f"{value:g}" for value in row["quantiles"])
            ks = row.get("ks", math.nan)
            mark = " " if ks <= result["by_chance"] else "*"
            print(f"{row['column']:26}{ks:>7.3f}{mark}{row['distance_to_table']:>8.3f}  {told}")
    print("\nhit rate by time to live" + "".join(f"{ttl:>8g}" for ttl in TTLS_S))
    for name, rates in result["hit_rates"].items():
        print(f"{name:24}" + "".join(f"{rate:>8.3f}" for rate in rates))
    for name, shares in result["events"].items():
        print(
            f"steps, {name:17}" + ", ".join(f"{what} {share:.2%}" for what, share in shares.items())
        )


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, rates in result["hit_rates"].items():
        axes.plot(TTLS_S[:-1], rates[:-1], marker="o", markersize=3, label=name)
    axes.set(xscale="log", xlabel="time to live of an idle block, s", ylabel="token hit rate")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    parser.add_argument("--plot", type=Path, help="the hit rates by time to live")
    args = parser.parse_args()
    real, rates, shares = None, {"table": list(TABLE_HITS)}, {"table": TABLE_EVENTS}
    try:
        path = traces.file_in(traces_place())
    except ValueError as error:
        print(f"without recorded sessions: {error}", file=sys.stderr)
    else:
        workload, real = recorded(path)
        rates["recorded"], shares["recorded"] = hits(workload), events(workload)
        del workload
    result: dict[str, Any] = {"benchmark": "workload_statistics", "seed": args.seed}
    others = 710 if real is None else len(real["requests per session"])
    result |= {"sessions": args.sessions, "recorded_sessions": others}
    result["by_chance"] = round(by_chance(args.sessions, others), 4)
    for name, habits in (("fitted", FITTED), ("measured", MEASURED)):
        made = generated.make(
            sessions=args.sessions, seed=args.seed, habits=habits, span_s=24 * 3600
        )
        result[name] = compared(columns(made) | layer_columns(), real)
        rates[name], shares[name] = hits(made), events(made)
        del made
    result |= {"ttls_s": [str(ttl) for ttl in TTLS_S], "hit_rates": rates}
    result["events"] = shares
    show(result)
    if args.plot:
        plot(result, args.plot)
    line = json.dumps(result)
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
