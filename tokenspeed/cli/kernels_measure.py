# SPDX-License-Identifier: MIT
"""What `tokenspeed kernels verify`, `bench` and `tune` do and print. Knows no op by name."""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenspeed.kernels.backend import Ask
    from tokenspeed.kernels.cases.check import Report
    from tokenspeed.kernels.timing import Timing

QUICK_TOKENS, QUICK_SECONDS = (1, 16, 256), 0.05


def verify(args: argparse.Namespace) -> int:
    """1 if any case fails."""
    from tokenspeed.kernels.cases import all_cases, check
    from tokenspeed.kernels.cases.check import Truths
    from tokenspeed.kernels.device import this_machine
    from tokenspeed.kernels.registry import REGISTRY

    _check_choice(args)
    this_machine(args.device)  # refuses a device that is not here
    reports: list[Report] = []
    print(
        f"{'op':28}{'backend':14}{'dtype':10}{'cases':>6}{'refused':>8}{'failed':>7}  worst error"
    )
    for op, cases in sorted(all_cases().items()):
        if (args.op and op not in args.op) or op not in REGISTRY.ops:
            continue
        for dtype in cases.tolerance:
            truths: Truths = {}
            for backend in REGISTRY.of(op):
                if args.backend and backend.name not in args.backend:
                    continue
                if args.dtype and str(dtype).removeprefix("torch.") not in args.dtype:
                    continue
                report = check(
                    op, backend.name, dtype, device=args.device, full=args.full, truths=truths
                )
                if report.num_cases:
                    reports.append(report)
                    _print_report(report, args.failures)
    failed = [r for r in reports if not r.passed]
    cases_run = sum(r.num_cases for r in reports)
    print(f"{cases_run} cases of {len(reports)} kernels; {len(failed)} kernels fail")
    if not reports:
        raise ValueError("verify: no backend serves anything of that choice")
    return 1 if failed else 0


def _print_report(report: "Report", failures: bool) -> None:
    dtype = str(report.dtype).removeprefix("torch.")
    worst = f"{report.worst:8.3f} of the tolerance ({report.worst_case})"
    print(
        f"{report.op:28}{report.backend:14}{dtype:10}{report.num_cases:6}{report.num_refused:8}"
        f"{len(report.failures):7}  {worst}"
    )
    for failure in report.failures if failures else report.failures[:1]:
        print(f"    {failure}")


def _check_choice(args: argparse.Namespace) -> None:
    """`ValueError`: an op or a backend that does not exist."""
    from tokenspeed.kernels.registry import REGISTRY

    REGISTRY.load()
    for op in args.op:
        REGISTRY.of(op)
    names = {b.name for op in args.op or REGISTRY.ops for b in REGISTRY.of(op)}
    for backend in getattr(args, "backend", ()):
        if backend not in names:
            raise ValueError(f"no backend {backend!r}; known: {', '.join(sorted(names))}")


def _asks(args: argparse.Namespace) -> Iterator["Ask"]:
    """What the examples or a model ask for, each once."""
    from tokenspeed.cli.kernels_explain import model_asks
    from tokenspeed.kernels.tune import example_asks

    if args.model is None:
        yield from example_asks(args.device, args.op)
        return
    seen = set()
    for _, asked in model_asks(args.model):
        for _, ask in asked:
            key = ask.op, ask.dtype, tuple(sorted(ask.shapes.items()))
            if key not in seen and (not args.op or ask.op in args.op):
                seen.add(key)
                yield dataclasses.replace(ask, device=args.device, arch="")


def bench(args: argparse.Namespace) -> int:
    from tokenspeed.kernels.tune import BUCKETS, time_asks

    _check_choice(args)
    timings = time_asks(_asks(args), _tokens(args) or BUCKETS, args.seconds, args.backend)
    if args.json:
        print(json.dumps([_values(timing) for timing in timings], indent=1))
        return 0
    print(HEAD)
    for timing in timings:
        _print_timing(timing)
    return 0


HEAD = (
    f"{'op':18}{'sizes':40}{'T':>5} {'backend':12}{'us':>10}{'ratio':>8}{'GB/s':>8}{'GFLOP/s':>9}"
)


def _print_timing(timing: "Timing") -> None:
    """A line a backend; ratio: the reference's time over the backend's."""
    sizes = " ".join(f"{name}={size}" for name, size in sorted(timing.ask.shapes.items()))
    for backend, us in timing.us.items():
        reference = timing.us.get("reference")
        ratio = "" if reference is None else f"{reference / us:.2f}"
        moved, computed = timing.rate(backend)
        print(
            f"{timing.ask.op:18}{sizes:40}{timing.tokens:5} {backend:12}{us:10.1f}{ratio:>8}"
            f"{moved:8.1f}{computed:9.1f}",
            flush=True,
        )


def _values(timing: "Timing") -> dict[str, object]:
    return {
        "op": timing.ask.op,
        "dtype": str(timing.ask.dtype).removeprefix("torch."),
        "shapes": dict(timing.ask.shapes),
        "tokens": timing.tokens,
        "us": {name: round(us, 2) for name, us in timing.us.items()},
        "gb_per_s": {name: round(timing.rate(name)[0], 2) for name in timing.us},
        "gflop_per_s": {name: round(timing.rate(name)[1], 2) for name in timing.us},
    }


def _tokens(args: argparse.Namespace) -> Sequence[int]:
    if args.tokens and min(args.tokens) < 1:
        raise ValueError(f"--tokens must be at least 1: {min(args.tokens)}")
    if not 0 < args.seconds <= 3600:
        raise ValueError(f"--seconds must be above 0: {args.seconds}")
    return tuple(sorted(set(args.tokens or ())))


def tune_table(args: argparse.Namespace) -> int:
    from tokenspeed.kernels.device import this_machine
    from tokenspeed.kernels.table_files import TableFile, file_name, user_folder
    from tokenspeed.kernels.tune import BUCKETS, tune

    _check_choice(args)
    machine = this_machine(args.device)
    path = args.output or user_folder() / file_name(machine)
    print(f"{machine.name}, {machine.arch}: {machine.versions}\n{HEAD}")
    table = tune(
        _asks(args),
        machine,
        buckets=_tokens(args) or (QUICK_TOKENS if args.quick else BUCKETS),
        seconds=min(args.seconds, QUICK_SECONDS) if args.quick else args.seconds,
        tell=_print_timing,
    )
    if not table.rows:
        raise ValueError("tune: no backend beside the reference serves any of that")
    if path.exists():  # rows of earlier runs on the same versions stay
        before = TableFile.read(path)
        if before.machine == machine:
            table = TableFile(machine, before.rows | table.rows)
    table.save(path)
    print(f"{len(table.rows)} rows in {path}")
    return 0
