# SPDX-License-Identifier: MIT
"""Matrix product with a weight: signature and torch reference. Knows nothing of layers."""

import torch.nn.functional as F
from torch import Tensor

from tokenspeed.kernels.registry import define


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[T,D], weight[N,D], bias[N] or None -> [T,N], all of one dtype."""
    return F.linear(x, weight, bias)


define("linear", "(x[T,D], weight[N,D], bias[N] or None) -> [T,N]", linear)
