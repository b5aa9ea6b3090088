# SPDX-License-Identifier: MIT
"""Compiles every Triton and Gluon kernel for every GPU target, without a GPU, and prints the table.

Knows no kernel: `tests/kernels/aot.py` finds, compiles and judges them. Exits with 1 on a fault.
Run: python benchmarks/kernel_targets.py [--arch ARCH]... [--only TEXT] [--save FILE].
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.kernels.aot import compile_elsewhere  # noqa: E402
from tokenspeed.kernels.triton_targets import TARGETS  # noqa: E402

COLUMNS = {
    "registers": "regs",
    "shared_bytes": "shared",
    "spill_bytes": "spilt",
    "matrix": "matrix",
    "num_warps": "warps",
    "seconds": "s",
}


def table(reports: list[dict[str, Any]]) -> str:
    """A line for each kernel and target."""
    width = max((len(report["name"]) for report in reports), default=4)
    head = "  ".join(f"{title:>7}" for title in COLUMNS.values())
    lines = [f"{'kernel':<{width}}  {'target':<7}  {head}  faults"]
    for report in reports:
        cells = "  ".join(f"{report[key]:>7}" for key in COLUMNS)
        faults = "; ".join(report["faults"]) or "-"
        lines.append(f"{report['name']:<{width}}  {report['arch']:<7}  {cells}  {faults}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", choices=list(TARGETS))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--save", type=Path, help="write the reports as JSON too")
    asked = parser.parse_args()
    arguments = [text for arch in asked.arch or () for text in ("--arch", arch)]
    reports = compile_elsewhere(*arguments, "--only", asked.only)
    reports.sort(key=lambda report: (report["name"], report["arch"]))
    print(table(reports))
    faulty = [report for report in reports if report["faults"]]
    version = importlib.metadata.version("triton")
    print(f"{len(reports)} compiled by triton {version}, {len(faulty)} with faults")
    if asked.save:
        lines = ",\n  ".join(json.dumps(report) for report in reports)
        asked.save.write_text(f'{{"triton": "{version}", "reports": [\n  {lines}\n]}}\n')
    sys.exit(bool(faulty))


if __name__ == "__main__":
    main()
