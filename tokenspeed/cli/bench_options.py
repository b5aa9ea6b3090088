# SPDX-License-Identifier: MIT
"""Flags that several benchmarks share, and what the benchmark's own types make of them.

Sends nothing. Imports the benchmark when a flag is read, so that other commands need no httpx.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed.cli.options import flag_of
from tokenspeed.config import traces_place

if TYPE_CHECKING:
    from tokenspeed.bench.client import Endpoint
    from tokenspeed.bench.compare import Judge
    from tokenspeed.bench.load import LoadOptions
    from tokenspeed.bench.session import Workload

WORKLOADS = ("generated", "published", "traces", "weka", "mooncake", "random", "sharegpt")
FROM_FILES = ("traces", "weka", "mooncake")
DIALECTS = ("chat", "responses", "messages", "completions")
HISTORIES = ("blocks", "answers")
BASE_URL = "http://127.0.0.1:8000"


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """One endpoint; `compare` has several, by `--endpoint`."""
    box = parser.add_argument_group("endpoint")
    box.add_argument("--base-url", default=BASE_URL, metavar="URL", help=f"default: {BASE_URL}")
    box.add_argument("--name", default="tokenspeed", help="in tables and plots")
    box.add_argument("--model", help="default: the endpoint's first")
    box.add_argument("--api-key", metavar="KEY")
    box.add_argument("--dialect", choices=DIALECTS, default="chat")
    add_headers(box)


def add_headers(box: Any) -> None:
    text = "of every request, such as x-tokenspeed-tps-floor=70; may be repeated"
    box.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help=text)


def endpoint_of(args: argparse.Namespace) -> "Endpoint":
    from tokenspeed.bench.client import Endpoint

    return Endpoint(
        name=args.name,
        base_url=args.base_url,
        model=args.model,
        dialect=args.dialect,
        api_key=args.api_key,
        headers=headers_of(args),
    )


def headers_of(args: argparse.Namespace) -> dict[str, str]:
    return dict(_pair("--header", each) for each in args.header)


def named_endpoint(text: str, headers: dict[str, str]) -> "Endpoint":
    """`NAME=URL[,model=M][,dialect=D][,api_key=K][,token_counts=no]`. `ValueError` for others."""
    from tokenspeed.bench.client import Endpoint

    first, *more = text.split(",")
    name, url = _pair("--endpoint", first)
    given: dict[str, Any] = dict(_pair("--endpoint", each) for each in more)
    for key in given:
        if key not in ("model", "dialect", "api_key", "token_counts"):
            raise ValueError(
                f"--endpoint {name}: {key!r} is none of model, dialect, api_key, token_counts"
            )
    if "token_counts" in given:
        if given["token_counts"] not in ("yes", "no"):
            raise ValueError(f"--endpoint {name}: token_counts is yes or no")
        given["token_counts"] = given["token_counts"] == "yes"
    return Endpoint(name=name, base_url=url, headers=headers, **given)


def add_workload(parser: argparse.ArgumentParser, *, default: str, sessions: int) -> None:
    """A workload of so many sessions; 0: of as many as the loads need (`--sessions-per-stream`)."""
    box = parser.add_argument_group("workload")
    box.add_argument("--workload", choices=WORKLOADS, default=default, help=f"default: {default}")
    text = f"of {', '.join(FROM_FILES)}; traces: default TOKENSPEED_TRACES"
    box.add_argument("--workload-file", type=Path, metavar="PATH", help=text)
    if sessions:
        text = f"or requests, where a workload has single ones (default: {sessions})"
        box.add_argument("--sessions", type=int, default=sessions, metavar="N", help=text)
        text = "over which sessions begin, where nothing else says"
        box.add_argument("--span", type=float, default=0.0, metavar="SECONDS", help=text)
    else:
        text = "that one stream of a load runs, one after another (default: 2)"
        box.add_argument("--sessions-per-stream", type=int, default=2, metavar="N", help=text)
    box.add_argument("--scale", type=float, default=1.0, metavar="X", help="divides all lengths")
    box.add_argument("--seed", type=int, default=0, metavar="N")
    text = "tokens that the model makes of a word (default: asked of the endpoint)"
    box.add_argument("--tokens-per-word", type=float, metavar="X", help=text)


def check_least(least: int, **given: int | None) -> None:
    """`ValueError` for a number that is less, by its flag."""
    for name, value in given.items():
        if value is not None and value < least:
            raise ValueError(f"{flag_of(name)} must be at least {least}: {value}")


def workload_of(args: argparse.Namespace, sessions: int, span_s: float = 0.0) -> "Workload":
    """`ValueError` for a file that is malformed, is missing, or would not be read."""
    name, path = args.workload, args.workload_file
    if path is not None and name not in FROM_FILES:
        raise ValueError(f"--workload-file: {name} is made, not read; give --workload too")
    if path is None and name in ("weka", "mooncake"):
        raise ValueError(f"--workload {name} needs --workload-file")
    if not (math.isfinite(span_s) and span_s >= 0):
        raise ValueError(f"--span must be finite and not negative: {span_s}")
    check_least(0, seed=args.seed)
    check_least(1, **({"sessions": sessions} if "sessions" in args else {}))
    common: dict[str, Any] = {"seed": args.seed, "scale": args.scale}
    if name == "mooncake":
        if span_s:
            raise ValueError("--span: the lines of a mooncake file say when each begins")
        from tokenspeed.bench.workloads import mooncake

        return mooncake.make(path, requests=sessions, **common)
    common["span_s"] = span_s
    if name in ("random", "sharegpt"):
        from tokenspeed.bench.workloads import fixed

        make = fixed.make if name == "random" else fixed.sharegpt
        return make(requests=sessions, **common)
    return _sessions(name, path, {"sessions": sessions, **common})


def _sessions(name: str, path: Path | None, common: dict[str, Any]) -> "Workload":
    from tokenspeed.bench.workloads import generated, published, traces, weka

    if path is not None and name == "weka":
        return weka.make(path, **common)
    if name == "traces":
        return traces.make(path or _recorded(), **common)
    return published.make(**common) if name == "published" else generated.make(**common)


def _recorded() -> Path:
    try:
        return traces_place()
    except ValueError as error:
        raise ValueError(f"--workload traces without --workload-file: {error}") from error


def add_load(parser: argparse.ArgumentParser, *, time_scale: float, rounds: int = 1) -> None:
    box = parser.add_argument_group("load")
    text = f"multiplies gaps and starts; 0: as soon as it can (default: {time_scale:g})"
    box.add_argument("--time-scale", type=float, default=time_scale, metavar="X", help=text)
    text = "what a prompt says of earlier answers: the recorded ones, or those that came"
    box.add_argument("--history", choices=HISTORIES, default="blocks", help=text)
    text = "dictate the recorded answers; the server needs --enable-forced-output"
    box.add_argument("--forced", action="store_true", help=text)
    text = "let the model end an answer before its length"
    box.add_argument("--stop-at-eos", action="store_true", help=text)
    # Not the simulator's 4: it plays agents that try again; here each refusal is to be seen.
    text = "send a refused turn again so often, after its Retry-After (default: 0)"
    box.add_argument("--retry", type=int, default=0, metavar="N", help=text)
    text = "end each run after so long"
    box.add_argument("--duration", type=float, metavar="SECONDS", help=text)
    text = f"parts of the workload that endpoints get in turn (default: {rounds})"
    box.add_argument("--rounds", type=int, default=rounds, metavar="N", help=text)
    text = "silence of an endpoint that is an error (default: 600)"
    box.add_argument("--stall", type=float, default=600.0, metavar="SECONDS", help=text)


def load_of(args: argparse.Namespace, concurrency: int | None) -> "LoadOptions":
    from tokenspeed.bench.load import LoadOptions

    return LoadOptions(
        concurrency=concurrency,
        time_scale=args.time_scale,
        history=args.history,
        forced=args.forced,
        ignore_eos=not args.stop_at_eos,
        retries=args.retry,
        duration_s=args.duration,
        rounds=args.rounds,
        stall_s=args.stall,
    )


def add_judge(parser: argparse.ArgumentParser, *, one_floor: bool = False) -> None:
    box = parser.add_argument_group("measures")
    if one_floor:
        box.add_argument("--floor", type=float, required=True, metavar="TPS")
    else:
        text = "tokens per second of each stream; plots show the first"
        box.add_argument("--floor", type=float, nargs="+", default=[], metavar="TPS", help=text)
    box.add_argument("--devices", type=int, default=1, metavar="N", help="of the endpoint")
    for kind in ("computed-input", "cached-input", "output"):
        box.add_argument(f"--price-{kind}", type=float, metavar="PRICE", help="of 1M tokens")
    box.add_argument("--price-device-hour", type=float, metavar="PRICE")


def add_output(parser: argparse.ArgumentParser) -> None:
    text = "write raw.jsonl, summary.json and report.html there"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=text)


def judge_of(args: argparse.Namespace) -> "Judge":
    from tokenspeed.bench.compare import Judge
    from tokenspeed.bench.measure import Price

    kinds = ("computed_input", "cached_input", "output", "device_hour")
    prices = {kind: getattr(args, f"price_{kind}") for kind in kinds}
    given = {kind: price for kind, price in prices.items() if price is not None}
    for kind, price in given.items():
        if not 0 <= price < math.inf:
            raise ValueError(f"--price-{kind.replace('_', '-')} must not be negative: {price}")
    floors = args.floor if isinstance(args.floor, list) else [args.floor]
    for floor in floors:
        if not 0 < floor < math.inf:
            raise ValueError(f"--floor must be finite and positive: {floor}")
    if args.devices < 1:
        raise ValueError(f"--devices must be at least 1: {args.devices}")
    return Judge(tuple(floors), Price(**given) if given else None, args.devices)


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{flag}: expected NAME=VALUE, got {text!r}")
    return name, value
