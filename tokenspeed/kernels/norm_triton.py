# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""RMS norms in Triton. Knows no layers.

A program takes ROWS rows of D features, whole in registers; x may be [T, D] or heads [T, H, D],
strided over both. The sum of squares is float32, rounding happens once.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.triton_launch import (
    expect_contiguous,
    expect_dtype,
    expect_rows,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen

_TILE = 2048  # features that a program holds, if rows are shorter than that
_MAX_SIZE = 1 << 16


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x,
    residual,
    weight,
    out,
    total,
    num_rows,
    heads,
    x_token,
    x_head,
    residual_token,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x[num_rows / heads, heads, D] -> out[num_rows, D]; with residual: total = x + residual."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (at < D)[None, :]
    source = (row // heads) * x_token + (row % heads) * x_head
    target = row[:, None] * D + at[None, :]
    scale = tl.load(weight + at, mask=at < D, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    value = tl.load(x + source[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        added = tl.load(
            residual + row[:, None] * residual_token + at[None, :], mask=mask, other=0.0
        )
        rounded = (value + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + target, rounded, mask=mask)
        value = rounded.to(tl.float32)
    pdl_release(PDL)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    normed = value * inverse[:, None] * scale[None, :]
    tl.store(out + target, normed.to(out.dtype.element_ty), mask=mask)


def _shape(size: int) -> tuple[int, int, int]:
    """BLOCK, ROWS and warps for rows of this many features."""
    block = triton.next_power_of_2(size)
    rows = max(1, _TILE // block)
    return block, rows, min(16, max(4, block * rows // 1024))


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x {tuple(x.shape)} must be [T,D] or [T,H,D]")
    expect_rows(op, x=x)
    expect_contiguous(op, weight=weight)
    if x.shape[-1] > _MAX_SIZE:
        raise ValueError(f"{op}: {x.shape[-1]} features, at most {_MAX_SIZE}")


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    _check("rms_norm" if residual is None else "add_rms_norm", x, weight)
    size, heads = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    num_rows = x.shape[0] * heads
    if num_rows == 0:
        return out, total
    block, rows, warps = _shape(size)
    _rms_norm[(triton.cdiv(num_rows, rows),)](
        x,
        residual,
        weight,
        out,
        total,
        num_rows,
        heads,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        0 if residual is None else residual.stride(0),
        eps,
        D=size,
        BLOCK=block,
        ROWS=rows,
        num_warps=warps,
        **pdl_options(x),
    )
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x[T,D] or [T,H,D], weight[D] -> the same shape, contiguous."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [T,D], weight[D] -> (rms_norm(sum), sum), with sum = x + residual rounded."""
    expect_dtype("add_rms_norm", x.dtype, residual=residual)
    expect_rows("add_rms_norm", residual=residual)
    normed, total = _launch(x, residual, weight, eps)
    if total is None:
        raise AssertionError("a residual makes a sum")
    return normed, total


def specimens(arch: str) -> Iterator[Specimen]:
    """Hidden sizes of DeepSeek and Qwen models, a latent, and a head's norm."""
    constants, options = specimen_pdl(arch)
    shapes = {"num_rows": "i32", "heads": "i32", "x_token": "i32:16", "x_head": "i32:16"}
    for size, fused in ((128, False), (512, False), (2048, True), (7168, True)):
        block, rows, warps = _shape(size)
        pointers = ["x", "weight", "out", *(["residual", "total"] if fused else [])]
        absent = {} if fused else {"residual": None, "total": None}
        yield Specimen(
            f"{'add_' if fused else ''}rms_norm {size}",
            _rms_norm,
            {**dict.fromkeys(pointers, "*bf16"), **shapes, "residual_token": "i32", "eps": "fp32"},
            {**absent, "D": size, "BLOCK": block, "ROWS": rows, **constants},
            num_warps=warps,
            options=options,
            quick=fused,
        )


register_triton("rms_norm", rms_norm)
register_triton("add_rms_norm", add_rms_norm)
