# SPDX-License-Identifier: MIT
"""A TokenSpeed kernel plug-in: the backend `numpy` of two ops, for float32 on a CPU.

TokenSpeed finds `register_kernels` through the entry point in pyproject.toml and calls it once,
when a kernel is first asked for. Nothing else of TokenSpeed is needed.
"""

from collections.abc import Callable
from typing import Any

import torch

from tokenspeed_numpy_kernels.kernels import MAX_SIZE, rms_norm, silu_mul


def _fits(ask: Any) -> str | None:
    """The reason that `tokenspeed kernels explain` prints, or None."""
    size = ask.shapes.get("size", 0)
    return f"size up to {MAX_SIZE}, not {size}" if size > MAX_SIZE else None


def register_kernels(register: Callable[..., None]) -> None:
    """Adds the backend. Priority -5: compiled kernels come first unless numpy is asked for."""
    for op, kernel in (("rms_norm", rms_norm), ("silu_mul", silu_mul)):
        register(
            op,
            "numpy",
            kernel,
            devices=("cpu",),
            dtypes=(torch.float32,),
            requires=_fits,
            priority=-5,
        )
