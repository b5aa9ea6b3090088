# SPDX-License-Identifier: MIT
"""`tokenspeed simulate`: a workload on devices that need not be here, in virtual time.

Knows flags and files; no scheduler and no step times.
"""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tokenspeed.cli import bench_options, bench_run
from tokenspeed.cli.options import add_options, flag_of, options_of
from tokenspeed.config import traces_place
from tokenspeed.planner.devices import DEVICES, find_device
from tokenspeed.simulation.options import SimulationOptions
from tokenspeed.spmd.mesh import Mesh

if TYPE_CHECKING:  # they need torch, which no other command should wait for
    from tokenspeed.cli.simulated_floors import Floors
    from tokenspeed.simulation.device_profile import DeviceProfile
    from tokenspeed.simulation.sessions import Workload
    from tokenspeed.simulation.simulate import Simulation

MADE = ("generated", "published", "traces")  # workloads that are made here, see bench/workloads
COUNTS = (
    *("num_steps", "num_calls", "num_preemptions", "num_drafts", "num_accepted_drafts"),
    *("num_late", "floor_misses_for_progress", "num_unmeetable", "step_time_error"),
)
AXES = {"tp": "share each layer", "ep": "share the experts", "dp": "have requests of their own"}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("simulate", help="predict what a workload meets on devices")
    parser.add_argument(
        "workload", help=f"a file of sessions (docs/simulation.md), or one of {', '.join(MADE)}"
    )
    box = parser.add_argument_group("workload that is made")
    box.add_argument("--sessions", type=int, metavar="N", help="how many")
    box.add_argument("--seed", type=int, metavar="N")
    box.add_argument("--scale", type=float, metavar="X", help="divides lengths")
    box.add_argument("--span-s", type=float, metavar="X", help="in which sessions begin")
    box.add_argument("--write-workload", type=Path, metavar="FILE", help="keep the sessions")
    box = parser.add_argument_group("devices")
    box.add_argument("--profile", type=Path, metavar="FILE", help="step times that were measured")
    box.add_argument("--model", help="folder, cached hub id, or a shipped shape; or --profile")
    box.add_argument("--gpu", choices=[*DEVICES, "cpu"], help="kind of device (default: h200)")
    for axis, text in AXES.items():
        box.add_argument(f"--{axis}", type=int, metavar="N", help=f"devices that {text}")
    formats, kinds = ("auto", "fp32", "bf16", "fp8", "int4", "fp4"), ("auto", "bf16", "fp8")
    box.add_argument("--weight-dtype", choices=formats, help="auto: as the checkpoint says")
    box.add_argument("--kv-cache-dtype", choices=kinds, help="of keys and values")
    box.add_argument("--host-s", type=float, metavar="X", help="of a step, on the host")
    box.add_argument("--request-s", type=float, metavar="X", help="until the engine knows of one")
    add_options(parser, SimulationOptions)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the run's raw file")
    text = "tokens so near to each other are one event of the raw file (default: 0)"
    parser.add_argument("--event-s", type=float, default=0.0, metavar="X", help=text)
    text = "floors of tokens per second whose attainment is printed (default: --tps-floor)"
    parser.add_argument("--floors", type=float, nargs="+", metavar="F", help=text)
    parser.add_argument("--json", action="store_true", help="print values for programs")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    from tokenspeed.cli.simulated_floors import Floors
    from tokenspeed.simulation.sessions import write_workload
    from tokenspeed.simulation.simulate import Simulation

    if not 0 <= args.event_s < math.inf:
        raise ValueError(f"--event-s must be finite and not negative: {args.event_s}")
    bench_options.check_least(0, seed=args.seed)
    for name in ("output", "write_workload"):
        if (file := getattr(args, name)) is not None:
            bench_run.check_files(flag_of(name), file)
    options = SimulationOptions(**options_of(args, SimulationOptions))
    promised = [] if options.tps_floor is None else [options.tps_floor]
    floors = Floors(args.floors or promised)
    workload = _workload(args)
    if args.write_workload:
        write_workload(args.write_workload, workload)
    profile, options, mesh = _devices(args, options)
    simulation = Simulation(workload, profile, options, num_dp=mesh.dp)
    figures = _play(args, simulation, mesh.num_ranks, floors)
    print(json.dumps(figures) if args.json else "\n".join(_lines(figures)))
    return 0


