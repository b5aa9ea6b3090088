# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The matrix product all Triton layers share: weights as the rows (M), tokens as the columns (N).

    acc[rows, tokens] += weight[rows, begin:end] @ x[tokens, begin:end].T

Few tokens then pad to 16 columns, where the other orientation pads to 64 rows. Each column's sum
runs over K in blocks of BLOCK_K, in order, so it depends on no other column. Also chooses the
shapes of tiles. Refuses to know where rows and tokens come from.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.quant import QuantWeight

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_RAW = (torch.float8_e4m3fn,)  # passed as bytes: some devices lack the type
SMALL, MEDIUM = 16, 64  # most tokens of the paths of few tokens; results may differ between paths


@triton.jit
def _float8(bits):
    """e4m3 codes (uint8) -> float32: moved into its fields, the exponent put right."""
    wide = bits.to(tl.int32)
    return (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _float4(bits):
    """e2m1 codes (0 to 15) -> float32."""
    wide = bits.to(tl.int32)
    return (((wide & 8) << 28) | ((wide & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def _values(codes, FORMAT: tl.constexpr):
    """Codes [M, K], or [M, K / 2] of 4 bits, the even input in the low half -> float32 [M, K]."""
    if FORMAT == "int8":
        values = codes.to(tl.float32)
    elif FORMAT == "fp8":
        values = _float8(codes)
    else:
        both = tl.join(codes & 15, codes >> 4)
        halves = tl.reshape(both, [codes.shape[0], 2 * codes.shape[1]])
        if FORMAT == "int4":
            values = halves.to(tl.float32) - 8.0
        else:
            values = _float4(halves)
    return values


@triton.jit
def _steps(raw, FORMAT: tl.constexpr):
    """Scales as stored -> float32."""
    if FORMAT == "mxfp4":
        steps = (raw.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif FORMAT == "nvfp4":
        steps = _float8(raw)
    else:
        steps = raw.to(tl.float32)
    return steps


@triton.jit
def _add_quantised(
    acc,
    codes,
    scales,
    right,
    k,
    size,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """acc plus one block's product: scaled after it if a row has one scale there, else before."""
    values = _values(codes, FORMAT)
    if GROUP >= BLOCK_K:
        step = _steps(tl.load(scales + k // GROUP), FORMAT)
        part = tl.dot(values.to(right.dtype), tl.trans(right), input_precision="ieee")
        acc += part * step[:, None]
    else:
        group = k // GROUP + tl.arange(0, BLOCK_K // GROUP)
        if EVEN:
            raw = tl.load(scales[:, None] + group[None, :])
        else:
            raw = tl.load(scales[:, None] + group[None, :], mask=(group * GROUP < size)[None, :])
        apart = tl.reshape(values, [values.shape[0], BLOCK_K // GROUP, GROUP])
        apart = apart * _steps(raw, FORMAT)[:, :, None]
        values = tl.reshape(apart, [values.shape[0], BLOCK_K])
        acc = tl.dot(values.to(right.dtype), tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def product(
    acc,
    weight,
    scales,
    x,
    begin,
    end,
    size,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """weight, scales: pointers to the starts of rows [M]; x: to those of tokens [N]; acc[M, N].

    `size` is the length of both; EVEN says that BLOCK_K divides it. FORMAT is "dense" or one of
    kernels/quant.py, GROUP the inputs that share a scale.
    """
    PER_BYTE: tl.constexpr = 1 if FORMAT == "dense" or FORMAT == "int8" or FORMAT == "fp8" else 2
    at = tl.arange(0, BLOCK_K)
    packed = tl.arange(0, BLOCK_K // PER_BYTE)
    for k in tl.range(begin, end, BLOCK_K):
        rows, tokens = (
            weight[:, None] + (k // PER_BYTE + packed)[None, :],
            x[:, None] + (k + at)[None, :],
        )
        if EVEN:
            left, right = tl.load(rows), tl.load(tokens)
        else:
            inside = (k // PER_BYTE + packed) < (size // PER_BYTE)
            left = tl.load(rows, mask=inside[None, :], other=0)
            right = tl.load(tokens, mask=((k + at) < size)[None, :], other=0.0)
        right = right.to(COMPUTE)
        if FORMAT == "dense":
            acc = tl.dot(left.to(COMPUTE), tl.trans(right), acc, input_precision="ieee")
        else:
            acc = _add_quantised(acc, left, scales, right, k, size, BLOCK_K, FORMAT, GROUP, EVEN)
    return acc


@triton.jit
def grouped_order(program, num_rows, num_columns, GROUP: tl.constexpr):
    """(row, column) of a grid in bands of GROUP rows, so that neighbours share operands in L2."""
    band = program // (GROUP * num_columns)
    first = band * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    inside = program % (GROUP * num_columns)
    return first + inside % height, inside // height


@dataclass(frozen=True)
class Tile:
    """Rows of the weight, tokens and depth of a program's tile; programs that share a sum."""

    rows: int
    tokens: int
    depth: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Operand:
    """A weight as kernels take it: memory, and what must be known when they are compiled."""

    codes: Tensor  # [..., N, D], or [..., N, D / 2]
    scales: Tensor | None
    shape: tuple[int, ...]  # [..., N, D]
    form: str = "dense"
    group: int = 1
    overall: float = 1.0

    @property
    def code_row(self) -> int:
        """Elements from a row's codes to the next one's."""
        return self.codes.shape[-1]

    @property
    def scale_row(self) -> int:
        return 0 if self.scales is None else self.scales.shape[-1]


def operand(op: str, name: str, weight: Tensor | QuantWeight) -> Operand:
    """`ValueError`: a dtype or a layout that no kernel takes."""
    if isinstance(weight, Tensor):
        if weight.dtype not in ELEMENTS:
            raise ValueError(f"{op}: {name} is {weight.dtype}; takes {list(ELEMENTS)}")
        if not weight.is_contiguous():
            raise ValueError(f"{op}: {name} {tuple(weight.shape)} is not contiguous")
        return Operand(weight, None, tuple(weight.shape))
    codes, scales = weight.codes, weight.scales
    if not codes.is_contiguous() or not scales.is_contiguous():
        raise ValueError(f"{op}: codes and scales of {name} must be contiguous")
    if weight.group & (weight.group - 1) or weight.group < 16:
        raise ValueError(f"{op}: groups of {weight.group} in {name}; takes powers of 2 from 16 on")
    codes, scales = (t.view(torch.uint8) if t.dtype in _RAW else t for t in (codes, scales))
    return Operand(codes, scales, weight.shape, weight.format, weight.group, weight.overall)


def form_constants(weight: Operand, size: int, depth: int, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `product`."""
    return {
        "BLOCK_K": depth,
        "COMPUTE": ELEMENTS[dtype],
        "EVEN": size % depth == 0,
        "FORMAT": weight.form,
        "GROUP": weight.group,
    }


def _launch(arch: str, rows: int, stages: int) -> tuple[int, int]:
    """Warps and stages of a tile. Hopper's matrix unit wants 4 warps for 64 rows."""
    warps = {16: 2, 32: 4, 64: 8 if arch == "sm_120" else 4}.get(rows, 8)
    return warps, 2 if arch.startswith("gfx") else stages


@cache
def tile_for(
    arch: str, units: int, tokens: int, outputs: int, size: int, itemsize: int, copies: int = 1
) -> Tile:
    """The tile for `copies` products of outputs x size weights with this many tokens.

    `itemsize`: bytes of an element as it is multiplied. Within a path (up to 16 tokens, 17 to 64,
    more) depth and splits do not depend on `tokens`.
    """
    if tokens > MEDIUM:
        wide = triton.cdiv(outputs, 128) * triton.cdiv(tokens, 128) * copies >= units // 2
        rows = 128 if wide else 64
        return Tile(rows, rows, 128 // itemsize, 1, *_launch(arch, rows, 3))
    rows = 64
    if tokens <= SMALL:
        while rows > 16 and triton.cdiv(outputs, rows) * copies < units:
            rows //= 2
    longest = max(16, triton.next_power_of_2(size))
    depth, splits = min((256 if rows == 64 else 512) // itemsize, longest), 1
    programs = triton.cdiv(outputs, rows) * copies
    while splits < 16 and 4 * programs * splits <= 3 * units and size >= 8 * depth * splits:
        splits *= 2
    columns = SMALL if tokens <= SMALL else max(32, triton.next_power_of_2(tokens))
    return Tile(rows, columns, depth, splits, *_launch(arch, rows, 4 - columns // 64))


def quantised(tile: Tile, weight: Operand) -> Tile:
    """The tile for a weight's format: scales of 128 inputs need blocks that are not longer."""
    if weight.form == "dense":
        return tile
    return replace(tile, depth=max(32, min(tile.depth, 128)))
