# SPDX-License-Identifier: MIT
"""The gated feed-forward block: down(silu(gate(x)) * up(x)). arXiv:2002.05202."""

from torch import Tensor

from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.linear import Linear
from tokenspeed.spmd.placement import Inline, ModuleSpec, Partial, tokens


class MLP(Layer):
    """[T, hidden] -> [T, hidden]. Child names are the checkpoint's."""

    flows = (("gate_up_proj", Inline("silu_mul", "elementwise"), "down_proj"),)
    spec = ModuleSpec(outputs=tokens(tp=Partial()))

    def __init__(
        self, target: Target, hidden_size: int, intermediate_size: int, *, bias: bool = False
    ) -> None:
        super().__init__(target)
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        down = {"down_proj": hidden_size}
        self.gate_up_proj = Linear(target, hidden_size, parts, bias=bias, split="rows")
        self.down_proj = Linear(target, intermediate_size, down, bias=bias, split="columns")

    def choose_kernels(self) -> None:
        self.silu_mul = self.target.kernel("silu_mul", size=self.gate_up_proj.part_sizes()[0])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.silu_mul(self.gate_up_proj(x)))
        return y
