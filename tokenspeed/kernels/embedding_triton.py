# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Rows of a table by id in Triton. Knows a slice of a vocabulary, no ranks."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.triton_launch import (
    expect_contiguous,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen

_BLOCK = 1024


@triton.jit
def _embedding(ids, weight, out, first, rows, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """ids[T], weight[rows, size] -> out[T, size]; program (token, block of features)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    pdl_wait(PDL)
    row = tl.load(ids + token).to(tl.int64) - first
    inside = (row >= 0) & (row < rows)
    value = tl.load(weight + row * size + at, mask=mask & inside, other=0.0)
    pdl_release(PDL)
    tl.store(out + token * size + at, value, mask=mask)


def embedding(ids: Tensor, weight: Tensor, first: int) -> Tensor:
    """ids[T] int64, weight[V,D] -> [T,D]: row ids - first; zeros outside [first, first + V)."""
    expect_contiguous("embedding", weight=weight)
    rows, size = weight.shape
    out = torch.empty((ids.shape[0], size), dtype=weight.dtype, device=weight.device)
    if out.numel():
        grid = (ids.shape[0], triton.cdiv(size, _BLOCK))
        _embedding[grid](ids, weight, out, first, rows, size, BLOCK=_BLOCK, **pdl_options(weight))
    return out


def specimens(arch: str) -> Iterator[Specimen]:
    """One form: sizes are run-time arguments."""
    constants, options = specimen_pdl(arch)
    yield Specimen(
        "embedding",
        _embedding,
        {
            "ids": "*i64",
            "weight": "*bf16",
            "out": "*bf16",
            "first": "i32",
            "rows": "i32",
            "size": "i32:16",
        },
        {"BLOCK": _BLOCK, **constants},
        options=options,
        quick=True,
    )


register_triton("embedding", embedding)
