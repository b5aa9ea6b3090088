# SPDX-License-Identifier: MIT
"""Root-mean-square norm, with the residual add fused in. arXiv:1910.07467."""

from collections.abc import Iterator

from torch import Tensor

from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.spmd.placement import REPLICATED, Layout, ModuleSpec


class RMSNorm(Layer):
    """`forward` normalises [T, size] or [T, heads, size]; `add` first adds a residual to [T, size].

    `layout` is that of the features it works on: a norm over the features of each head also works
    where the heads are divided over ranks.
    """

    def __init__(
        self, target: Target, name: str, size: int, eps: float, layout: Layout = REPLICATED
    ) -> None:
        super().__init__()
        self.spec = ModuleSpec(layout, layout, {"weight": REPLICATED})
        self.name, self.eps = name, eps
        self.weight = self.own_parameter((size,), target.dtype)
        self.norm_kernel = target.kernel("rms_norm", size=size)
        self.add_kernel = target.kernel("add_rms_norm", size=size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm_kernel(x, self.weight, self.eps)
        return y

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); without a residual (norm(x), x)."""
        if residual is None:
            return self.forward(x), x
        normed, total = self.add_kernel(x, residual, self.weight, self.eps)
        return normed, total

    def sources(self) -> Iterator[Source]:
        yield self.source(f"{self.name}.weight", "weight")
