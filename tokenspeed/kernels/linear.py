# SPDX-License-Identifier: MIT
"""Matrix product with a weight: signature and torch reference. Knows nothing of layers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed.kernels.quant import QuantWeight, dequantize
from tokenspeed.kernels.registry import define


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """x[T,D], weight[N,D], bias[N] or None -> [T,N] of x's dtype, or of the weight's if wider.

    `wide`: in float32, whatever x is (or wider, if x is).
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if wide:
        dtype = torch.promote_types(dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def linear_quant(
    x: Tensor, weight: QuantWeight, bias: Tensor | None = None, wide: bool = False
) -> Tensor:
    """As `linear`, with a quantised weight. Backends may quantise x as well, group by group."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = linear(x.to(dtype), dequantize(weight).to(dtype), None if bias is None else bias.to(dtype))
    return y if wide else y.to(x.dtype)


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x[T,H,D], weight[H,N,D] -> [T,H,N]: a linear layer for each head. x may be strided."""
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


define("linear", "(x[T,D], weight[N,D], bias[N] or None, wide) -> [T,N]", linear)
define(
    "linear_quant",
    "(x[T,D], weight QuantWeight[N,D], bias[N] or None, wide) -> [T,N]",
    linear_quant,
)
define("head_linear", "(x[T,H,D], weight[H,N,D]) -> [T,H,N]", head_linear)
