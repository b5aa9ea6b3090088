# SPDX-License-Identifier: MIT
"""What one rank of a compiled model does: its weights, its products, its keys and values.

Made from the meta model and the local shapes of its compile; identical modules of different layers
are one `Op` with a count for each pipeline stage. Knows no devices and no batch.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from tokenspeed.planner.catalog import PlannedModel
from tokenspeed.planner.folding import LAYERS, FoldedModel
from tokenspeed.planner.ops import ACTIVATION_BYTES, Op, ops_of
from tokenspeed.planner.weight_format import WeightFormat
from tokenspeed.spmd.collectives import Collective
from tokenspeed.spmd.compile import SpmdPlan, cuts
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.shards import Cut
from tokenspeed.spmd.stages import Stages, find_stages


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
        for op in ops_of(path, module, shapes, held, planned.kv_dtype.itemsize, whole, plan):
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
