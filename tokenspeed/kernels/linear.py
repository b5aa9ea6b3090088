# SPDX-License-Identifier: MIT
"""Matrix product with a weight: signature and torch reference. Knows nothing of layers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenspeed.kernels.registry import define


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[T,D], weight[N,D], bias[N] or None -> [T,N], all of one dtype."""
    return F.linear(x, weight, bias)


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x[T,H,D], weight[H,N,D] -> [T,H,N]: a linear layer for each head. x may be strided."""
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


define("linear", "(x[T,D], weight[N,D], bias[N] or None) -> [T,N]", linear)
define("head_linear", "(x[T,H,D], weight[H,N,D]) -> [T,H,N]", head_linear)
