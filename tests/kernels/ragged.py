# SPDX-License-Identifier: MIT
"""Ragged batches over poisoned caches, as the kernels' cases have them, and a comparison."""

import torch
from torch import Tensor

from tokenspeed.kernels.cases.ragged import Ragged, ragged

__all__ = ["Ragged", "close", "ragged"]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within 1e-5 (float32) or 2e-2 (bfloat16), relative to the values' own size."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
