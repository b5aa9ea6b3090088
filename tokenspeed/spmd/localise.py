# SPDX-License-Identifier: MIT
"""One rank's part of a compiled model: local parameters, and conversions at the modules' borders.

Before it runs, a model is whole and on the meta device; after it, `forward` computes this rank's
share and calls the collectives that the plan names. Knows modules by their specs and by the few
names that `layers/layer.py` promises; reads no weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tokenspeed.spmd.check import modules_of
from tokenspeed.spmd.compile import SpmdPlan, can_dispatch, cuts
from tokenspeed.spmd.expert_placement import ExpertPlacement
from tokenspeed.spmd.experts import Dispatched, Expert, Gathered, Slots
from tokenspeed.spmd.group import Communicator, Group
from tokenspeed.spmd.layout import moves, on_atoms
from tokenspeed.spmd.placement import Partial, Shard, tokens
from tokenspeed.spmd.program import Convert, Groups, Step, conversion
from tokenspeed.spmd.stream import Arrival, StageEntry, StageExit, Stream, StreamNorm


@dataclass
class Spmd:
    """What a localised model needs beside its forward."""

    plan: SpmdPlan
    rank: int
    groups: Groups | None  # None: one rank
    step: Step
    slots: dict[str, Slots] = field(default_factory=dict)  # by path of this rank's experts

    def begin_step(self, tokens_per_dp: Sequence[int]) -> None:
        """Before each forward: how many tokens each dp rank has. All ranks say the same."""
        self.step.begin(tokens_per_dp)

    @property
    def stage(self) -> int:
        """The pipeline stage that this rank belongs to."""
        return self.plan.mesh.index("pp", self.rank)

    @property
    def samples(self) -> bool:
        """Whether this rank has logits: it is on the last stage."""
        return self.stage == self.plan.mesh.pp - 1

    @property
    def peers(self) -> Group | None:
        """The ranks of this stage that have the same tokens; None if there is no other."""
        return self.groups.peers if self.groups is not None else None

    def gather_stream(self, x: Tensor) -> Tensor:
        """The residual stream of all of one's tokens, of the part that lies here in this step."""
        tp = self.group("tp")
        if tp is None or not self.step.split:
            return x
        return tp.all_gather(x, 0, Stream(self.step, tp).sizes())

    def group(self, axis: str) -> Group | None:
        """The group over an axis; None if it has one rank."""
        if self.groups is None:
            return None
        if axis == "pp":
            return self.groups.pipeline
        return self.groups.over(self.plan.mesh.axis_atoms(axis))


def localise(
    model: nn.Module,
    plan: SpmdPlan,
    rank: int = 0,
    communicator: Communicator | None = None,
) -> Spmd:
    """Makes `model` this rank's share. `ValueError`: the communicator does not fit the mesh."""
    placed = {path: _placement(plan, path) for path in plan.experts}
    cut_parameters(model, plan, rank, placed)
    spmd = Spmd(plan, rank, None, Step(plan, rank))
    if plan.mesh.num_ranks > 1:
        if communicator is None or communicator.num_ranks != plan.mesh.num_ranks:
            have = communicator.num_ranks if communicator else 1
            raise ValueError(
                f"mesh {plan.mesh} needs {plan.mesh.num_ranks} ranks, there are {have}"
            )
        spmd.groups = Groups(plan, communicator)
        _attach(model, spmd, spmd.groups, placed)
    for module in model.modules():
        if getattr(module, "is_here", False):
            module.choose_kernels()  # type: ignore[operator]
    return spmd


def cut_parameters(
    model: nn.Module, plan: SpmdPlan, rank: int, placements: Mapping[str, ExpertPlacement]
) -> None:
    """Local shapes for every parameter of this rank's stage; none for those of other stages."""
    stage = plan.mesh.index("pp", rank)
    found = cuts(model, plan, rank)
    last = stage == plan.stages.count - 1
    tied = {id(p) for _, m in modules_of(model) for p in m.borrowed.values()} if last else set()
    for path, module in modules_of(model):
        module.is_here = plan.stages.stage_of(path) in (None, stage)
        for name, parameter in list(module.named_parameters(recurse=False)):
            cut = module.cuts[name] = found[f"{path}.{name}" if path else name]
            shape = cut.shape
            if path in placements:
                held = placements[path].slots.reshape(plan.mesh.ep, -1)
                module.held = held[plan.mesh.index("ep", rank)].tolist()
                shape = (len(module.held), *shape[1:])
            here = (module.is_here or id(parameter) in tied) and not cut.absent
            empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
            setattr(module, name, nn.Parameter(empty, requires_grad=False) if here else None)


def _placement(plan: SpmdPlan, path: str) -> ExpertPlacement:
    """Where the experts stand at first."""
    num_experts = plan.whole_shapes[f"{path}.w2"][0]
    return ExpertPlacement.default(num_experts, plan.mesh.ep, plan.num_slots - num_experts)


