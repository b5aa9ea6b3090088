# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Gated activation and addition in Triton. Knows no layers.

A program takes BLOCK features of one token; arithmetic is float32, rounding happens once.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.triton_launch import (
    expect_dtype,
    expect_rows,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen

_BLOCK = 1024


@triton.jit
def _silu_mul(x, out, size, x_token, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x[T, 2 * size], strided over tokens -> out[T, size]; program (token, block)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    pdl_wait(PDL)
    gate = tl.load(x + token * x_token + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + token * x_token + size + at, mask=mask, other=0.0).to(tl.float32)
    pdl_release(PDL)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * size + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add(x, y, out, size, x_token, y_token, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x, y [T, size], strided over tokens -> out[T, size]; program (token, block)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    pdl_wait(PDL)
    left = tl.load(x + token * x_token + at, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(y + token * y_token + at, mask=mask, other=0.0).to(tl.float32)
    pdl_release(PDL)
    tl.store(out + token * size + at, (left + right).to(out.dtype.element_ty), mask=mask)


def silu_mul(x: Tensor) -> Tensor:
    """x[T, 2I] -> [T, I]: silu(first half) * second half, rounded once."""
    expect_rows("silu_mul", x=x)
    tokens, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (tokens, triton.cdiv(size, _BLOCK))
        _silu_mul[grid](x, out, size, x.stride(0), BLOCK=_BLOCK, **pdl_options(x))
    return out


def add(x: Tensor, y: Tensor) -> Tensor:
    """x[T,D] + y[T,D], rounded once."""
    expect_rows("add", x=x, y=y)
    expect_dtype("add", x.dtype, y=y)
    tokens, size = x.shape
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (tokens, triton.cdiv(size, _BLOCK))
        _add[grid](x, y, out, size, x.stride(0), y.stride(0), BLOCK=_BLOCK, **pdl_options(x))
    return out


def specimens(arch: str) -> Iterator[Specimen]:
    """One form each: sizes are run-time arguments."""
    constants, options = specimen_pdl(arch)
    for name, kernel, pointers, strides in (
        ("silu_mul", _silu_mul, ("x", "out"), ("x_token",)),
        ("add", _add, ("x", "y", "out"), ("x_token", "y_token")),
    ):
        yield Specimen(
            name,
            kernel,
            {**dict.fromkeys(pointers, "*bf16"), **dict.fromkeys(("size", *strides), "i32:16")},
            {"BLOCK": _BLOCK, **constants},
            options=options,
            quick=True,
        )


register_triton("silu_mul", silu_mul)
register_triton("add", add)
