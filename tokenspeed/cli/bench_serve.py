# SPDX-License-Identifier: MIT
"""`tokenspeed bench serve`: single requests, by the flags of vLLM's `benchmark_serving.py`.

Takes the flags of the common case and no others; prints and saves the figures under its names.
"""

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tokenspeed.cli import bench_options

if TYPE_CHECKING:
    from tokenspeed.bench.client import Endpoint
    from tokenspeed.bench.load import LoadOptions
    from tokenspeed.bench.session import Workload

BACKENDS = {"openai": "completions", "openai-chat": "chat"}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="openai")
    text = f"default: {bench_options.BASE_URL}"
    parser.add_argument("--base-url", default=bench_options.BASE_URL, metavar="URL", help=text)
    parser.add_argument("--endpoint", metavar="PATH", help="default: the backend's")
    parser.add_argument("--model", help="default: the endpoint's first")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--dataset-name", choices=("random", "sharegpt"), default="random")
    parser.add_argument("--random-input-len", type=int, metavar="N", help="default: 1024")
    parser.add_argument("--random-output-len", type=int, metavar="N", help="default: 128")
    parser.add_argument("--random-range-ratio", type=float, metavar="X", help="default: 0")
    parser.add_argument("--random-prefix-len", type=int, metavar="N", help="default: 0")
    parser.add_argument("--num-prompts", type=int, default=1000, metavar="N")
    text = "requests per second, at random; inf, the default: all at once"
    parser.add_argument("--request-rate", type=float, default=math.inf, metavar="R", help=text)
    parser.add_argument("--max-concurrency", type=int, metavar="N")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--save-result", action="store_true")
    parser.add_argument("--result-filename", type=Path, metavar="FILE", help="of --save-result")
    text = "of ttft, tpot, itl, e2el, with commas"
    parser.add_argument("--percentile-metrics", default="ttft,tpot,itl", metavar="A,B", help=text)
    parser.add_argument("--metric-percentiles", default="99", metavar="P,Q")


def run(args: argparse.Namespace) -> int:
    """Raises `TokenSpeedError` where not one request was answered."""
    from tokenspeed.cli import bench_run

    bench_run.check_tools()
    from tokenspeed.bench.serving import check_metrics, serving_result, serving_text
    from tokenspeed.errors import TokenSpeedError

    metrics = args.percentile_metrics.split(",")
    percentiles = _numbers(args.metric_percentiles)
    check_metrics(metrics, percentiles)
    saved = _result_file(args)
    if saved is not None:
        bench_run.check_files("--result-filename", saved)
    workload, options, endpoint = _workload(args), _options(args), _endpoint(args)
    bench = bench_run.make_bench([endpoint], workload, options, None)
    with bench_run.watched(bench, workload.num_turns) as bench:
        (measured,) = bench_run.run_until_done(bench, bench.run())
    result = serving_result(measured, metrics, percentiles)
    bench_run.warn([measured])
    print(serving_text(result, metrics))
    if saved is not None:
        asked = {"backend": args.backend, "num_prompts": args.num_prompts, "request_rate": (
            "inf" if math.isinf(args.request_rate) else args.request_rate),
            "max_concurrency": args.max_concurrency}  # fmt: skip
        saved.write_text(json.dumps(result | asked) + "\n")
    if not result["completed"]:
        raise TokenSpeedError("not one request was answered")
    return 0


def _endpoint(args: argparse.Namespace) -> "Endpoint":
    from tokenspeed.bench.client import Endpoint
    from tokenspeed.bench.dialects import dialect_of

    dialect = BACKENDS[args.backend]
    path = dialect_of(dialect).path
    if args.endpoint not in (None, path):
        raise ValueError(f"--endpoint {args.endpoint}: backend {args.backend} speaks {path}")
    return Endpoint(args.backend, args.base_url, args.model, dialect, args.api_key)


def _workload(args: argparse.Namespace) -> "Workload":
    from tokenspeed.bench.load import with_arrivals
    from tokenspeed.bench.workloads import fixed

    least_one = ("num_prompts", "random_input_len", "random_output_len")
    bench_options.check_least(1, **{name: getattr(args, name) for name in least_one})
    bench_options.check_least(0, random_prefix_len=args.random_prefix_len, seed=args.seed)
    given = {
        "input_tokens": args.random_input_len,
        "output_tokens": args.random_output_len,
        "range_ratio": args.random_range_ratio,
        "prefix_tokens": args.random_prefix_len,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.dataset_name == "random":
        workload = fixed.make(requests=args.num_prompts, seed=args.seed, **given)
    elif given:
        raise ValueError("--random-...: of --dataset-name random only")
    else:
        workload = fixed.sharegpt(requests=args.num_prompts, seed=args.seed)
    if math.isinf(args.request_rate) and args.request_rate > 0:
        return workload
    return with_arrivals(workload, args.request_rate)


def _options(args: argparse.Namespace) -> "LoadOptions":
    from tokenspeed.bench.load import LoadOptions

    if math.isinf(args.request_rate):
        at_once = args.num_prompts if args.max_concurrency is None else args.max_concurrency
        return LoadOptions(concurrency=at_once, ignore_eos=args.ignore_eos)
    if args.max_concurrency is not None:
        raise ValueError("--max-concurrency needs --request-rate inf: both at once are not there")
    return LoadOptions(ignore_eos=args.ignore_eos)


def _result_file(args: argparse.Namespace) -> Path | None:
    if not args.save_result:
        if args.result_filename is not None:
            raise ValueError("--result-filename needs --save-result")
        return None
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return args.result_filename or Path(f"{args.backend}-{args.request_rate:g}qps-{now}.json")


def _numbers(text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"--metric-percentiles: numbers with commas, not {text!r}") from None