def _workload(args: argparse.Namespace) -> "Workload":
    from tokenspeed.simulation.sessions import condense, read_workload

    given = _given(args, ("sessions", "seed", "scale", "span_s"))
    if args.workload in MADE:
        if args.workload == "traces":
            given["path"] = traces_place()
        made = import_module(f"tokenspeed.bench.workloads.{args.workload}").make(**given)
        return condense(made)
    if given:
        raise ValueError(f"{_flags(given)}: only for {', '.join(MADE)}, not for a file")
    return read_workload(Path(args.workload))


def _devices(
    args: argparse.Namespace, options: SimulationOptions
) -> tuple["DeviceProfile", SimulationOptions, Mesh]:
    """The profile, the options with nothing left open, and how many devices there are."""
    if (args.profile is None) == (args.model is None):
        raise ValueError("give either --model or --profile")
    given = _given(args, ("gpu", *AXES, "weight_dtype", "kv_cache_dtype", "host_s", "request_s"))
    if args.model:
        return _roofline(args.model, given, options)
    from tokenspeed.simulation.device_profile import read_profile

    if given:
        raise ValueError(f"{_flags(given)}: --profile says all of a device")
    if options.num_pages is None or options.max_model_len is None:
        raise ValueError("--profile does not say what fits: give --num-pages and --max-model-len")
    return read_profile(args.profile), options, Mesh()


def _roofline(
    model: str, given: dict[str, Any], options: SimulationOptions
) -> tuple["DeviceProfile", SimulationOptions, Mesh]:
    from tokenspeed.planner.catalog import open_model
    from tokenspeed.planner.estimate import Load, estimate
    from tokenspeed.simulation.roofline import RooflineProfile

    mesh = Mesh(**{axis: given[axis] for axis in AXES if axis in given})
    device = find_device(given.get("gpu", "h200"), mesh.num_ranks)
    load = Load(page_size=options.page_size, step_tokens=options.max_num_batched_tokens)
    planned = open_model(
        model,
        weight_dtype=given.get("weight_dtype", "auto"),
        kv_dtype=given.get("kv_cache_dtype", "auto"),
    )
    found = estimate(planned, mesh, device, load)
    found.room.check(1, 1)
    times = {name: given[name] for name in ("host_s", "request_s") if name in given}
    pages = options.num_pages or found.room.num_pages
    longest = min(pages * options.page_size, planned.model.max_position)
    options = replace(options, num_pages=pages, max_model_len=options.max_model_len or longest)
    return RooflineProfile(found, **times), options, mesh


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _flags(given: dict[str, Any]) -> str:
    return ", ".join(map(flag_of, given))


def _play(
    args: argparse.Namespace, simulation: "Simulation", num_devices: int, floors: "Floors"
) -> dict[str, Any]:
    from tokenspeed.simulation.raw_file import RawFile
    from tokenspeed.simulation.tally import Tally

    tally = Tally()
    turns = sum(len(session.turns) for session in simulation.workload.sessions)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=turns, unit="request", disable=None))
        raw = RawFile(args.output, simulation, args.event_s) if args.output else None
        if raw is not None:
            stack.callback(raw.close)
        for outcome in simulation.outcomes():
            tally.add(outcome)
            floors.add(outcome.token_times_s)
            if raw is not None:
                raw.write(outcome)
            bar.update()
    stats = simulation.stats()
    counts = {name: stats[name] for name in COUNTS if name in stats}
    return {
        "profile": simulation.profile.name,
        "num_devices": num_devices,
        "duration_s": stats["now_s"],
        **tally.figures(stats["now_s"], num_devices),
        **floors.figures(),
        **counts,
    }


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    for name, value in figures.items():
        if isinstance(value, float):
            value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        yield f"{name.replace('_', ' '):40} {value if isinstance(value, str) else f'{value:,}'}"
