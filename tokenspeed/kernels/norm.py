# SPDX-License-Identifier: MIT
"""RMS norms: signatures and torch references. Knows nothing of layers.

Numbers are accumulated in float32 (float64 for float64 inputs) and rounded once, at the end.
"""

import torch
from torch import Tensor

from tokenspeed.kernels.registry import define


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x[T, D], weight[D] -> [T, D] of x's dtype: x / sqrt(mean(x^2) + eps) * weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [T, D], weight[D] -> (rms_norm(sum), sum), with sum = x + residual rounded."""
    total = x + residual
    return rms_norm(total, weight, eps), total


define("rms_norm", "(x[T,...,D], weight[D], eps) -> x's shape", rms_norm)
define(
    "add_rms_norm",
    "(x[T,D], residual[T,D], weight[D], eps) -> (normed[T,D], sum[T,D])",
    add_rms_norm,
)
