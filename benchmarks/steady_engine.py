# SPDX-License-Identifier: MIT
"""The real server on a device of a known speed: every step of its engine takes as long as told.

A step that was computed sooner waits for the rest of its time, so that the processor is free for
who asks and two clients see the same device. Changes nothing else; knows no request and no text.

    python -m benchmarks.steady_engine serve [--port 8000] [--step-s 0.01] [--token-s 0.0004]
"""

import argparse
import runpy
import sys
import time
from typing import Any

ENGINE = "tokenspeed.engine.server"


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """The engine process. What its gateway asks of it is in `rest`."""
    from tokenspeed.execution.plan_view import ROW_PREFILL, Plans
    from tokenspeed.execution.runner import InFlight, Runner

    launch = Runner.launch

    def steady(self: Runner, plans: Plans) -> InFlight:
        begin_s = time.perf_counter()
        views = [plan for plan in plans if plan is not None]
        prompt = sum(int(v.num_tokens[v.flags & ROW_PREFILL != 0].sum()) for v in views)
        flight = launch(self, plans)
        over_s = begin_s + args.step_s + args.token_s * prompt
        time.sleep(max(0.0, over_s - time.perf_counter()))
        return flight

    replaced: Any = Runner
    replaced.launch = steady
    sys.argv = [ENGINE, *rest]
    runpy.run_module(ENGINE, run_name="__main__")
    return 0


def serve(args: argparse.Namespace) -> int:
    """The real gateway before it, with one line in the log for each request."""
    from tokenspeed.config import EngineConfig, ServerOptions
    from tokenspeed.gateway.server import serve as serve_gateway

    pace = ("--step-s", str(args.step_s), "--token-s", str(args.token_s))
    config = EngineConfig.of(
        model="demo", max_num_batched_tokens=args.max_num_batched_tokens, overlap_depth=0
    )
    options = ServerOptions(host=args.host, port=args.port, log_requests=True)
    command = (sys.executable, "-m", "benchmarks.steady_engine", "run", *pace)
    return serve_gateway(config, options, command)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="action")
    engine, gateway = commands.add_parser("run"), commands.add_parser("serve")
    for one in (engine, gateway):
        one.add_argument("--step-s", type=float, default=0.01, help="seconds of a step")
        one.add_argument("--token-s", type=float, default=0.0004, help="more, a prompt's token")
    gateway.add_argument("--host", default="127.0.0.1")
    gateway.add_argument("--port", type=int, default=8000)
    gateway.add_argument("--max-num-batched-tokens", type=int, default=256)
    args, rest = parser.parse_known_args()
    if args.action == "run":
        return run(args, rest)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    return serve(args)


if __name__ == "__main__":
    raise SystemExit(main())
