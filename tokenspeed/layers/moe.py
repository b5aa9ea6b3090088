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

from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.layers.mlp import MLP
from tokenspeed.spmd.placement import REPLICATED, ModuleSpec, Partial, Shard

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

    def __init__(self, target: Target, hidden_size: int, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.spec = ModuleSpec(weights={"weight": REPLICATED, "bias": REPLICATED})
        wide = Target(target.device, torch.promote_types(target.dtype, torch.float32))
        self.weight = self.own_parameter((routing.num_experts, hidden_size), wide.dtype)
        self.bias: nn.Parameter | None = None
        if routing.correction_bias:
            self.bias = self.own_parameter((routing.num_experts,), wide.dtype)
        self.linear = wide.kernel("linear", num_inputs=hidden_size, num_outputs=routing.num_experts)
        self.route = wide.kernel("route", num_experts=routing.num_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.routing
        logits = self.linear(x.to(self.weight.dtype), self.weight, None)
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
        if self.bias is not None:
            yield self.source("gate.e_score_correction_bias", "bias")


class Experts(Layer):
    """The routed experts: w13 [E, 2I, hidden] is gate over up, w2 [E, hidden, I] is down."""

    def __init__(
        self, target: Target, num_experts: int, hidden_size: int, intermediate_size: int
    ) -> None:
        super().__init__()
        whole = {"ep": Shard(0)}
        self.spec = ModuleSpec(REPLICATED, {"ep": Partial()}, {"w13": whole, "w2": whole})
        self.w13 = self.own_parameter(
            (num_experts, 2 * intermediate_size, hidden_size), target.dtype
        )
        self.w2 = self.own_parameter((num_experts, hidden_size, intermediate_size), target.dtype)
        self.kernel = target.kernel(
            "moe",
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
        )

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = self.kernel(x, self.w13, self.w2, weights, ids)
        return y

    def sources(self) -> Iterator[Source]:
        num_experts, _, inner = self.w2.shape
        for e in range(num_experts):
            yield self.source(f"experts.{e}.gate_proj.weight", "w13", e, slice(inner))
            yield self.source(f"experts.{e}.up_proj.weight", "w13", e, slice(inner, None))
            yield self.source(f"experts.{e}.down_proj.weight", "w2", e)


class MoE(Layer):
    """[T, hidden] -> [T, hidden]. `shared_size` 0 means no shared experts."""

    def __init__(
        self,
        target: Target,
        hidden_size: int,
        routing: Routing,
        intermediate_size: int,
        shared_size: int = 0,
    ) -> None:
        super().__init__()
        self.spec = ModuleSpec(outputs={"ep": Partial()})
        self.gate = Router(target, hidden_size, routing)
        self.experts = Experts(target, routing.num_experts, hidden_size, intermediate_size)
        self.flows = (("gate", "experts"),)
        self.shared_experts: MLP | None = None
        if shared_size:
            self.shared_experts = MLP(target, hidden_size, shared_size, axis="ep")
            self.flows = (("gate", "experts"), ("shared_experts",))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x)
        y: Tensor = self.experts(x, weights, ids)
        return y if self.shared_experts is None else y + self.shared_experts(x)
