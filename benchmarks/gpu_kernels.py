# SPDX-License-Identifier: MIT
"""Every GPU kernel on this machine's GPU: right first, then how fast, beside other engines'.

One command: python benchmarks/gpu_kernels.py [--peers DIR] [--quick] [--only TEXT] [--output FILE].
Measures the roofs (a stream, a matrix product), compares every backend with the float64 reference,
then times: latent attention at agents' shapes against FlashMLA, FA3, FlashInfer and vLLM's Triton
where they are in DIR; and every other op at the sizes of real models. Times are replays of captured
graphs, cold and rotating, with all kernels of a call (main, merge, metadata) in them.
Knows no engine; without a GPU it says what is missing and ends with status 2.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu.machine import describe, lacks
from gpu.peers import Peer, load
from gpu.problem import MlaProblem, make
from gpu.report import Row, ratios, table, write
from gpu.shapes import MlaShape, Roofs, decode_shapes
from gpu.subjects import Sized, gpu_backends, mla_backends, sized_ops
from gpu.timing import cold_s, measure_roofs, rotating_s

from tokenspeed.kernels.cases.catalog import all_cases
from tokenspeed.kernels.cases.check import check

OP = "attention_mla"
MAX_ERROR = {"bfloat16": 1e-2, "float8": 1e-2}


def verify(only: str) -> list[str]:
    """What is wrong with our kernels on this device, against the float64 reference."""
    wrong = []
    for op, backend in gpu_backends():
        if only not in op or op not in all_cases():
            continue
        for dtype in all_cases()[op].tolerance:
            report = check(op, backend, dtype, device="cuda")
            print(f"  {op} {backend} {dtype}: {report.num_cases} cases, worst {report.worst:.2f}")
            if not report.passed:
                wrong.append(str(report))
    return wrong


def measure(calls: list[Callable[[], Any]], **labels: Any) -> Row:
    """Both times of a subject; what it raises stands in the row."""
    try:
        return Row(cold_us=cold_s(calls[0]) * 1e6, replay_us=rotating_s(calls) * 1e6, **labels)
    except Exception as error:  # a foreign kernel: whatever it raises is its own result
        torch.cuda.synchronize()
        return Row(**labels, problem=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")


def mla_rows(shape: MlaShape, subjects: list[Peer], roofs: Roofs) -> list[Row]:
    """One shape on every subject: first its error, then its times."""
    problem = make(shape, "cuda")
    truth = problem.truth()
    return [mla_row(problem, truth, subject, shape.floor_s(roofs) * 1e6) for subject in subjects]


def mla_row(problem: MlaProblem, truth: torch.Tensor, subject: Peer, floor_us: float) -> Row:
    labels: dict[str, Any] = {"op": OP, "shape": problem.shape.name, "subject": subject.name}
    refusal = subject.refusal(problem)
    if refusal is not None:
        return Row(**labels, problem=refusal)
    try:
        calls, plan_s = subject.prepare(problem)
        out = calls[0]().float()
        error = float((out.view_as(truth) - truth).norm() / truth.norm())
    except Exception as found:
        return Row(**labels, problem=f"{type(found).__name__}: {str(found).splitlines()[0][:120]}")
    labels |= {"error": error, "floor_us": floor_us, "host_plan_us": plan_s * 1e6}
    if not error <= MAX_ERROR[problem.shape.cache]:
        return Row(**labels, problem=f"wrong: error {error:.2e}")
    return measure(calls, **labels)


def op_rows(sized: Sized, roofs: Roofs) -> list[Row]:
    floor = max(sized.bytes / roofs.stream_bytes_s, sized.flops / roofs.matrix_flop_s) * 1e6
    labels = {"op": sized.op, "shape": sized.shape, "floor_us": floor}
    return [measure(calls, subject=name, **labels) for name, calls in sized.calls.items()]


def run(args: argparse.Namespace) -> int:
    machine = describe()
    print(json.dumps(machine))
    for reason in lacks():
        print(f"lacking: {reason}")
    peers, missing = load(args.peers)
    for name, reason in missing.items():
        print(f"peer left out: {name}: {reason}")
    if not torch.cuda.is_available():
        return 2
    roofs = measure_roofs()
    machine["peers_left_out"] = missing
    stream, matrix = roofs.stream_bytes_s / 1e12, roofs.matrix_flop_s / 1e12
    print(f"stream {stream:.2f} TB/s, matrix {matrix:.0f} TFLOP/s")
    wrong = verify(args.only)
    for report in wrong:
        print(report)
    rows: list[Row] = []
    subjects: list[Peer] = [*mla_backends(), *peers]
    for shape in decode_shapes(args.quick) if args.only in OP else ():
        rows += mla_rows(shape, subjects, roofs)
        torch.cuda.empty_cache()
    for sized in sized_ops(args.only):
        rows += op_rows(sized, roofs)
    print(table(rows))
    for peer in (p.name for p in peers):
        print(f"{peer} over gluon: {json.dumps(ratios(rows, 'gluon', peer))}")
    if args.output is not None:
        write(args.output, machine, roofs, rows)
    return 1 if wrong else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help="a folder with other engines' libraries")
    parser.add_argument("--quick", action="store_true", help="few shapes of latent attention")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--output", type=Path, help="a file for the figures, JSON")
    sys.exit(run(parser.parse_args()))


if __name__ == "__main__":
    main()
