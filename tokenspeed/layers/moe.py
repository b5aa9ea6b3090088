# SPDX-License-Identifier: MIT
"""Mixture of experts: a router, stacked routed experts, and shared experts that always run.

The checkpoint keeps one tensor per expert and projection; they are stacked as they stream in.
Sources: arXiv:2401.06066 (shared experts), arXiv:2405.04434 (groups), arXiv:2412.19437 (sigmoid).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tokenspeed.kernels.quant import QuantWeight
from tokenspeed.layers.layer import Layer, Source, Target, write_nothing
from tokenspeed.layers.mlp import MLP
from tokenspeed.spmd.placement import (
    REPLICATED,
    Flow,
    Fused,
    Layout,
    ModuleSpec,
    Part,
    Partial,
    Shard,
    tokens,
)
from tokenspeed.spmd.shards import Cut

MAX_EXPERTS = 2**14


@dataclass(frozen=True)
class Routing:
    """How `top_k` of `num_experts` are chosen; see the op `route` for the meaning of each field."""

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2"] = "max"
    norm: bool = True
    scale: float = 1.0
    correction_bias: bool = False  # a per-expert bias that steers the choice only


class Router(Layer):
    """x [T, hidden] -> (weights [T, k] float32, ids [T, k] int32). Works in float32 or wider."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, target: Target, hidden_size: int, routing: Routing) -> None:
        wide = torch.promote_types(target.dtype, torch.float32)
        super().__init__(Target(target.device, wide))
        self.routing, self.top_k = routing, routing.top_k
        self.spec = ModuleSpec("router", weights={"weight": REPLICATED, "bias": REPLICATED})
        self.own_parameter("weight", (routing.num_experts, hidden_size))
        if routing.correction_bias:
            self.own_parameter("bias", (routing.num_experts,))
        else:
            self.register_parameter("bias", None)

    def choose_kernels(self) -> None:
        experts, hidden = self.weight.shape
        self.linear = self.target.weight_kernel("linear", num_inputs=hidden, num_outputs=experts)
        self.route = self.target.kernel("route", num_experts=experts)

    def pack_weights(self) -> None:
        self.packed = self.target.pack(self.linear, self.weight)
        if self.packed is not self.weight:
            self.give_up("weight")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.routing
        logits = self.linear(x, self.packed, None)
        weights, ids = self.route(
            logits,
            self.bias,
            r.top_k,
            r.scoring,
            r.n_group,
            r.topk_group,
            r.group_score,
            r.norm,
            r.scale,
        )
        return weights, ids

    def sources(self) -> Iterator[Source]:
        yield self.source("gate.weight", "weight")
        if "bias" in self.cuts:
            yield self.source("gate.e_score_correction_bias", "bias")


class Experts(Layer):
    """The routed experts: w13 [E, 2I, hidden] is gate over up, w2 [E, hidden, I] is down.

    Over ranks, experts are divided over `ep` and each of them over `etp`. `held` are those of this
    rank in the order of its slots; an expert may stand in several.
    """

    w13: nn.Parameter
    w2: nn.Parameter

    def __init__(
        self, target: Target, num_experts: int, hidden_size: int, intermediate_size: int
    ) -> None:
        super().__init__(target)
        half = Part(intermediate_size, {"ep": Shard(0), "etp": Shard(1)})
        weights: dict[str, Layout | Fused] = {
            "w13": Fused(1, (half, half)),
            "w2": {"ep": Shard(0), "etp": Shard(2)},
        }
        summed = {"ep": Partial(), "etp": Partial()}
        self.spec = ModuleSpec("experts", REPLICATED, summed, weights)
        self.num_experts = num_experts
        self.held = list(range(num_experts))
        self.own_parameter("w13", (num_experts, 2 * intermediate_size, hidden_size))
        self.own_parameter("w2", (num_experts, hidden_size, intermediate_size))

    def choose_kernels(self) -> None:
        experts, hidden, inner = self.w2.shape
        self.kernel = self.target.weight_kernel(
            "moe", num_experts=experts, hidden_size=hidden, intermediate_size=inner
        )

    def pack_weights(self) -> None:
        held = [self.w13, self.w2]
        self.packed = [self.target.pack(self.kernel, weight) for weight in held]
        for name, weight, packed in zip(("w13", "w2"), held, self.packed, strict=True):
            if packed is not weight:
                self.give_up(name)

    def by_slot(self) -> tuple[Tensor, ...]:
        """The weights in memory, slot after slot: row i of each holds all there is of slot i."""
        tensors: list[Tensor] = []
        for packed in self.packed:
            if isinstance(packed, Tensor):
                tensors.append(packed)
            elif isinstance(packed, QuantWeight):
                tensors += (packed.codes, packed.scales)
            else:
                tensors.append(packed.data)
        return tuple(tensors)

    def forward(
        self, x: Tensor, weights: Tensor, ids: Tensor, addend: Tensor | None = None
    ) -> Tensor:
        """ids [T, k] index `held`; those below 0 are computed elsewhere."""
        y: Tensor = self.kernel(x, *self.packed, weights, ids, addend)
        return y

    def sources(self) -> Iterator[Source]:
        inner = self.cuts["w2"].global_shape[2]
        for expert in range(self.num_experts):
            name = f"experts.{expert}"
            yield self._of(expert, f"{name}.gate_proj.weight", "w13", slice(0, inner))
            yield self._of(expert, f"{name}.up_proj.weight", "w13", slice(inner, 2 * inner))
            yield self._of(expert, f"{name}.down_proj.weight", "w2", slice(None))

    def _of(self, expert: int, name: str, parameter: str, rows: slice) -> Source:
        """One projection of one expert, into every slot that holds the expert."""
        each = Cut(self.cuts[parameter].dims[1:])
        shape = torch.empty(each.global_shape, device="meta")[rows].shape
        slots = [slot for slot, held in enumerate(self.held) if held == expert]
        found = each.pick((rows,))
        if not slots or not self.holds(parameter) or found is None:
            return Source(name, tuple(shape), None, write_nothing)
        pick, local = found

        def write(tensor: Tensor) -> None:
            for slot in slots:
                self._fill(parameter, (slot, *local), tensor)

        return Source(name, tuple(shape), pick, write)


class MoE(Layer):
    """[T, hidden] -> [T, hidden]. `shared_size` 0 means no shared experts.

    Shared experts work on their own dp rank's tokens, divided over tp as a dense block is.
    """

    spec = ModuleSpec(outputs=tokens(tp=Partial()))

    def __init__(
        self,
        target: Target,
        hidden_size: int,
        routing: Routing,
        intermediate_size: int,
        shared_size: int = 0,
    ) -> None:
        super().__init__(target)
        self.gate = Router(target, hidden_size, routing)
        self.experts = Experts(target, routing.num_experts, hidden_size, intermediate_size)
        self.flows: tuple[Flow, ...] = (("gate", "experts"), ("experts",))
        self.shared_experts: MLP | None = None
        if shared_size:
            self.shared_experts = MLP(target, hidden_size, shared_size)
            self.flows = (*self.flows, ("shared_experts",))

    def choose_kernels(self) -> None:
        self.add = self.target.kernel("add")
        # Over ranks, what experts and shared experts say is exchanged before it can be added.
        self.add_inside = "forward" not in self.experts.__dict__

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x)
        y: Tensor
        if self.shared_experts is None:
            y = self.experts(x, weights, ids)
        elif self.add_inside:
            y = self.experts(x, weights, ids, self.shared_experts(x))
        else:
            y = self.add(self.experts(x, weights, ids), self.shared_experts(x))
        return y
