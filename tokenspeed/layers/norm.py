# SPDX-License-Identifier: MIT
"""Root-mean-square norm, with the residual add fused in. arXiv:1910.07467."""

from collections.abc import Iterator

from torch import Tensor, nn

from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.spmd.placement import REPLICATED, Kind, Layout, ModuleSpec, tokens


class RMSNorm(Layer):
    """`forward` normalises [T, size] or [T, heads, size]; `name` is the checkpoint's.

    `kind` "head_norm" norms the features of each head, also where heads are divided over ranks:
    `layout` is theirs.
    """

    weight: nn.Parameter

    def __init__(
        self,
        target: Target,
        name: str,
        size: int,
        eps: float,
        kind: Kind = "norm",
        layout: Layout | None = None,
    ) -> None:
        super().__init__(target)
        lies = tokens() if layout is None else layout
        self.spec = ModuleSpec(kind, lies, lies, {"weight": REPLICATED})
        self.name, self.eps = name, eps
        self.own_parameter("weight", (size,))

    def choose_kernels(self) -> None:
        self.norm_kernel = self.target.kernel("rms_norm", size=self.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm_kernel(x, self.weight, self.eps)
        return y

    def sources(self) -> Iterator[Source]:
        yield self.source(f"{self.name}.weight", "weight")


class ResidualNorm(RMSNorm):
    """A norm that also adds the residual stream: `add` in place of `forward`, for [T, size]."""

    def __init__(self, target: Target, name: str, size: int, eps: float) -> None:
        super().__init__(target, name, size, eps, "residual_norm")

    def choose_kernels(self) -> None:
        super().choose_kernels()
        self.add_kernel = self.target.kernel("add_rms_norm", size=self.weight.shape[0])

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); without a residual (norm(x), x)."""
        if residual is None:
            return self.forward(x), x
        normed, total = self.add_kernel(x, residual, self.weight, self.eps)
        return normed, total
