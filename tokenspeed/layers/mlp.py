# SPDX-License-Identifier: MIT
"""The gated feed-forward block: down(silu(gate(x)) * up(x)). arXiv:2002.05202."""

from torch import Tensor

from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.linear import Linear
from tokenspeed.spmd.placement import ModuleSpec, Partial


class MLP(Layer):
    """[T, hidden] -> [T, hidden]. Child names are the checkpoint's: gate_proj, up_proj, down_proj.

    `axis` is the mesh axis that divides the intermediate features.
    """

    def __init__(
        self,
        target: Target,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        axis: str = "tp",
    ) -> None:
        super().__init__()
        self.spec = ModuleSpec(outputs={axis: Partial()})
        self.flows = (("gate_up_proj", "down_proj"),)
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear(target, hidden_size, parts, bias=bias, split="rows", axis=axis)
        self.down_proj = Linear(
            target,
            intermediate_size,
            {"down_proj": hidden_size},
            bias=bias,
            split="columns",
            axis=axis,
        )
        self.silu_mul = target.kernel("silu_mul", size=intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.silu_mul(self.gate_up_proj(x)))
        return y
