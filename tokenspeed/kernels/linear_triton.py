# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Matrix products with a weight in Triton: dense, quantised, and one a head. Knows no layers.

A program makes a tile of outputs of some tokens, over all inputs or, where the tiles are too few
for the device, over a part of them; a second pass then adds the parts in order. Up to 16 tokens,
17 to 64 and more are three paths; within a path a token's result does not depend on the others.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.quant import QuantWeight
from tokenspeed.kernels.triton_launch import (
    WIDE_TYPES,
    arch_at,
    num_units,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_product import (
    ELEMENTS,
    Operand,
    Tile,
    form_constants,
    grouped_order,
    operand,
    product,
    quantised,
    tile_for,
)
from tokenspeed.kernels.triton_targets import Specimen

_SUM_BLOCK = 512
_BAND = 8  # tiles of outputs that share tokens in L2


@triton.jit
def _linear(
    x,
    weight,
    scales,
    bias,
    out,
    overall,
    num_tokens,
    num_outputs,
    size,
    code_row,
    scale_row,
    x_token,
    x_head,
    out_token,
    out_split,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """x[T, H, size], weight[H, N, size], bias[N] or None -> out[SPLITS, T, H, N].

    Scales are None for dense weights, and there is one head for others. Program (tile, head,
    split). Rows and tokens past the ends repeat the last ones, unstored.
    """
    blocks_n, blocks_t = tl.cdiv(num_outputs, BLOCK_N), tl.cdiv(num_tokens, BLOCK_T)
    block_n, block_t = grouped_order(tl.program_id(0), blocks_n, blocks_t, BAND)
    head, split = tl.program_id(1), tl.program_id(2)
    row = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tl.minimum(row, num_outputs - 1)
    weight += (head * num_outputs + inside).to(tl.int64) * code_row
    if FORMAT == "fp8":
        scales += (inside // 128) * scale_row
    elif FORMAT != "dense":
        scales += inside.to(tl.int64) * scale_row
    x += tl.minimum(token, num_tokens - 1).to(tl.int64) * x_token + head * x_head
    span = tl.cdiv(tl.cdiv(size, BLOCK_K), SPLITS) * BLOCK_K
    begin = split * span
    end = tl.minimum(begin + span, size)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    pdl_wait(PDL)
    acc = product(acc, weight, scales, x, begin, end, size, BLOCK_K, COMPUTE, EVEN, FORMAT, GROUP)
    pdl_release(PDL)
    if FORMAT == "nvfp4":
        acc *= overall
    if bias is not None:
        acc += tl.load(bias + inside).to(tl.float32)[:, None]
    out += split.to(tl.int64) * out_split + token.to(tl.int64)[None, :] * out_token
    mask = (row < num_outputs)[:, None] & (token < num_tokens)[None, :]
    at = out + (head * num_outputs + row)[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_splits(
    parts, bias, out, width, part, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """parts[SPLITS, T, width] float32 -> out[T, width], added in order; program (token, block)."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    start = tl.program_id(0).to(tl.int64) * width
    pdl_wait(PDL)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        acc += tl.load(parts + split * part + start + at, mask=mask, other=0.0)
    pdl_release(PDL)
    if bias is not None:
        acc += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + at, acc.to(out.dtype.element_ty), mask=mask)


def _constants(tile: Tile, weight: Operand, size: int, dtype: torch.dtype) -> dict[str, Any]:
    blocks = {"SPLITS": tile.splits, "BLOCK_N": tile.rows, "BLOCK_T": tile.tokens, "BAND": _BAND}
    return blocks | form_constants(weight, size, tile.depth, dtype)


def _multiply(x: Tensor, weight: Operand, bias: Tensor | None, out: Tensor) -> Tensor:
    """x[T,H,D], weight[H,N,D] or [N,D], bias[N] or None -> out[T,H,N], contiguous."""
    tokens, heads, size = x.shape
    outputs = weight.shape[-2]
    if out.numel() == 0:
        return out
    dense = weight.form == "dense"
    dtype = torch.promote_types(x.dtype, weight.codes.dtype) if dense else x.dtype
    tile = quantised(
        tile_for(arch_at(x), num_units(x), tokens, outputs, size, dtype.itemsize, heads), weight
    )
    width, split = heads * outputs, tile.splits > 1
    grid = (triton.cdiv(outputs, tile.rows) * triton.cdiv(tokens, tile.tokens), heads, tile.splits)
    shape = (tile.splits, tokens, width)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device) if split else out
    _linear[grid](
        *(x, weight.codes, weight.scales, None if split else bias, parts),
        *(weight.overall, tokens, outputs, size, weight.code_row, weight.scale_row),
        *(x.stride(0), x.stride(1), width, tokens * width),
        **_constants(tile, weight, size, dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **pdl_options(x),
    )
    if split:
        _add_splits[(tokens, triton.cdiv(width, _SUM_BLOCK))](
            *(parts, bias, out, width, tokens * width),
            SPLITS=tile.splits,
            BLOCK=_SUM_BLOCK,
            **pdl_options(x),
        )
    return out


def _check(op: str, x: Tensor, weight: Operand, bias: Tensor | None) -> None:
    if x.dim() != len(weight.shape) or x.shape[-1] != weight.shape[-1] or x.stride(-1) != 1:
        raise ValueError(f"{op}: x {tuple(x.shape)} does not fit weight {weight.shape}")
    if x.dtype not in ELEMENTS:
        raise ValueError(f"{op}: x is {x.dtype}; takes {list(ELEMENTS)}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        raise ValueError(f"{op}: bias {tuple(bias.shape)} is not [{weight.shape[0]}]")


def _linear_of(
    op: str, x: Tensor, weight: Tensor | QuantWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    held = operand(op, "weight", weight)
    if x.dim() != 2:
        raise ValueError(f"{op}: x {tuple(x.shape)} must be [T,D]")
    _check(op, x, held, bias)
    out = torch.empty((x.shape[0], 1, held.shape[0]), dtype=dtype, device=x.device)
    return _multiply(x.unsqueeze(1), held, bias, out).squeeze(1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """x[T,D], weight[N,D], bias[N] or None -> [T,N] in the wider dtype of x and weight.

    `wide`: in float32. Sums are float32, rounded once.
    """
    dtype = torch.float32 if wide else torch.promote_types(x.dtype, weight.dtype)
    return _linear_of("linear", x, weight, bias, dtype)


def linear_quant(
    x: Tensor, weight: QuantWeight, bias: Tensor | None = None, wide: bool = False
) -> Tensor:
    """As `linear`, with a quantised weight, widened to x's dtype on its way to the product.

    Codes are exact in bfloat16; where groups are shorter than 64 inputs, code * scale is rounded to
    x's dtype (exact for mxfp4 and nvfp4).
    """
    return _linear_of("linear_quant", x, weight, bias, torch.float32 if wide else x.dtype)


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x[T,H,D], strided over tokens and heads, weight[H,N,D] -> [T,H,N]."""
    held = operand("head_linear", "weight", weight)
    if x.dim() != 3 or weight.dim() != 3 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"head_linear: x {tuple(x.shape)} does not fit weight {held.shape}")
    _check("head_linear", x, held, None)
    tokens, heads, _ = x.shape
    out = torch.empty((tokens, heads, weight.shape[1]), dtype=x.dtype, device=x.device)
    return _multiply(x, held, None, out)


_SHAPES = (
    # tokens, heads, inputs, outputs: MLA's projections, W_UK, W_UV, the logits
    (1, 1, 2048, 3648),
    (1, 1, 2048, 2048),
    (64, 1, 2048, 3648),
    (64, 1, 7168, 256),
    (8192, 1, 2048, 3648),
    (16, 16, 128, 512),
    (512, 16, 512, 128),
    (8, 1, 2048, 102400),
)
_QUANTISED = (
    # format, group, type of codes, type of scales
    ("int8", 32, "*i8", "*bf16"),
    ("int4", 32, "*u8", "*bf16"),
    ("int4", 128, "*u8", "*bf16"),
    ("fp8", 128, "*u8", "*fp32"),
    ("mxfp4", 32, "*u8", "*u8"),
    ("nvfp4", 16, "*u8", "*u8"),
)
_STRIDES = ("num_outputs", "size", "code_row", "x_token", "x_head", "out_token", "out_split")


def specimens(arch: str) -> Iterator[Specimen]:
    """Shapes of DeepSeek V2 and V3 on a device of 132 units; every format."""
    dense = Operand(torch.empty(0), None, ())
    for tokens, heads, size, outputs in _SHAPES:
        tile = tile_for(arch, 132, tokens, outputs, size, 2, heads)
        name = f"linear T={tokens} {heads}x{outputs}x{size}"
        yield _specimen(
            name, arch, tile, dense, size, ("*bf16", None), (tokens, outputs) == (64, 3648)
        )
    for form, group, codes, scales in _QUANTISED:
        held = Operand(torch.empty(0), None, (), form, group)
        for tokens in (8, 8192):
            tile = quantised(tile_for(arch, 132, tokens, 4096, 4096, 2), held)
            name = f"linear_quant T={tokens} {form} of {group}"
            quick = tokens == 8 and form == "fp8"
            yield _specimen(name, arch, tile, held, 4096, (codes, scales), quick)
    constants, options = specimen_pdl(arch)
    yield Specimen(
        "linear's parts added",
        _add_splits,
        {"parts": "*fp32", "bias": "*bf16", "out": "*bf16", "width": "i32:16", "part": "i32:16"},
        {"SPLITS": 8, "BLOCK": _SUM_BLOCK, **constants},
        options=options,
    )


def _specimen(
    name: str,
    arch: str,
    tile: Tile,
    weight: Operand,
    size: int,
    types: tuple[str, str | None],
    quick: bool,
) -> Specimen:
    constants, options = specimen_pdl(arch)
    codes, scales = types
    pointers = {"x": "*bf16", "weight": codes, "out": "*fp32" if tile.splits > 1 else "*bf16"}
    absent: dict[str, None] = {"bias": None}
    if scales is None:
        absent["scales"] = None
    else:
        pointers["scales"] = scales
    numbers = {"overall": "fp32", "num_tokens": "i32", "scale_row": "i32"}
    return Specimen(
        name,
        _linear,
        {**pointers, **numbers, **dict.fromkeys(_STRIDES, "i32:16")},
        {**absent, **_constants(tile, weight, size, torch.bfloat16), **constants},
        num_warps=tile.warps,
        num_stages=tile.stages,
        options=options,
        matrix=tile.rows >= 64,
        quick=quick,
    )


register_triton("linear", linear, WIDE_TYPES)
register_triton("linear_quant", linear_quant, WIDE_TYPES)
register_triton("head_linear", head_linear, WIDE_TYPES)
