# SPDX-License-Identifier: MIT
"""`tokenspeed bench report`: tables and the page of runs that are over, from their raw files.

Reads what `bench --output` and `simulate --output` have written. Sends nothing.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tokenspeed.cli import bench_options

if TYPE_CHECKING:
    from tokenspeed.bench.records import Run


def add(parser: argparse.ArgumentParser) -> None:
    text = "raw.jsonl of a benchmark's --output, or the file of `tokenspeed simulate --output`"
    parser.add_argument("raw", type=Path, nargs="+", metavar="RAW", help=text)
    text = "write the page of tables and pictures there"
    parser.add_argument("--html", type=Path, metavar="OUT", help=text)
    bench_options.add_judge(parser)


def run(args: argparse.Namespace) -> int:
    """Raises `ValueError` for a file that is none of those, or holds no run."""
    from tokenspeed.cli import bench_run

    bench_run.check_tools(pictures=args.html is not None)
    if args.html is not None:
        bench_run.check_files("--html", args.html)
    judge = bench_options.judge_of(args)
    files = _read(args.raw)
    runs = [run for one in files.values() for run in one]
    summaries = [judge.of(run) for run in runs]
    facts = bench_run.software()
    if args.html is not None:
        shown = facts | {str(path): _described(one) for path, one in files.items()}
        bench_run.write_page(args.html, args.action, runs, summaries, shown, judge)
    facts |= {"raw": ", ".join(map(str, files))}
    return bench_run.show(args.action, runs, summaries, facts, {})


def _read(paths: Sequence[Path]) -> dict[Path, list["Run"]]:
    """The runs of each file. What has one name in several files is called after its file too."""
    from tokenspeed.bench.records import read_runs

    if len(set(paths)) < len(paths):
        raise ValueError("a raw file is given twice")
    files = {path: read_runs(path) for path in paths}
    names = [name for one in files.values() for name in {run.endpoint for run in one}]
    for path, runs in files.items():
        if not runs:
            raise ValueError(f"{path}: holds no run")
        for place, run in enumerate(runs):
            if names.count(run.endpoint) > 1:
                runs[place] = replace(run, endpoint=f"{run.endpoint} ({path})")
    return files


def _described(runs: Sequence["Run"]) -> str:
    from tokenspeed.cli import bench_run

    told = bench_run.workload_facts(runs).items()
    return "; ".join(f"{name}: {value}" for name, value in told)
