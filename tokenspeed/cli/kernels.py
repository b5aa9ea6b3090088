# SPDX-License-Identifier: MIT
"""`tokenspeed kernels list | explain`: which kernels there are, and why one is taken.

Knows the registry's answers, no kernel. Loads no model.
"""

import argparse
from typing import Any

DTYPES = ("float32", "bfloat16", "float64")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("kernels", help="list kernels and explain their choice")
    parser.set_defaults(run=run, parser=parser)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="every op, its call and its backends")
    why = actions.add_parser("explain", help="which backend serves an op, and why")
    why.add_argument("op", help="an op of `tokenspeed kernels list`")
    why.add_argument("--device", default="cpu", help="device type (default: cpu)")
    why.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the activations")
    why.add_argument(
        "--shape",
        action="append",
        default=[],
        type=_size,
        metavar="NAME=SIZE",
        help="a fixed size the layer would pass, such as head_dim=128; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    from tokenspeed.kernels.registry import REGISTRY

    REGISTRY.load()
    if args.action == "list":
        for name, op in sorted(REGISTRY.ops.items()):
            print(f"{name:<16} {', '.join(sorted(REGISTRY.backends[name]))}\n    {op.call}")
    elif not _explain(args):
        return 2
    for source, problem in REGISTRY.problems.items():
        print(f"not loaded: {source}: {problem}")
    return 0


def _explain(args: argparse.Namespace) -> bool:
    import torch

    from tokenspeed.kernels import explain

    dtype = getattr(torch, args.dtype)
    try:
        verdicts = explain(args.op, device=args.device, dtype=dtype, **dict(args.shape))
    except (RuntimeError, ValueError) as error:  # torch's word on an unknown device; ours on an op
        print(f"error: {error}")
        return False
    for verdict in verdicts:
        mark = "*" if verdict.chosen else " "
        print(f"{mark} {verdict.backend:<12} {verdict.reason}")
    return True


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name.isidentifier() or not size.isdigit():
        raise argparse.ArgumentTypeError(f"expected NAME=SIZE, got {text!r}")
    return name, int(size)
