# SPDX-License-Identifier: MIT
"""What a client's run is judged by, and the table of all. Starts nothing."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from real_clients.lineup import FINAL, Client
from real_clients.server import PAGE_SIZE, Server


@dataclass(frozen=True)
class Run:
    """`prompt`, `cached` and `ttft_ms` are one number a turn. `trouble` is "" if all was right."""

    client: str
    version: str
    dialect: str
    prompt: list[int]
    cached: list[int]
    expected: list[int] | None
    ttft_ms: list[float]
    trouble: str

    @property
    def share(self) -> float:
        """Cached tokens over prompt tokens, from the second turn on."""
        return sum(self.cached[1:]) / max(1, sum(self.prompt[1:]))


def expected(turns: list[dict[str, str]]) -> list[int]:
    """What the cache must have: the turn before and its answer, of which the last token has not
    been computed on, in whole pages."""
    totals = [int(turn["prompt"]) + int(turn["output"]) for turn in turns[:-1]]
    return [0, *((total - 1) // PAGE_SIZE * PAGE_SIZE for total in totals)]


def judge(client: Client, version: str, status: int, said: str, work: Path, server: Server) -> Run:
    """`server` has ended; `said` is all that the client printed."""
    turns = server.turns
    failed = [turn for turn in turns if turn["status"] != "200"]
    cached = [int(turn.get("cached", 0)) for turn in turns]
    wanted = expected(turns) if client.linear and turns and not failed else None
    hello = work / "hello.py"
    checks = {
        f"exit status {status}": status == 0,
        "hello.py is not right": hello.is_file() and "print(6 * 7)" in hello.read_text(),
        "its last answer was not shown": FINAL in said,
        f"{len(failed)} requests refused": not failed,
        f"{len(turns)} turns": len(turns) == client.num_turns,
        f"cached {cached}, not {wanted}": wanted in (None, cached),
        f"the server's log: {server.trouble[:1]}": not server.trouble,
    }
    wrong = [name for name, right in checks.items() if not right]
    return Run(
        client.name,
        version,
        client.dialect,
        [int(turn.get("prompt", 0)) for turn in turns],
        cached,
        wanted,
        [float(turn.get("ttft_ms", 0)) for turn in turns],
        "; ".join(wrong),
    )


def table(runs: list[Run]) -> str:
    lines = [
        f"{'client':<17}{'version':<10}{'dialect':<11}{'turns':>5}{'cached':>8}  "
        f"{'first token, ms, turn by turn':<32}verdict"
    ]
    for run in runs:
        times = " ".join(f"{one:.0f}" for one in run.ttft_ms)
        rule = "ok" if run.expected is not None else "ok (rewrites its history)"
        lines.append(
            f"{run.client:<17}{run.version:<10}{run.dialect:<11}{len(run.prompt):>5}"
            f"{run.share:>8.1%}  {times:<32}{run.trouble or rule}"
        )
    return "\n".join(lines)


def summary(runs: list[Run], alone: bool) -> dict[str, Any]:
    """For one line of JSON; names of the machine are not in it."""
    return {
        "benchmark": "clients",
        "python": platform.python_version(),
        "loopback_alone": alone,
        "page_size": PAGE_SIZE,
        "clients": [asdict(run) | {"cached_share": round(run.share, 4)} for run in runs],
    }


def write(file: Path, runs: list[Run], alone: bool, command: str) -> None:
    """FILE and, beside it, the table as FILE with `.md`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(summary(runs, alone), indent=1) + "\n")
    network = "loopback alone" if alone else "the machine's network"
    about = f"{os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}; network: {network}."
    text = f"# Real clients\n\n`{command}`: {about}\n\n```\n{table(runs)}\n```\n"
    file.with_suffix(".md").write_text(text)
