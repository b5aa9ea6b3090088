# SPDX-License-Identifier: MIT
"""`tokenspeed bench serve | agentic | pareto | capacity | offline | compare | report`.

Says which flags each has, and what it runs. Measures nothing itself.
"""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokenspeed.cli import bench_offline, bench_options, bench_report, bench_serve

if TYPE_CHECKING:
    from tokenspeed.bench.client import Endpoint
    from tokenspeed.bench.compare import Bench, Trial

LOADS = (1, 2, 4, 8, 16, 32)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="measure servers, and plot what they give")
    parser.set_defaults(run=run, parser=parser)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, text, add in (
        (
            "serve",
            "single requests, with the flags of vLLM's benchmark_serving.py",
            bench_serve.add,
        ),
        ("agentic", "sessions of coding agents, recorded or generated", _add_agentic),
        ("pareto", "speed of a user against output of a device, load by load", _add_pareto),
        ("capacity", "the most streams that hold a floor", _add_capacity),
        ("offline", "the engine in this process, without HTTP", bench_offline.add),
        ("compare", "several endpoints that take turns", _add_compare),
        ("report", "tables and pictures of runs that are over", bench_report.add),
    ):
        each = actions.add_parser(action, help=text)
        each.set_defaults(parser=each)
        add(each)


def run(args: argparse.Namespace) -> int:
    actions = {
        "serve": bench_serve.run,
        "agentic": agentic,
        "pareto": sweep,
        "capacity": capacity,
        "offline": bench_offline.run,
        "compare": sweep,
        "report": bench_report.run,
    }
    return actions[args.action](args)


def _add_agentic(parser: argparse.ArgumentParser) -> None:
    bench_options.add_endpoint(parser)
    bench_options.add_workload(parser, default="generated", sessions=20)
    bench_options.add_load(parser, time_scale=1.0)
    text = "sessions at once, in place of when the workload says that each begins"
    parser.add_argument("--concurrency", type=int, metavar="N", help=text)
    text = "sessions that begin in a second, at random; with --time-scale 1 alone"
    parser.add_argument("--rate", type=float, metavar="R", help=text)
    bench_options.add_judge(parser)
    bench_options.add_output(parser)


def _add_pareto(parser: argparse.ArgumentParser) -> None:
    bench_options.add_endpoint(parser)
    _add_sweep(parser, rounds=1)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    text = "NAME=URL[,model=M][,dialect=D][,api_key=K][,token_counts=no]; at least two of them"
    parser.add_argument("--endpoint", action="append", default=[], metavar="NAME=URL", help=text)
    bench_options.add_headers(parser)
    _add_sweep(parser, rounds=2)


def _add_sweep(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    bench_options.add_workload(parser, default="published", sessions=0)
    bench_options.add_load(parser, time_scale=0.0, rounds=rounds)
    text = f"sessions at once, one after another (default: {' '.join(map(str, LOADS))})"
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=list(LOADS), metavar="N", help=text
    )
    bench_options.add_judge(parser)
    bench_options.add_output(parser)


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    bench_options.add_endpoint(parser)
    bench_options.add_workload(parser, default="published", sessions=0)
    bench_options.add_load(parser, time_scale=0.0)
    text = "of all stream-seconds that must be at or above the floor (default: 0.99)"
    parser.add_argument("--share", type=float, default=0.99, metavar="SHARE", help=text)
    text = "streams to begin with (default: 1)"
    parser.add_argument("--start", type=int, default=1, metavar="N", help=text)
    text = "most streams to try (default: 64)"
    parser.add_argument("--most", type=int, default=64, metavar="N", help=text)
    bench_options.add_judge(parser, one_floor=True)
    bench_options.add_output(parser)


