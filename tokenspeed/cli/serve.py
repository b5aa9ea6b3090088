# SPDX-License-Identifier: MIT
"""`tokenspeed serve`: the gateway and its engine, or another rank. Knows flags, no HTTP."""

import argparse
from typing import Any

from tokenspeed.cli.options import add_engine_options, add_options, engine_options, options_of
from tokenspeed.config import EngineConfig, ServerOptions, torchrun_place
from tokenspeed.execution.speculation.options import speculation_of


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help="serve a model over the OpenAI API")
    add_engine_options(parser)
    add_options(parser, ServerOptions)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    config = EngineConfig.of(**engine_options(args))
    options = ServerOptions(**options_of(args, ServerOptions))
    speculation_of(config)  # refused here, before another process is started
    if config.parallel.launcher == "torchrun":
        from tokenspeed.engine.ranks.torchrun import run_rank, stop_with_parent

        place = torchrun_place()
        if place.rank:
            return run_rank(config, place)
        stop_with_parent()
    from tokenspeed.gateway.server import serve

    return serve(config, options)