def _attach(
    model: nn.Module, spmd: Spmd, groups: Groups, placements: Mapping[str, ExpertPlacement]
) -> None:
    plan = spmd.plan
    here = [path for path in plan.stream if plan.stages.stage_of(path) in (None, spmd.stage)]
    stream = Stream(spmd.step, groups.over(plan.mesh.axis_atoms("tp")))
    for at, path in enumerate(here):
        _attach_norm(model, path, spmd, stream, received=at == 0 and spmd.stage > 0)
    for path in plan.experts:
        if plan.stages.stage_of(path) == spmd.stage:
            _attach_experts(model, path, spmd, groups, placements[path])
    for (path, side), site in plan.sites.items():
        special = path in plan.stream or path in plan.experts
        if not special and plan.stages.stage_of(path) in (None, spmd.stage):
            _wrap(model.get_submodule(path), side, conversion(site.moves, groups, spmd.step))
    if groups.pipeline is not None:  # last: it hides the layers of other stages from `model`
        _attach_stage(model, spmd, stream, groups.pipeline)


def _wrap(module: Any, side: str, convert: Convert) -> None:
    """Puts a conversion before or after whatever `forward` is by now."""
    inner = module.__dict__.get("forward", module.forward)

    def before(x: Tensor, *rest: Any) -> Any:
        return inner(convert(x), *rest)

    def after(*arguments: Any) -> Any:
        return convert(inner(*arguments))

    module.__dict__["forward"] = before if side == "in" else after


def _attach_norm(
    model: nn.Module, path: str, spmd: Spmd, stream: Stream, *, received: bool
) -> None:
    if stream.tp is None:
        return
    arrival: Arrival = "summand" if (path, "in") in spmd.plan.sites else "whole"
    model.get_submodule(path).__dict__["add"] = _stream_norm(
        model, path, stream, "laid" if received else arrival
    )


def _stream_norm(model: nn.Module, path: str, stream: Stream, arrival: Arrival) -> StreamNorm:
    module: Any = model.get_submodule(path)
    size = module.cuts["weight"].global_shape[0]
    reduce, scatter = (
        module.target.kernel(op, size=size)
        for op in ("all_reduce_add_rms_norm", "reduce_scatter_add_rms_norm")
    )
    return StreamNorm(module, stream, arrival, reduce, scatter)


def _attach_stage(model: nn.Module, spmd: Spmd, stream: Stream, pipeline: Group) -> None:
    """Only this stage's layers, and the borders to the stages before and after."""
    plan, stages = spmd.plan, spmd.plan.stages
    parent, _, name = stages.layers.rpartition(".")
    children = list(model.get_submodule(stages.layers).children())
    begin, end = stages.bounds[spmd.stage : spmd.stage + 2]
    model.get_submodule(parent).__dict__[name] = children[begin:end]
    if spmd.stage > 0:
        entry: Any = model.get_submodule(stages.entry)
        target = entry.target
        width = plan.widths[stages.exit]
        entry.__dict__["forward"] = StageEntry(width, target.dtype, target.device, stream, pipeline)
    if not spmd.samples:
        # What leaves is what the next stage's first norm would get here.
        norms = [path for path in plan.stream if stages.stage_of(path) == spmd.stage + 1]
        arrival: Arrival = "summand" if (norms[0], "in") in plan.sites else "whole"
        norm = _stream_norm(model, stages.exit, stream, arrival)
        model.get_submodule(stages.exit).__dict__["add"] = StageExit(norm, pipeline)


def _attach_experts(
    model: nn.Module, path: str, spmd: Spmd, groups: Groups, placement: ExpertPlacement
) -> None:
    mesh, step = spmd.plan.mesh, spmd.step
    module: Any = model.get_submodule(path)
    entry, leave = (spmd.plan.sites.get((path, side)) for side in ("in", "out"))
    slots = None
    if mesh.ep > 1:
        place = mesh.index("ep", spmd.rank)
        slots = spmd.slots[path] = Slots(placement, place, module.target.device)
    enter = conversion(entry.moves, groups, step) if entry else _same
    out = conversion(leave.moves, groups, step) if leave else _same
    gathered = Gathered(module.forward, slots, enter, out)
    dispatched = None
    ep = groups.over(mesh.axis_atoms("ep"))
    arrives = entry.have if entry else on_atoms(module.spec.inputs, mesh, path)
    own_tokens = arrives == on_atoms(tokens(), mesh, path)
    if slots and ep and leave and own_tokens and can_dispatch(mesh):
        dp, atoms = mesh.axis_atoms("dp"), mesh.axis_atoms("ep")
        sharing = [atom for atom in atoms if atom not in dp]
        pieces = prod(mesh.atoms[atom] for atom in sharing)
        have = tuple(Shard(0) if a in dp else Partial() for a in range(len(mesh.atoms)))
        rest = conversion(moves(have, leave.need), groups, step)
        dispatched = Dispatched(
            module.forward, slots, step, ep, (pieces, mesh.atoms_index(sharing, spmd.rank)), rest
        )
    module.__dict__["forward"] = Expert(step, gathered, dispatched)


def _same(x: Tensor) -> Tensor:
    return x
