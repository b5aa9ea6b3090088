# SPDX-License-Identifier: MIT
"""Collectives fused with what follows them: signatures and references. Knows groups by their calls.

A group is a `tokenspeed.spmd.group.Group`; here it is only something that sums and gathers.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenspeed.kernels.norm import add_rms_norm
from tokenspeed.kernels.registry import Kernel, define


def all_reduce_add_rms_norm_by(add_norm: Kernel) -> Kernel:
    """The op made of the group's sum and the given `add_rms_norm`."""

    def run(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor]:
        normed, total = add_norm(group.all_reduce(x), residual, weight, eps)
        return normed, total

    return run


def reduce_scatter_add_rms_norm_by(add_norm: Kernel) -> Kernel:
    """The op made of the group's sum and gather and the given `add_rms_norm`."""

    def run(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        group: Any,
        sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        own = group.reduce_scatter(x, 0, sizes)
        normed, total = add_norm(own, residual, weight, eps)
        return group.all_gather(normed, 0, sizes), total

    return run


define(
    "all_reduce_add_rms_norm",
    "(x[T,D] summand, residual[T,D], weight[D], eps, group) -> (normed[T,D], sum[T,D])",
    all_reduce_add_rms_norm_by(add_rms_norm),
)
define(
    "reduce_scatter_add_rms_norm",
    "(x[T,D] summand, residual[t,D], weight[D], eps, group, sizes) -> (normed[T,D], sum[t,D]), "
    "t = sizes[group.index]: the rank's own tokens",
    reduce_scatter_add_rms_norm_by(add_rms_norm),
)
