# SPDX-License-Identifier: MIT
"""Rows of a table by id: signature and torch reference. Knows a slice of a vocabulary, no ranks."""

import torch.nn.functional as F
from torch import Tensor

from tokenspeed.kernels.registry import define


def embedding(ids: Tensor, weight: Tensor, first: int) -> Tensor:
    """ids[T] int64, weight[V,D] -> [T,D]: row ids - first; zeros outside [first, first + V)."""
    inside = (ids >= first) & (ids < first + weight.shape[0])
    rows = F.embedding((ids - first).clamp(0, weight.shape[0] - 1), weight)
    return rows.masked_fill_(~inside[:, None], 0.0)


define("embedding", "(ids[T] int64, weight[V,D], first) -> [T,D]", embedding)
