# SPDX-License-Identifier: MIT
"""Linear layers, fused ones included: one weight made of named parts, each a checkpoint tensor.

    qkv:  weight rows  | q_proj | k_proj | v_proj |     one matrix product instead of three

Refuses to know what the parts mean.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor, nn

from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.spmd.placement import (
    REPLICATED,
    Fused,
    Layout,
    ModuleSpec,
    Part,
    Partial,
    Shard,
    tokens,
)

Split = Literal["rows", "columns"] | None


def linear_spec(split: Split, axis: str, parts: tuple[Part, ...]) -> ModuleSpec:
    """Rows of the weight are output features, columns input features."""
    if split == "rows":
        fused = Fused(0, parts)
        spread = {"weight": fused, "bias": fused}
        return ModuleSpec("linear", tokens(), tokens(**{axis: Shard(1)}), spread)
    if split == "columns":
        weights: dict[str, Layout] = {"weight": {axis: Shard(1)}, "bias": {axis: Partial()}}
        return ModuleSpec(
            "linear", tokens(**{axis: Shard(1)}), tokens(**{axis: Partial()}), weights
        )
    return ModuleSpec("linear", weights={"weight": REPLICATED, "bias": REPLICATED})


class Linear(Layer):
    """x [T, num_inputs] -> x @ weight.T + bias, [T, sum(parts.values())].

    `parts` maps checkpoint names to output features, in the order of the weight's rows. `split`
    says which dimension of the weight is divided over the mesh axis `axis`; divided rows come in
    whole units of `unit` (a head), those of `kv_parts` over the axis `kv`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        target: Target,
        num_inputs: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        split: Split = None,
        axis: str = "tp",
        unit: int = 1,
        kv_parts: tuple[str, ...] = (),
    ) -> None:
        super().__init__(target)
        self.parts = dict(parts)
        rows = tuple(
            Part(size, {"kv" if name in kv_parts else axis: Shard(0)}, unit)
            for name, size in parts.items()
        )
        self.spec = linear_spec(split, axis, rows)
        self.own_parameter("weight", (sum(parts.values()), num_inputs))
        if bias:
            self.own_parameter("bias", (sum(parts.values()),))
        else:
            self.register_parameter("bias", None)

    def part_sizes(self) -> list[int]:
        """Output features of each part on this rank."""
        cut = self.cuts["weight"].dims[0]
        if len(cut) == len(self.parts):
            return [part.piece for part in cut]
        return list(self.parts.values())

    def choose_kernels(self) -> None:
        outputs, inputs = self.weight.shape
        sizes = {"num_inputs": inputs, "num_outputs": outputs}
        self.kernel = self.target.weight_kernel("linear", **sizes)

    def pack_weights(self) -> None:
        self.packed = self.target.pack(self.kernel, self.weight)
        if self.packed is not self.weight:
            self.give_up("weight")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kernel(x, self.packed, self.bias)
        return y

    def sources(self) -> Iterator[Source]:
        start = 0
        for name, size in self.parts.items():
            rows = slice(start, start + size)
            start += size
            yield self.source(f"{name}.weight", "weight", rows)
            if "bias" in self.cuts:
                yield self.source(f"{name}.bias", "bias", rows)


class PairLinear(Linear):
    """[left, right] @ weight.T + bias for two inputs as wide, which are never put in line."""

    def choose_kernels(self) -> None:
        outputs, inputs = self.weight.shape
        sizes = {"num_inputs": inputs // 2, "num_outputs": outputs}
        self.kernel = self.target.weight_kernel("linear", **sizes)
        self.add = self.target.kernel("add")

    def pack_weights(self) -> None:
        halves = self.weight.chunk(2, dim=1)
        self.packed = [self.target.pack(self.kernel, half.contiguous()) for half in halves]
        self.give_up("weight")

    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = self.add(
            self.kernel(left, self.packed[0], self.bias), self.kernel(right, self.packed[1], None)
        )
        return y
