# SPDX-License-Identifier: MIT
"""The `tokenspeed` command: picks a subcommand and turns typed errors into exit codes."""

import os
import sys

from tokenspeed.cli import bench, chat, env, generate, kernels, plan, serve, simulate
from tokenspeed.cli.options import Parser
from tokenspeed.errors import TokenSpeedError

COMMANDS = (serve, chat, generate, bench, kernels, plan, simulate, env)


def build_parser() -> Parser:
    """The whole command line; every subcommand adds its own part."""
    parser = Parser(prog="tokenspeed", description="An inference engine for coding agents.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, 1 for a typed failure, 2 for a wrong command line."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # The subcommand's own parser knows the flags that the wrong one may have meant.
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads had enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TokenSpeedError, ValueError, OSError) as error:
        print(f"tokenspeed {args.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130
