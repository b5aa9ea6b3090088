# SPDX-License-Identifier: MIT
"""`tokenspeed kernels list | explain | verify | bench | tune`. Knows flags and tables of text.

What they do stands in `kernels_explain.py` and `kernels_measure.py`. Loads no weights.
"""

import argparse
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float64")
LAYERS_OF_EACH_KIND = -1


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("kernels", help="list, explain, verify and measure kernels")
    parser.set_defaults(run=run, parser=parser)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="every op, its call and its backends")
    _add_explain(actions.add_parser("explain", help="which backend serves an op, and why"))
    verify = actions.add_parser("verify", help="compare backends with the float64 reference")
    _add_choice(verify)
    verify.add_argument("--dtype", action="append", choices=DTYPES[:2], help="default: all")
    verify.add_argument("--full", action="store_true", help="the slow cases too, 128K of context")
    verify.add_argument("--failures", action="store_true", help="print every case that fails")
    bench = actions.add_parser("bench", help="time backends at sizes of real models")
    _add_choice(bench)
    _add_sizes(bench, seconds=0.3)
    bench.add_argument("--json", action="store_true", help="print values for programs")
    tune = actions.add_parser("tune", help="measure, and write the table that selection reads")
    _add_choice(tune, backends=False)
    _add_sizes(tune, seconds=0.3)
    tune.add_argument("--quick", action="store_true", help="few token counts, short runs")
    tune.add_argument("--output", type=Path, metavar="FILE", help="default: in the cache folder")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", help="an op of `tokenspeed kernels list`")
    parser.add_argument("--device", help="device type (default: that of --arch, or cpu)")
    parser.add_argument("--arch", help="cpu, sm_90, gfx950 ...; the device need not be here")
    parser.add_argument("--dtype", choices=DTYPES, help="of the activations (default: bfloat16)")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        type=_size,
        metavar="NAME=SIZE",
        help="a fixed size the layer would pass, such as head_dim=128; may be repeated",
    )
    parser.add_argument("--model", help="every op of a model: a folder, a cached hub id, a shape")
    parser.add_argument(
        "--layer",
        nargs="?",
        type=int,
        const=LAYERS_OF_EACH_KIND,
        metavar="N",
        help="of --model: layer N only; without N, one layer of each kind",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share the model")


def _add_choice(parser: argparse.ArgumentParser, *, backends: bool = True) -> None:
    parser.add_argument("--op", action="append", default=[], help="may be repeated; default: all")
    if backends:
        parser.add_argument("--backend", action="append", default=[], help="may be repeated")
    parser.add_argument("--device", default="cpu", help="device type (default: cpu)")


def _add_sizes(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    parser.add_argument("--model", help="sizes of this model's layers in place of the examples")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="tokens of one call")
    parser.add_argument("--seconds", type=float, default=seconds, metavar="S", help="for each")


def run(args: argparse.Namespace) -> int:
    from tokenspeed.cli import kernels_explain, kernels_measure

    actions = {
        "list": kernels_explain.list_ops,
        "explain": kernels_explain.explain,
        "verify": kernels_measure.verify,
        "bench": kernels_measure.bench,
        "tune": kernels_measure.tune_table,
    }
    return actions[args.action](args)


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name.isidentifier() or not size.isdigit():
        raise argparse.ArgumentTypeError(f"expected NAME=SIZE, got {text!r}")
    return name, int(size)
