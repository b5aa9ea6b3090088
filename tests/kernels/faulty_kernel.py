# SPDX-License-Identifier: MIT
"""Specimens with known faults, so that the harness is seen to find them."""

from collections.abc import Iterator

import triton
import triton.language as tl

from tokenspeed.kernels.triton_targets import Specimen


@triton.jit
def _matmul(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for _ in range(4):
        left = tl.load(a + m[:, None] * K + k[None, :])
        total = tl.dot(left, tl.load(b + k[:, None] * N + n[None, :]), total)
        a += M * K
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def _copy(a, c, M: tl.constexpr):
    tl.store(c + tl.arange(0, M), tl.load(a + tl.arange(0, M)))


def specimens(arch: str) -> Iterator[Specimen]:
    pointers = {"a": "*bf16", "b": "*bf16", "c": "*fp32"}
    sizes = {"M": 128, "N": 256, "K": 64}
    yield Specimen("spills", _matmul, pointers, {**sizes, "N": 512}, num_warps=4)
    large = {**sizes, "N": 128, "K": 256}
    yield Specimen("too much shared memory", _matmul, pointers, large, num_warps=8)
    copied = {"a": "*fp32", "c": "*fp32"}
    wanted = {"matrix": True, "must": ("MUFU.SIN",), "never": ("LDG",)}
    yield Specimen("no matrix product", _copy, copied, {"M": 256}, **wanted)
    yield Specimen("a misspelt argument", _copy, copied, {"SIZE": 256})
    small = {"M": 64, "N": 64, "K": 64}
    yield Specimen("nothing wrong", _matmul, pointers, small, matrix=True)
