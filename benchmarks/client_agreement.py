# SPDX-License-Identifier: MIT
"""Other benchmark clients and `tokenspeed bench` measure one server: do their figures agree?

`evalscope perf`, `aiperf`, `guidellm` and `vllm bench serve` each ask a server for a load, and in
turns with them `tokenspeed bench` for the same one: as many requests, as long, as many at once, in
texts that no run before had. Compared is what both say. A figure agrees if the median ratio of its
pairs is within `--tolerance`; counts must be equal, to those of the server's log too, and every
request answered. `(server)` is what the log says of the same requests, `by log` the ratio that
is left when both figures are divided by it: a client that slows the server down is seen in the
first ratio alone.

Each PATH is the folder of a virtual environment with that client. `--server steady` is the demo
model on a device of a known speed (`steady_engine.py`): the processor is free for the clients.
With several streams the times depend on who came first by a millisecond; `--concurrency 1` has
nothing of that.

    python benchmarks/client_agreement.py --evalscope PATH --aiperf PATH --guidellm PATH
        --vllm PATH [--server demo|steady] [--pairs 3] [--out FILE]
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench_clients.lineup import CLIENTS, Client
from bench_clients.load import (
    COUNTS,
    FIGURES,
    MODEL,
    Figures,
    Load,
    Place,
    our_figures,
    tokens_per_word,
)
from bench_clients.server import requests_since, served

from tokenspeed.models.hub import DEMO_FOLDER

ROOT = Path(__file__).parent.parent
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TIMEOUT_S = 1800.0
OURS = "tokenspeed"
SERVERS = {
    "demo": ["tokenspeed", "serve", "demo", "--log-requests"],
    "steady": ["benchmarks.steady_engine", "serve"],
}


@dataclass
class Seen:
    """One run: the figures of who asked, and the server's of the same requests."""

    figures: Figures
    logged: Figures
    refused: list[str]  # what the server's log says of each request that it did not answer


@dataclass
class Verdict:
    """A client's pairs of runs, itself and ours."""

    client: Client
    version: str
    pairs: list[tuple[Seen, Seen]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    def ratio(self, name: str) -> float | None:
        """The median of client over ours; None where the client does not tell, or all are 0."""
        both = [(one.figures.get(name), two.figures[name]) for one, two in self.pairs]
        ratios = [one / two for one, two in both if one is not None and two]
        return median(ratios) if ratios else None

    def ratio_by_log(self, name: str) -> float | None:
        """The same of what each said over what the server's log said of the very requests: what
        drifts on the machine between two runs is not in it."""
        ratios = [
            (one.figures[name] / one.logged[name]) / (two.figures[name] / two.logged[name])
            for one, two in self.pairs
            if name.endswith("_ms") and name in one.figures.keys() & one.logged.keys()
        ]
        return median(ratios) if ratios else None

    def agrees(self, name: str, tolerance: float) -> bool:
        if (ratio := self.ratio(name)) is None:
            return True
        return ratio == 1 if name in COUNTS else abs(ratio - 1) <= tolerance


def main() -> int:
    options = _options()
    load = Load(options.concurrency, requests=options.requests, sessions=options.sessions)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="tokenspeed-agreement-") as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        for file in TOKENIZER:
            shutil.copy(DEMO_FOLDER / file, tokenizer)
        log = folder / "server.log"
        os.chdir(ROOT)
        with served(SERVERS[options.server], options.port, log) as url:
            words = tokens_per_word(url)
            places = _places(folder, url, tokenizer, words)
            for client, environment in _present(options):
                verdict = Verdict(client, client.version(environment))
                _compare(verdict, environment, load, places, log, options.pairs)
                print(_table(verdict, options.tolerance), flush=True)
                verdicts.append(verdict)
    found = _summary(verdicts, load, options)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0 if verdicts and all(one["agrees"] for one in found["clients"].values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, client in CLIENTS.items():
        text = f"environment with {client.packages[0]} (tried: {client.tried})"
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=text)
    parser.add_argument("--server", choices=SERVERS, default="demo")
    parser.add_argument("--port", type=int, default=18321)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each client and of ours")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--requests", type=int, default=24, help="of guidellm and vllm")
    parser.add_argument("--sessions", type=int, default=4, help="of aiperf and evalscope")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), metavar="FILE")
    return parser.parse_args()


def _present(options: argparse.Namespace) -> Iterator[tuple[Client, Path]]:
    for name, client in CLIENTS.items():
        given: Path | None = getattr(options, name)
        if given is None:
            print(f"{name} is left out: no --{name}")
        elif not client.version(given.absolute()):
            print(f"{name} is left out: {given} has none of {', '.join(client.packages)}")
        else:
            yield client, given.absolute()


def _places(folder: Path, url: str, tokenizer: Path, words: float) -> Iterator[Place]:
    """A folder and a seed for each run; seeds of other days' runs do not matter to a new server."""
    seed = 1000
    while True:
        seed += 1
        own = folder / f"run-{seed}"
        own.mkdir()
        yield Place(url, tokenizer, own, seed, words)


