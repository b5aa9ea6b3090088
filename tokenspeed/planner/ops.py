# SPDX-License-Identifier: MIT
"""What one module of one rank does: bytes it holds and moves, products, launches.

Made from a module and the local shapes of its weights. Knows no devices, no batch and no layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import nn

from tokenspeed.layers.attention_gqa import GqaAttention
from tokenspeed.layers.attention_mla import AbsorbedKv, MlaAttention
from tokenspeed.layers.embedding import Embedding, LMHead
from tokenspeed.layers.mlp import MLP
from tokenspeed.layers.moe import Experts, MoE, Router
from tokenspeed.planner.weight_format import BF16, WeightFormat
from tokenspeed.spmd.compile import SpmdPlan
from tokenspeed.spmd.mesh import Mesh

Kind = Literal["dense", "experts", "attention", "logits", "other"]
KERNELS = {Router: 2, Experts: 4, MLP: 1, AbsorbedKv: 2, Embedding: 1, MoE: 1}
ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Op:
    """One module on one rank. What is per token is per token that this rank computes."""

    kind: Kind
    num_elements: int = 0  # of its weights on this rank
    format: WeightFormat = BF16
    flops: float = 0.0  # per token
    traffic: float = 0.0  # bytes of activations read and written per token
    kernels: int = 0
    expert_share: float = 1.0  # of the experts that one token chooses
    num_experts: int = 0  # on this rank
    expert_ranks: int = 1  # over which all experts are divided
    shared_elements: int = 0  # read here, but held and counted by another module
    kv_bytes: float = 0.0  # per token of context
    kv_flops: float = 0.0  # per query and token of context

    @property
    def weight_bytes(self) -> float:
        return self.num_elements * self.format.bytes_per_element


def ops_of(
    path: str,
    module: nn.Module,
    shapes: list[tuple[int, ...]],
    held: WeightFormat,
    kv_itemsize: int,
    mesh: Mesh,
    plan: SpmdPlan,
) -> Iterator[Op]:
    """What one module does; nothing for those that only hold others."""
    size = sum(prod(shape) for shape in shapes)
    kernels = KERNELS.get(type(module), 1 if shapes else 0)
    if isinstance(module, (GqaAttention, MlaAttention)):
        yield _attention(module, kv_itemsize, mesh)
    elif isinstance(module, Embedding):
        yield Op("other", size, held, traffic=2.0 * ACTIVATION_BYTES * shapes[0][1], kernels=1)
    elif isinstance(module, LMHead):
        yield _logits(module, size, held, mesh)
    elif isinstance(module, Experts):
        yield _experts(module, shapes, held, plan)
    elif shapes and len(shapes[0]) > 1:
        features = sum(prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes)
        traffic = float(ACTIVATION_BYTES * features)
        yield Op("dense", size, held, flops=2.0 * size, traffic=traffic, kernels=kernels)
    elif kernels:  # norms, and what composites do between their children
        yield Op("other", size, held, traffic=4.0 * ACTIVATION_BYTES * size, kernels=kernels)


def _logits(module: LMHead, size: int, held: WeightFormat, mesh: Mesh) -> Op:
    """Rows are those of the embedding where the head has no weight of its own."""
    vocab, hidden = module.embedding[0].weight.shape
    rows = -(-vocab // mesh.tp)
    traffic = 4.0 * rows + ACTIVATION_BYTES * hidden
    tied = 0 if size else rows * hidden
    if mesh.pp > 1:  # the embedding is on another stage: this one has a copy
        size, tied = size + tied, 0
    flops = 2.0 * rows * hidden
    return Op("logits", size, held, flops, traffic, kernels=2, shared_elements=tied)


def _experts(
    module: Experts,
    shapes: list[tuple[int, ...]],
    held: WeightFormat,
    plan: SpmdPlan,
) -> Op:
    """Each token runs through top_k of all experts; `flops` are of the share that falls here.

    A cut leaves the experts whole along their number; a rank holds its slots of them.
    """
    slots = plan.num_slots // plan.mesh.ep
    size = slots * sum(prod(shape[1:]) for shape in shapes)
    share = plan.top_k / plan.num_slots
    return Op(
        "experts",
        size,
        held,
        flops=2.0 * size * share,
        traffic=2.0 * ACTIVATION_BYTES * module.w2.shape[1],
        kernels=KERNELS[Experts],
        expert_share=share,
        num_experts=slots,
        expert_ranks=plan.mesh.ep,
    )


def _attention(module: GqaAttention | MlaAttention, kv_itemsize: int, mesh: Mesh) -> Op:
    """Scores and values over the context; projections are modules of their own.

    Latent attention is counted in its absorbed form, as the engine runs it.
    """
    heads = module.shape.num_heads // mesh.tp
    if isinstance(module, MlaAttention):
        latent, rope = module.shape.kv_lora_rank, module.shape.rope_dim
        elements, flops = latent + rope, 2.0 * heads * (2 * latent + rope)
    else:
        elements = 2 * module.shape.num_kv_heads // mesh.size("kv") * module.shape.head_dim
        flops = 4.0 * heads * module.shape.head_dim
    kv_bytes = float(elements * kv_itemsize)
    return Op("attention", kernels=3, kv_bytes=kv_bytes, kv_flops=flops)
