# SPDX-License-Identifier: MIT
"""Runs a benchmark from the command line: the bar, Ctrl-C, the tables, and the folder of results.

Knows no flags of its own and no figures.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import platform
import shlex
import signal
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from tokenspeed.errors import TokenSpeedError

if TYPE_CHECKING:
    from tokenspeed.bench.client import Endpoint
    from tokenspeed.bench.compare import Bench, Judge
    from tokenspeed.bench.load import LoadOptions
    from tokenspeed.bench.measure import Summary
    from tokenspeed.bench.records import RequestRecord, Run
    from tokenspeed.bench.session import Workload

T = TypeVar("T")
SECRETS = ("--api-key",)
RAW, SUMMARY, PAGE = "raw.jsonl", "summary.json", "report.html"  # in the folder of results


class Progress:
    """A bar over requests, with what went wrong beside it."""

    def __init__(self, total: int | None) -> None:
        self.bar = tqdm(total=total, unit=" requests", mininterval=0.5)
        self._counts = {"refused": 0, "error": 0, "cancelled": 0}
        self._tokens = 0

    def observe(self, record: "RequestRecord") -> None:
        self._tokens += record.output_tokens
        if record.status in self._counts:
            self._counts[record.status] += 1
        shown = {name: count for name, count in self._counts.items() if count}
        self.bar.set_postfix(tokens=self._tokens, **shown, refresh=False)
        self.bar.update()


def check_tools(*, pictures: bool = False) -> None:
    """`ValueError` before anything is sent, not after hours of a run."""
    if find_spec("httpx") is None:
        raise ValueError("benchmarks need httpx: pip install tokenspeed[bench]")
    if pictures and find_spec("matplotlib") is None:
        from tokenspeed.bench.plots import PlotsNeedMatplotlibError

        raise PlotsNeedMatplotlibError


def check_output(folder: Path | None) -> None:
    """As `check_tools`, and makes the folder: its files can be written."""
    check_tools(pictures=folder is not None)
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be made: {error.strerror}") from error
    check_files("--output", *(folder / name for name in (RAW, SUMMARY, PAGE)))


def check_files(flag: str, *files: Path) -> None:
    """`ValueError` for one that cannot be written. Changes none and leaves none behind."""
    for file in files:
        try:
            there = file.exists()
            with file.open("ab") if there else TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            raise ValueError(f"{flag} {file}: cannot be written: {error.strerror}") from error


def make_bench(
    endpoints: Sequence["Endpoint"],
    workload: "Workload",
    options: "LoadOptions",
    words: float | None,
    sessions_per_stream: int = 1,
) -> "Bench":
    """Asks an endpoint what a word is to its tokenizer, unless `words` says it."""
    from tokenspeed.bench.compare import Bench, calibrate

    if words is None:
        words, reason = asyncio.run(calibrate(endpoints))
        if reason is not None:
            said = f"a word is taken for one token, for no endpoint tokenizes ({reason})"
            print(f"! {said}", file=sys.stderr)
    return Bench(tuple(endpoints), workload, options, words, sessions_per_stream)


@contextlib.contextmanager
def watched(bench: "Bench", num_turns: int | None) -> Iterator["Bench"]:
    """With a bar over so many turns of each endpoint; None: nobody knows how many."""
    total = None if num_turns is None else num_turns * len(bench.endpoints)
    progress = Progress(total)
    try:
        yield dataclasses.replace(bench, observe=progress.observe)
    finally:
        progress.bar.close()


def run_until_done(bench: "Bench", work: Coroutine[object, object, T]) -> T:
    """Ctrl-C ends the load; what has been measured by then is kept."""

    async def main() -> T:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, bench.stop.set)
        try:
            return await work
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    return asyncio.run(main())


def say(line: str) -> None:
    """Beside the bar."""
    tqdm.write(line, file=sys.stderr)


def warn(runs: Sequence["Run"]) -> None:
    """What a reader must know before believing the figures, beside them."""
    from tokenspeed.bench.report import warnings

    for warning in warnings(runs):
        print(f"! {warning}", file=sys.stderr)


def report(
    args: argparse.Namespace, runs: Sequence["Run"], judge: "Judge", found: Mapping[str, object]
) -> int:
    """Prints tables and, as the last line, JSON; fills `--output`. `found` is the command's own.

    Raises as `show` does; what there is is written before.
    """
    from tokenspeed.bench import report as reports
    from tokenspeed.bench.records import write_runs

    summaries = [judge.of(run) for run in runs]
    facts = facts_of()
    if args.output is not None:
        write_runs(args.output / RAW, runs)
        line = reports.json_line(args.action, summaries, {**facts, **found})
        (args.output / SUMMARY).write_text(json.dumps(json.loads(line), indent=1) + "\n")
        shown = facts | {name.replace("_", " "): str(value) for name, value in found.items()}
        shown |= workload_facts(runs) | {"raw data": f"{RAW} beside this file"}
        write_page(args.output / PAGE, args.action, runs, summaries, shown, judge)
    return show(args.action, runs, summaries, facts, found)


def write_page(
    path: Path,
    action: str,
    runs: Sequence["Run"],
    summaries: Sequence["Summary"],
    facts: Mapping[str, str],
    judge: "Judge",
) -> None:
    from tokenspeed.bench.report import html_report

    floor = judge.floors[0] if judge.floors else None
    page = html_report(f"tokenspeed bench {action}", runs, summaries, facts, floor)
    path.write_text(page, encoding="utf-8")


def show(
    action: str,
    runs: Sequence["Run"],
    summaries: Sequence["Summary"],
    facts: Mapping[str, str],
    found: Mapping[str, object],
) -> int:
    """Tables, what the command has found, and JSON as the last line.

    Raises `TokenSpeedError` where not one request was answered.
    """
    from tokenspeed.bench import report as reports

    warn(runs)
    for table in reports.tables(summaries):
        print(reports.text(table) + "\n")
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(reports.json_line(action, summaries, {**facts, **found}))
    if not any(summary.statuses.get("ok") for summary in summaries):
        raise TokenSpeedError("not one request was answered")
    return 0


def facts_of() -> dict[str, str]:
    """Under which circumstances: of the machine that asks, not of the one that answers."""
    return software() | {"client": f"{platform.system()} {platform.machine()}, {_cpu()}"}


def software() -> dict[str, str]:
    words = ["tokenspeed", *sys.argv[1:]]
    shown = [_hidden(before, word) for before, word in zip(["", *words], words, strict=False)]
    return {"command": shlex.join(shown), "tokenspeed": version("tokenspeed")}


def workload_facts(runs: Sequence["Run"]) -> dict[str, str]:
    if not runs:
        return {}
    run = runs[0]
    names = (f"{r.endpoint} ({r.base_url})" if r.base_url else r.endpoint for r in runs)
    begun = {"begun": run.started_at} if run.base_url else {}  # virtual time knows no date
    return begun | {
        "endpoints": ", ".join(dict.fromkeys(names)),
        "workload": f"{run.workload}, seed {run.seed}, lengths divided by {run.scale:g}",
        "gaps": f"multiplied by {run.time_scale:g}",
        "history": f"{run.history}{', dictated answers' if run.forced else ''}",
        "dialect": run.dialect,
    }


def _hidden(before: str, word: str) -> str:
    """A report is passed on; a key is not."""
    if before in SECRETS or before == "--header":
        return "..." if before in SECRETS else word.partition("=")[0] + "=..."
    for flag in (*SECRETS, "--header"):
        if word.startswith(f"{flag}="):
            return f"{flag}=..."
    head, found, rest = word.partition("api_key=")
    return f"{head}{found}...{rest[rest.find(',') :] if ',' in rest else ''}" if found else word


def _cpu() -> str:
    """The CPU's name where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or "unknown CPU"
