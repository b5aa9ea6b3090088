# SPDX-License-Identifier: MIT
"""What one rank of a compiled model does: its weights, its products, its keys and values.

Made from the meta model and the local shapes of its compile; identical modules of different layers
are one `Op` with a count for each pipeline stage. Knows no devices and no batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

from torch import nn

from tokenspeed.layers.attention_gqa import GqaAttention
from tokenspeed.layers.attention_mla import AbsorbedKv, MlaAttention
from tokenspeed.layers.embedding import Embedding, LMHead
from tokenspeed.layers.mlp import MLP
from tokenspeed.layers.moe import Experts, MoE, Router
from tokenspeed.planner.catalog import PlannedModel
from tokenspeed.planner.folding import LAYERS, FoldedModel
from tokenspeed.planner.weight_format import BF16, WeightFormat
from tokenspeed.spmd.collectives import Collective
from tokenspeed.spmd.compile import SpmdPlan, cuts
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.shards import Cut
from tokenspeed.spmd.stages import Stages, find_stages

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


@dataclass(frozen=True)
class Entry:
    """The modules at `path` (layers as `*`), and how many of them each pipeline stage has."""

    path: str
    op: Op
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """The same collective of several layers: `row.module` has `*` for the layer."""

    row: Collective
    counts: tuple[int, ...]  # of each pipeline stage


@dataclass(frozen=True)
class Workload:
    """All work of one rank of each stage."""

    planned: PlannedModel
    mesh: Mesh
    plan: SpmdPlan  # of one stage
    entries: tuple[Entry, ...]
    collectives: tuple[tuple[Exchange, ...], ...]  # of each variant, in the order of the model

    @property
    def hidden_size(self) -> int:
        return self.planned.model.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.planned.model.vocab_size

    @cached_property
    def kv_bytes_per_token(self) -> float:
        """On the rank that keeps most: the stage with the most layers."""
        return max(self._sum(stage, "kv_bytes") for stage in range(self.mesh.pp))

    def weight_bytes(self, stage: int) -> float:
        return self._sum(stage, "weight_bytes")

    def _sum(self, stage: int, name: str) -> float:
        return float(sum(entry.counts[stage] * getattr(entry.op, name) for entry in self.entries))


def make_workload(planned: PlannedModel, mesh: Mesh, plan: SpmdPlan) -> Workload:
    """`plan` is of the folded model on one stage of `mesh`. All ranks of a stage work alike.

    `ValueError`: a rank's piece of a quantised weight would cut a block in two.
    """
    folded, stages = planned.folded, find_stages(planned.model, mesh.pp)
    whole = replace(plan.mesh, pp=mesh.pp)  # with the axis kv of this model
    found = cuts(folded.model, plan, 0)
    found_ops: dict[tuple[str, Op], list[int]] = {}
    for path, module in folded.model.named_modules():
        held = planned.format_of(folded.whole_path(path), module)
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        for name in own:
            _check_blocks(name, found[name], held)
        shapes = [found[name].shape for name in own]
        for op in _ops(path, module, shapes, held, planned.kv_dtype.itemsize, whole, plan):
            counts = found_ops.setdefault((folded.text(path), op), [0] * mesh.pp)
            _add(counts, path, folded, stages)
    entries = [Entry(path, op, tuple(counts)) for (path, op), counts in found_ops.items()]
    exchanges = [_exchanges(plan, i, folded, stages) for i in range(len(plan.variants))]
    return Workload(planned, whole, plan, tuple(entries), tuple(exchanges))


def _add(counts: list[int], path: str, folded: FoldedModel, stages: Stages) -> None:
    """Counts a module of the folded model as often as each stage has it."""
    place = folded.layer_of(path)
    if place is None:
        counts[stages.stage_of(path) or 0] += 1
        return
    for layer, stands_for in enumerate(folded.stands_for):
        if stands_for == place:
            counts[stages.stage_of(f"{LAYERS}.{layer}") or 0] += 1


def _exchanges(
    plan: SpmdPlan, variant: int, folded: FoldedModel, stages: Stages
) -> tuple[Exchange, ...]:
    """Those of one stage's plan, and what each stage but the first receives."""
    found: dict[Collective, list[int]] = {}
    for row in plan.collectives(variant, ACTIVATION_BYTES):
        one = replace(row, module=folded.text(row.module))
        _add(found.setdefault(one, [0] * stages.count), row.module, folded, stages)
    if stages.count > 1:
        width = folded.model.config.hidden_size * ACTIVATION_BYTES
        size = width / (plan.mesh.tp if plan.variants[variant].split else 1)
        send = Collective(f"{LAYERS}.*", "send", "pp", 2, size)
        found[send] = [0] + [1] * (stages.count - 1)
    return tuple(Exchange(row, tuple(counts)) for row, counts in found.items())


def _check_blocks(path: str, cut: Cut, held: WeightFormat) -> None:
    for parts, block in zip(cut.dims[-2:], held.block, strict=False):
        for part in parts:
            if part.count > 1 and part.piece % block:
                raise ValueError(
                    f"{path}: {part.size} over {part.count} ranks are {part.piece} each, no whole "
                    f"{held.name} blocks of {block}"
                )


def _ops(
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
