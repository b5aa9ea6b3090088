# SPDX-License-Identifier: MIT
"""`tokenspeed plan`: what a model needs and gives on devices that need not be here.

Reads config.json, loads no weights.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed.cli.options import flag_of
from tokenspeed.planner.devices import DEVICES, Device, find_device, with_memory
from tokenspeed.spmd.mesh import Mesh

if TYPE_CHECKING:  # they need torch, which no other command should wait for
    from tokenspeed.planner.catalog import PlannedModel
    from tokenspeed.planner.estimate import Estimate, Load
    from tokenspeed.planner.search import Found

CONTEXT = 50_000
MOST_DEVICES = 4096  # of one engine
MOST = 1e12  # of anything else that is counted in numbers with a point
AXES = {
    "tp": ("--tensor-parallel-size", "devices that share each layer"),
    "ep": ("--expert-parallel-size", "devices that share the experts"),
    "dp": ("--attention-data-parallel-size", "groups of devices with requests of their own"),
    "pp": ("--pipeline-parallel-size", "devices that share the layers"),
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("plan", help="predict memory, speed and cost of a model")
    parser.add_argument("model", help="folder, cached hub id, or a shipped shape: kimi-k2.6 ...")
    parser.add_argument("--gpu", choices=[*DEVICES, "cpu"], default="h200", help="kind of device")
    parser.add_argument("--count", type=int, metavar="N", help="devices (default: the mesh's)")
    parser.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of one device")
    for axis, (flag, text) in AXES.items():
        parser.add_argument(f"--{axis}", flag, dest=axis, type=int, metavar="N", help=text)
    parser.add_argument(
        "--auto", action="store_true", help="search all meshes of --count devices, and batches"
    )
    parser.add_argument("--tps-floor", type=float, default=70.0, metavar="TPS", help="of a user")
    _add_load(parser)
    formats, kinds = ("auto", "fp32", "bf16", "fp8", "int4", "fp4"), ("auto", "bf16", "fp8")
    text = "of the weights; auto: as the checkpoint stores them"
    parser.add_argument("--weight-dtype", choices=formats, default="auto", help=text)
    parser.add_argument(
        "--kv-cache-dtype", choices=kinds, default="auto", help="of keys and values"
    )
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE")
    parser.add_argument("--json", action="store_true", help="print values for programs")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the meshes; needs matplotlib"
    )
    parser.set_defaults(run=run, parser=parser)


def _add_load(parser: argparse.ArgumentParser) -> None:
    box = parser.add_argument_group("load")
    box.add_argument("--batch", type=int, metavar="N", help="requests that decode at once, in all")
    box.add_argument("--context", type=int, metavar="TOKENS", help="of each request")
    box.add_argument("--cached", type=float, default=0.0, metavar="SHARE", help="of a prompt: 0.95")
    box.add_argument("--page-size", type=int, default=64, metavar="TOKENS")
    box.add_argument("--max-num-batched-tokens", type=int, default=8192, metavar="TOKENS")
    box.add_argument("--redundant-experts", type=int, default=0, metavar="N", help="in each layer")


def run(args: argparse.Namespace) -> int:
    from tokenspeed.planner.catalog import open_model
    from tokenspeed.planner.search import search

    _check(args)
    planned = open_model(args.model, weight_dtype=args.weight_dtype, kv_dtype=args.kv_cache_dtype)
    load, mesh = _load(args, planned), _mesh(args, planned)
    count = args.count or mesh.num_ranks
    device = with_memory(find_device(args.gpu, count), args.memory_gib)
    found: Found | None = None
    if args.auto or args.plot:
        fixed = args.batch is not None
        found = search(planned, device, count, load, args.tps_floor, fixed_batch=fixed)
    chosen = _best(args, found) if args.auto and found else _fixed(planned, mesh, device, load)
    if args.plot and found:
        from tokenspeed.planner.plot import draw

        draw(found, args.tps_floor, args.plot)
    print(_as_json(args, chosen, found) if args.json else "\n".join(_lines(args, chosen, found)))
    return 0


def _check(args: argparse.Namespace) -> None:
    """`ValueError`: a number that is none, or out of all bounds."""
    for name in ("memory_gib", "tps_floor", "price_per_gpu_hour"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= MOST:
            raise ValueError(f"{flag_of(name)} must be from 0 to {MOST:.0e}: {value}")
    for name in ("count", *AXES):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MOST_DEVICES:
            raise ValueError(f"{flag_of(name)} must be from 1 to {MOST_DEVICES}: {value}")


def _load(args: argparse.Namespace, planned: "PlannedModel") -> "Load":
    from tokenspeed.planner.estimate import Load

    longest = planned.model.max_position
    context = min(CONTEXT, longest) if args.context is None else args.context
    if context > longest:
        raise ValueError(f"{args.model} has {longest} positions, fewer than --context {context}")
    return Load(
        batch=16 if args.batch is None else args.batch,
        context=context,
        cached_share=args.cached,
        page_size=args.page_size,
        step_tokens=args.max_num_batched_tokens,
        redundant_experts=args.redundant_experts,
    )


def _mesh(args: argparse.Namespace, planned: "PlannedModel") -> Mesh:
    """The axes given; with none, all devices share every layer, experts by ep if there are any."""
    sizes = {axis: getattr(args, axis) for axis in AXES if getattr(args, axis) is not None}
    if args.auto and (sizes or args.count is None):
        raise ValueError("--auto searches all meshes of --count devices: give that and no axis")
    if not sizes:
        count = args.count or 1
        return Mesh(tp=count, ep=count if planned.has_experts else 1)
    mesh = Mesh(**sizes)
    if mesh.num_ranks > MOST_DEVICES:
        raise ValueError(f"mesh {mesh} has {mesh.num_ranks} ranks, more than {MOST_DEVICES}")
    if args.count not in (None, mesh.num_ranks):
        raise ValueError(f"mesh {mesh} has {mesh.num_ranks} ranks, --count says {args.count}")
    return mesh


def _fixed(planned: "PlannedModel", mesh: Mesh, device: Device, load: "Load") -> "Estimate":
    from tokenspeed.planner.estimate import estimate
    from tokenspeed.planner.memory import DoesNotFitError
    from tokenspeed.planner.search import smallest_count

    chosen = estimate(planned, mesh, device, load)
    try:
        chosen.room.check(load.batch, load.context)
    except DoesNotFitError as error:
        count = smallest_count(planned, device, load, mesh.num_ranks)
        advice = f"; {count} such devices would do" if count else ""
        raise DoesNotFitError(f"mesh {mesh}: {error}{advice}") from error
    return chosen


def _best(args: argparse.Namespace, found: "Found") -> "Estimate":
    best = (*found.ranked, *found.slow)
    if not best:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in found.refused.most_common())
        raise ValueError(f"no mesh of {args.count} devices serves {args.model}: {reasons}")
    return best[0]


def _lines(args: argparse.Namespace, chosen: "Estimate", found: "Found | None") -> Iterator[str]:
    from tokenspeed.planner import report
    from tokenspeed.planner.table import render

    if found is not None:
        yield render(report.search_table(found)) + "\n"
        if found.refused:
            yield render(report.refused_table(found)) + "\n"
    yield report.summary(chosen) + "\n"
    for table in report.tables(chosen, args.price_per_gpu_hour):
        yield render(table) + "\n"
    yield "Assumptions"
    yield from (f"  - {line}" for line in report.assumptions(chosen))


def _as_json(args: argparse.Namespace, chosen: "Estimate", found: "Found | None") -> str:
    from tokenspeed.planner import report

    price = args.price_per_gpu_hour
    document = report.values(chosen, price)
    if found is not None:
        every = [*found.ranked, *found.slow]
        document["meshes"] = [report.values(each, price, compiled=False) for each in every]
        document["refused"] = dict(found.refused)
    return json.dumps(document, indent=2)
