# SPDX-License-Identifier: MIT
"""What this machine can do with so many threads: bytes read a second, products of matrices.

    measure_roofs.py THREADS -> one line of JSON: read_gb_s, bf16_tflop_s, int8_top_s

The best of repeated runs counts: a roof is what nothing disturbs.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 30
SIZES = ((2048, 4096, 4096), (512, 1024, 6144), (4096, 4096, 4096))  # rows, inner, columns


def best(run: Callable[[], object], repeats: int) -> float:
    """The shortest of `repeats` runs after one that warms up, in seconds."""
    run()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def read_gb_s() -> float:
    x = torch.ones(READ_BYTES // 4)
    runs: tuple[Callable[[], object], ...] = (x.sum, x.max, x.view(torch.int64).sum)
    return max(x.nbytes / best(run, 5) / 1e9 for run in runs)


def bf16_tflop_s() -> float:
    found = []
    for rows, inner, columns in SIZES:
        a, b = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
        seconds = best(lambda a=a, b=b: torch.nn.functional.linear(a, b), 5)  # type: ignore[misc]
        found.append(2 * rows * inner * columns / seconds / 1e12)
    return max(found)


def int8_top_s() -> float:
    found = []
    for rows, inner, columns in SIZES:
        a = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
        b = torch.randint(-127, 128, (inner, columns), dtype=torch.int8)
        seconds = best(lambda a=a, b=b: torch._int_mm(a, b), 3)  # type: ignore[misc]
        found.append(2 * rows * inner * columns / seconds / 1e12)
    return max(found)


def main(threads: str) -> None:
    torch.set_num_threads(int(threads))
    roofs = {"read_gb_s": read_gb_s(), "bf16_tflop_s": bf16_tflop_s(), "int8_top_s": int8_top_s()}
    print(json.dumps({name: round(value, 4) for name, value in roofs.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
