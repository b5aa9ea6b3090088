# SPDX-License-Identifier: MIT
"""A TokenSpeed kernel plug-in: the backend `numpy` of two ops, for float32 on a CPU.

TokenSpeed finds `register_kernels` through the entry point in pyproject.toml and calls it once,
when a kernel is first asked for. The kernels work on the tensors' own memory; their calls are those
of `tokenspeed kernels list`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, from_numpy

MAX_SIZE = 1 << 16  # features of a row


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x[..., D], weight[D] -> x / sqrt(mean(x^2) + eps) * weight. x may be strided over rows."""
    if weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} must be [{x.shape[-1]}]")
    rows = x.numpy()
    squares = np.einsum("...d,...d->...", rows, rows)[..., None] / np.float32(rows.shape[-1])
    return from_numpy(rows * weight.numpy() / np.sqrt(squares + np.float32(eps)))


def silu_mul(x: Tensor) -> Tensor:
    """x[T, 2I] -> [T, I]: silu(first half) * second half."""
    if x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(f"silu_mul: x {tuple(x.shape)} must be [T, 2I]")
    gate, up = np.split(x.numpy(), 2, axis=1)
    # exp(-|g|) never overflows; the two branches are 1 / (1 + e^-g) on their own side.
    small = np.exp(-np.abs(gate))
    sigmoid = np.where(gate >= 0, 1.0, small) / (1.0 + small)
    return from_numpy((gate * sigmoid * up).astype(np.float32))


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