def agentic(args: argparse.Namespace) -> int:
    """One run; Ctrl-C ends it early."""
    from tokenspeed.cli import bench_run

    bench_run.check_output(args.output)
    from tokenspeed.bench.load import with_arrivals

    if args.concurrency is not None and args.rate is not None:
        raise ValueError("--concurrency and --rate exclude each other")
    if args.rate is not None and args.time_scale != 1:
        raise ValueError(
            f"--rate {args.rate:g} and --time-scale {args.time_scale:g} contradict each other: one"
            " says when sessions begin, the other would multiply it"
        )
    judge, options = bench_options.judge_of(args), bench_options.load_of(args, args.concurrency)
    workload = bench_options.workload_of(args, args.sessions, args.span)
    if args.rate is not None:
        workload = with_arrivals(workload, args.rate)
    endpoints = [bench_options.endpoint_of(args)]
    bench = bench_run.make_bench(endpoints, workload, options, args.tokens_per_word)
    with bench_run.watched(bench, workload.num_turns) as bench:
        runs = bench_run.run_until_done(bench, bench.run())
    return bench_run.report(args, runs, judge, {})


def sweep(args: argparse.Namespace) -> int:
    """`pareto` and `compare`: the same, on one endpoint and on several."""
    from tokenspeed.cli import bench_run

    bench_run.check_output(args.output)
    loads = sorted(set(args.concurrency))
    if loads[0] < 1:
        raise ValueError(f"--concurrency must be at least 1: {loads[0]}")
    endpoints = _endpoints(args)
    judge, bench = bench_options.judge_of(args), _bench_up_to(args, endpoints, loads[-1])
    num_turns = sum(bench.part(streams).num_turns for streams in loads)
    with bench_run.watched(bench, num_turns) as bench:
        runs = bench_run.run_until_done(bench, bench.sweep(loads))
    return bench_run.report(args, runs, judge, {})


def _endpoints(args: argparse.Namespace) -> list["Endpoint"]:
    if args.action == "pareto":
        return [bench_options.endpoint_of(args)]
    headers = bench_options.headers_of(args)
    endpoints = [bench_options.named_endpoint(each, headers) for each in args.endpoint]
    if len(endpoints) < 2:
        raise ValueError("compare needs two endpoints or more: --endpoint NAME=URL")
    return endpoints


def _bench_up_to(args: argparse.Namespace, endpoints: list["Endpoint"], most: int) -> "Bench":
    """For loads of at most so many streams at once."""
    from tokenspeed.cli import bench_run

    each = args.sessions_per_stream
    if each < 1:
        raise ValueError(f"--sessions-per-stream must be at least 1: {each}")
    workload = bench_options.workload_of(args, most * each)
    options = bench_options.load_of(args, None)
    return bench_run.make_bench(endpoints, workload, options, args.tokens_per_word, each)


def capacity(args: argparse.Namespace) -> int:
    """A floor that not even one stream holds is a result: 0."""
    from tokenspeed.cli import bench_run

    bench_run.check_output(args.output)
    from tokenspeed.bench.capacity import find_capacity
    from tokenspeed.bench.compare import try_floor

    if not 0 < args.share <= 1:
        raise ValueError(f"--share must be above 0 and at most 1: {args.share}")
    if not 1 <= args.start <= args.most:
        raise ValueError(f"--start must be from 1 to --most, {args.most}: {args.start}")
    judge = bench_options.judge_of(args)
    bench = _bench_up_to(args, [bench_options.endpoint_of(args)], args.most)
    tried: list[Trial] = []

    async def trial(streams: int) -> "Trial":
        one = await try_floor(bench, judge, args.share, streams, len(tried))
        if bench.stop.is_set():  # cut short, it shows nothing
            return replace(one, held=False)
        tried.append(one)
        bench_run.say(f"{streams} streams: {'held' if one.held else 'not held'}")
        return one

    with bench_run.watched(bench, None) as bench:
        work = find_capacity(trial, start=args.start, most=args.most)
        found = bench_run.run_until_done(bench, work)
    what = {"streams": found.streams, "capped": found.capped, "interrupted": bench.stop.is_set()}
    return bench_run.report(args, [one.run for one in tried], judge, what)
