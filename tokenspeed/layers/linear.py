# SPDX-License-Identifier: MIT
"""Linear layers, fused ones included: one weight made of named parts, each a checkpoint tensor.

    qkv:  weight rows  | q_proj | k_proj | v_proj |     one matrix product instead of three

Refuses to know what the parts mean.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor, nn

from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.spmd.placement import REPLICATED, Layout, ModuleSpec, Partial, Shard

Split = Literal["rows", "columns"] | None


def linear_spec(split: Split, axis: str) -> ModuleSpec:
    """Rows of the weight are output features, columns input features."""
    if split == "rows":
        shard = {axis: Shard(0)}
        return ModuleSpec(REPLICATED, {axis: Shard(1)}, {"weight": shard, "bias": shard})
    if split == "columns":
        partial: Layout = {axis: Partial()}
        weights: dict[str, Layout] = {"weight": {axis: Shard(1)}, "bias": partial}
        return ModuleSpec({axis: Shard(1)}, partial, weights)
    return ModuleSpec(weights={"weight": REPLICATED, "bias": REPLICATED})


class Linear(Layer):
    """x [T, num_inputs] -> x @ weight.T + bias, [T, sum(parts.values())].

    `parts` maps checkpoint names to output features, in the order of the weight's rows. `split`
    says which dimension of the weight is divided over the mesh axis `axis`.
    """

    def __init__(
        self,
        target: Target,
        num_inputs: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        split: Split = None,
        axis: str = "tp",
    ) -> None:
        super().__init__()
        num_outputs = sum(parts.values())
        self.spec = linear_spec(split, axis)
        self.parts = dict(parts)
        self.weight = self.own_parameter((num_outputs, num_inputs), target.dtype)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = self.own_parameter((num_outputs,), target.dtype)
        self.kernel = target.kernel("linear", num_inputs=num_inputs, num_outputs=num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kernel(x, self.weight, self.bias)
        return y

    def sources(self) -> Iterator[Source]:
        start = 0
        for name, size in self.parts.items():
            rows = slice(start, start + size)
            start += size
            yield self.source(f"{name}.weight", "weight", rows)
            if self.bias is not None:
                yield self.source(f"{name}.bias", "bias", rows)