def _compare(
    verdict: Verdict,
    environment: Path,
    load: Load,
    places: Iterator[Place],
    log: Path,
    pairs: int,
) -> None:
    """One pair more than asked for: the first warms up the machine and is not counted."""
    client = verdict.client
    for number in range(pairs + 1):
        seen: dict[str, Seen] = {}
        for who in (client.name, OURS) if number % 2 else (OURS, client.name):
            place, start, said = next(places), log.stat().st_size, ""
            try:
                if who == OURS:
                    said = _run(client.ours(load, place), place, {})
                    figures = our_figures(place.folder)
                else:
                    said = _run(client.command(environment, load, place), place, client.environ)
                    figures = client.figures(place.folder)
            except (OSError, LookupError, ValueError, subprocess.TimeoutExpired) as error:
                verdict.trouble.append(f"{who}: {error!r} after {said[-500:]!r}")
                return
            time.sleep(0.5)  # the log's last lines come after the last answer
            seen[who] = _seen(figures, requests_since(log, start))
            verdict.trouble += [f"{who}: {line}" for line in seen[who].refused]
            verdict.trouble += _unlike(who, seen[who])
        if number:
            verdict.pairs.append((seen[client.name], seen[OURS]))


def _run(command: list[str], place: Place, environ: dict[str, str]) -> str:
    """What it printed. What it did is in its folder; its exit status says little."""
    done = subprocess.run(
        command,
        cwd=ROOT if command[0] == sys.executable else place.folder,
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
        text=True,
        errors="replace",
    )
    return done.stdout


def _seen(figures: Figures, lines: list[dict[str, str]]) -> Seen:
    answered = [line for line in lines if line.get("status") == "200" and "output" in line]
    refused = [line for line in lines if line not in answered]
    return Seen(
        figures, _logged(answered), [" ".join(map("=".join, one.items())) for one in refused]
    )


def _logged(answered: list[dict[str, str]]) -> Figures:
    """What the server says of the same requests; its times begin when it has read a request."""
    prompt, cached, output = (
        [int(line[name]) for line in answered] for name in ("prompt", "cached", "output")
    )
    first, total = ([float(line[name]) for line in answered] for name in ("ttft_ms", "total_ms"))
    times = zip(first, total, output, strict=True)
    tpots = [(end - begin) / (count - 1) for begin, end, count in times if count > 1]
    logged: Figures = {
        "requests": len(answered),
        "input_tokens": sum(prompt),
        "cached_tokens": sum(cached),
        "output_tokens": sum(output),
    }
    for name, values in (("ttft", first), ("tpot", tpots)):
        if values:
            logged |= {f"{name}_mean_ms": fmean(values), f"{name}_p50_ms": median(values)}
    return logged


def _unlike(who: str, seen: Seen) -> list[str]:
    """Where a client's counts are not those of the server's log."""
    return [
        f"{who} says {seen.figures[name]:g} {name}, the server's log {seen.logged[name]:g}"
        for name in (*COUNTS, "input_tokens")
        if seen.figures[name] != seen.logged[name]
    ]


def _table(verdict: Verdict, tolerance: float) -> str:
    lines = [f"\n{verdict.client.name} {verdict.version}: {verdict.client.what}"]
    lines.append(
        f"{'':<22}{'client':>12}{'(server)':>12}{OURS:>12}{'(server)':>12}{'ratio':>9}{'by log':>9}"
    )
    for name in FIGURES:
        if not verdict.pairs or (ratio := verdict.ratio(name)) is None:
            continue
        cells = [_middle(verdict, side, name) for side in (0, 1)]
        mark = "" if verdict.agrees(name, tolerance) else "  differs"
        by_log = verdict.ratio_by_log(name)
        shown = " " * 9 if by_log is None else f"{by_log:>9.3f}"
        lines.append(f"{name:<22}{''.join(cells)}{ratio:>9.3f}{shown}{mark}")
    lines += [f"! {line}" for line in verdict.trouble]
    return "\n".join(lines)


def _middle(verdict: Verdict, side: int, name: str) -> str:
    """The median over the pairs of one side's figure, and of the server's own."""
    seen = [pair[side] for pair in verdict.pairs]
    told = median(one.figures[name] for one in seen)
    logged = [one.logged[name] for one in seen if name in one.logged]
    return f"{told:>12.6g}" + (f"{median(logged):>12.6g}" if logged else " " * 12)


def _summary(verdicts: list[Verdict], load: Load, options: argparse.Namespace) -> dict[str, Any]:
    command = f"python benchmarks/client_agreement.py --server {options.server}"
    command += f" --concurrency {options.concurrency} --pairs {options.pairs}"
    return {
        "command": command,
        "server": options.server,
        "model": MODEL,
        "tolerance": options.tolerance,
        "load": asdict(load),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} x {_cpu()}",
        "tokenspeed": version("tokenspeed"),
        "clients": {one.client.name: _about(one, options.tolerance) for one in verdicts},
        "left out": [name for name in CLIENTS if name not in {v.client.name for v in verdicts}],
    }


def _cpu() -> str:
    """Its name where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "a CPU without a name")


def _about(verdict: Verdict, tolerance: float) -> dict[str, Any]:
    differs = [name for name in FIGURES if not verdict.agrees(name, tolerance)]
    return {
        "version": verdict.version,
        "what": verdict.client.what,
        "agrees": bool(verdict.pairs) and not differs and not verdict.trouble,
        "differs": differs,
        "ratios": {name: verdict.ratio(name) for name in FIGURES},
        "ratios by log": {name: verdict.ratio_by_log(name) for name in FIGURES},
        "pairs": [{"client": asdict(one), OURS: asdict(two)} for one, two in verdict.pairs],
        "trouble": verdict.trouble,
    }


if __name__ == "__main__":
    raise SystemExit(main())
