# SPDX-License-Identifier: MIT
"""Ops on one element at a time: signatures and torch references. Knows nothing of layers."""

import torch
from torch import Tensor

from tokenspeed.kernels.registry import define


def add(x: Tensor, y: Tensor) -> Tensor:
    """x[T,D], y[T,D] of one dtype -> x + y, summed in float32 (or wider) and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + y.to(wide)).to(x.dtype)


define("add", "(x[T,D], y[T,D]) -> [T,D]", add)
