# SPDX-License-Identifier: MIT
"""Quantised weights: formats, how they lie in memory, and exact conversions. Knows no kernel.

A weight [..., out, in] becomes `codes` and `scales`; its value is code * scale. Codes of 4 bits lie
two in a byte, the even input in the low half.

| format | codes | scales |
|---|---|---|
| int8 | int8 [..., out, in] | bfloat16 [..., out, in / group] |
| int4 | uint8 [..., out, in / 2], code + 8 | bfloat16 [..., out, in / group] |
| fp8 | float8_e4m3fn [..., out, in] | float32 [..., ceil(out / 128), ceil(in / 128)] |
| mxfp4 | uint8 [..., out, in / 2], e2m1 | uint8 [..., out, in / 32]: 2^(scale - 127) |
| nvfp4 | uint8 [..., out, in / 2], e2m1 | float8_e4m3fn [..., out, in / 16], times `overall` |

Sources: arXiv:2412.19437, section 3.3 (fp8); OCP Microscaling Formats 1.0 (mxfp4).
"""

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenspeed.kernels.registry import define, select

QuantFormat = Literal["int8", "int4", "fp8", "mxfp4", "nvfp4"]
FORMATS: tuple[QuantFormat, ...] = get_args(QuantFormat)
FP8_BLOCK = 128
GROUPS = {"mxfp4": 32, "nvfp4": 16}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model shall be held. `group` counts for int8 and int4 only."""

    format: QuantFormat
    group: int = 32


@dataclass(frozen=True)
class QuantWeight:
    """Codes and scales of a weight; see the module's table. `group`: inputs that share a scale."""

    format: QuantFormat
    codes: Tensor
    scales: Tensor
    group: int
    overall: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: [out, in] or [count, out, in]."""
        per_byte = 2 if self.format in ("int4", "mxfp4", "nvfp4") else 1
        return (*self.codes.shape[:-1], self.codes.shape[-1] * per_byte)

    def to(self, device: torch.device) -> "QuantWeight":
        """The same weight on another device."""
        codes, scales = self.codes.to(device), self.scales.to(device)
        return QuantWeight(self.format, codes, scales, self.group, self.overall)


def group_of(form: QuantFormat, asked: int) -> int:
    """Inputs that share a scale: as asked for int8 and int4, fixed for the others."""
    return asked if form in ("int8", "int4") else GROUPS.get(form, FP8_BLOCK)


def quantize(weight: Tensor, form: QuantFormat, group: int = 32) -> QuantWeight:
    """weight [..., out, in] of any float dtype -> its codes.

    `ValueError`: `in` is not a multiple of the group.
    """
    group = group_of(form, group)
    if form != "fp8" and weight.shape[-1] % group:
        raise ValueError(
            f"{form} weights: {weight.shape[-1]} inputs are no multiple of the group of {group}"
        )
    if form in ("int8", "int4"):
        dtype = weight.dtype if weight.dtype == torch.bfloat16 else torch.float32
        kernel = select("quantize", device=weight.device, dtype=dtype, group=group)
        codes, scales = kernel(weight.to(dtype).contiguous(), 8 if form == "int8" else 4, group)
        return QuantWeight(form, codes, scales, group)
    if form == "fp8":
        return _quantize_fp8(weight)
    return _quantize_e2m1(weight, form, group)


def dequantize(weight: QuantWeight) -> Tensor:
    """The values, float32 [..., out, in]."""
    codes = weight.codes
    if weight.format == "fp8":
        out, inputs = codes.shape[-2:]
        spread = weight.scales.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
        return codes.float() * spread[..., :out, :inputs]
    if weight.format == "int8":
        values = codes.float()
    else:
        halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        values = halves.float() - 8 if weight.format == "int4" else _e2m1(halves)
    scales = weight.scales
    if weight.format == "mxfp4":
        scales = torch.exp2(scales.float() - 127)
    scales = scales.float() * weight.overall
    return (_grouped(values, weight.group) * scales.unsqueeze(-1)).flatten(-2)


def quantize_groups(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """weight [..., out, in] -> codes, scales of int8 (bits 8) or int4 (bits 4).

    int8: the scale is the largest magnitude / 127, rounded up to bfloat16. int4: among twelve
    scales, which map the largest magnitude to -6.5 ... -9.25, that of least squared error.
    """
    grouped = _grouped(weight.float(), group)
    if bits == 8:
        exact = grouped.abs().amax(-1) / 127
        scales = ((exact.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
        codes = grouped * _inverse(scales.float()).unsqueeze(-1)
        return codes.round().to(torch.int8).flatten(-2), scales
    top = grouped.abs().amax(-1)
    sign = torch.where(grouped.amax(-1).clamp(min=0) > (-grouped).amax(-1).clamp(min=0), -1.0, 1.0)
    best = torch.full_like(top, torch.inf)
    scales = torch.zeros_like(top, dtype=torch.bfloat16)
    for tried in range(12):
        candidate = (sign * top / (6.5 + 0.25 * tried)).to(torch.bfloat16)
        step = candidate.float().unsqueeze(-1)
        error = (_int4(grouped, step) * step - grouped).square().sum(-1)
        scales = torch.where(error < best, candidate, scales)
        best = torch.minimum(error, best)
    codes = (_int4(grouped, scales.float().unsqueeze(-1)) + 8).to(torch.uint8).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def _grouped(x: Tensor, group: int) -> Tensor:
    """[..., in] -> [..., in / group, group]"""
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step != 0, 1 / step, 0.0)


def _int4(x: Tensor, step: Tensor) -> Tensor:
    return (x * _inverse(step)).round().clamp(-8, 7)


def _quantize_fp8(weight: Tensor) -> QuantWeight:
    out, inputs = weight.shape[-2:]
    rows, columns = -(-out // FP8_BLOCK), -(-inputs // FP8_BLOCK)
    padded = torch.zeros(
        (*weight.shape[:-2], rows * FP8_BLOCK, columns * FP8_BLOCK), device=weight.device
    )
    padded[..., :out, :inputs] = weight
    blocks = padded.reshape(*weight.shape[:-2], rows, FP8_BLOCK, columns, FP8_BLOCK)
    scales = blocks.abs().amax((-3, -1)) / E4M3_MAX
    codes = blocks * _inverse(scales)[..., :, None, :, None]
    whole = codes.flatten(-2).flatten(-3, -2)[..., :out, :inputs]
    return QuantWeight("fp8", whole.to(torch.float8_e4m3fn), scales, FP8_BLOCK)


def _e2m1(codes: Tensor) -> Tensor:
    values = torch.tensor((*E2M1, *(-v for v in E2M1)), device=codes.device)
    return values[codes.long()]


def _quantize_e2m1(weight: Tensor, form: QuantFormat, group: int) -> QuantWeight:
    grouped = _grouped(weight.float(), group)
    top, overall = grouped.abs().amax(-1), 1.0
    if form == "mxfp4":
        exponent = torch.floor(torch.log2(top.clamp(min=2.0**-125))) - 2
        scales, step = (exponent + 127).clamp(0, 254).to(torch.uint8), torch.exp2(exponent)
    else:
        overall = max(top.max().item() / (E2M1[-1] * E4M3_MAX), 1e-30) if top.numel() else 1.0
        scales = (top / (E2M1[-1] * overall)).to(torch.float8_e4m3fn)
        step = scales.float() * overall
    bounds = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E2M1)])
    scaled = grouped * _inverse(step).unsqueeze(-1)
    codes = torch.bucketize(scaled.abs().contiguous(), bounds.to(weight.device)).to(torch.uint8)
    codes = (codes | (scaled < 0).to(torch.uint8) << 3).flatten(-2)
    return QuantWeight(form, codes[..., ::2] | codes[..., 1::2] << 4, scales, group, overall)


define(
    "quantize",
    "(weight[..., out, in], bits, group) -> (codes, scales[..., out, in / group] bf16)",
    quantize_groups,
)
