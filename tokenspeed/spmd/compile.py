# SPDX-License-Identifier: MIT
"""Checks a model's placements from the embedding to the logits and derives each weight's shard.

Runs once, on meta parameters, before a byte of weight is read. It reads three attributes of each
module: `spec` (its boundary), `flows` (chains of children from its input to its output) and its
own parameters; it never looks at a forward. This release runs on one device: every axis has one
rank, so every edge is an identity and every shard is the whole weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from tokenspeed.spmd.placement import AXES, REPLICATED, Layout, Mesh, ModuleSpec


@dataclass(frozen=True)
class Edge:
    """Data that changes its layout on the way from one module to the next."""

    producer: str
    consumer: str
    axis: str
    have: Placement
    need: Placement


@dataclass(frozen=True)
class SpmdPlan:
    """What the compile found: edges that need work on axes of several ranks, and local shapes."""

    edges: tuple[Edge, ...]
    shapes: dict[str, tuple[int, ...]]  # parameter path -> shape on this rank


def compile_model(model: nn.Module, mesh: Mesh) -> SpmdPlan:
    """Type-checks the placements of `model`. `ValueError` names the module and what is wrong."""
    for axis in AXES:
        if mesh.size(axis) != 1:
            raise ValueError(f"mesh axis {axis} must have one rank in this release: {mesh}")
    edges: dict[Edge, None] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            continue
        spec = _spec_of(path, module)
        edges.update(dict.fromkeys(_edges(path, module, spec)))
        for name, parameter in module.named_parameters(recurse=False):
            if name not in spec.weights:
                raise ValueError(f"{path}: parameter {name} has no placement in its spec")
            full = f"{path}.{name}" if path else name
            shapes[full] = _local_shape(full, tuple(parameter.shape), spec.weights[name], mesh)
    return SpmdPlan(tuple(edges), shapes)


def _spec_of(path: str, module: nn.Module) -> ModuleSpec:
    spec = getattr(module, "spec", None)
    if not isinstance(spec, ModuleSpec):
        raise ValueError(f"{path or 'model'} ({type(module).__name__}) declares no ModuleSpec")
    for layout in (spec.inputs, spec.outputs, *spec.weights.values()):
        for axis, placement in layout.items():
            if axis not in AXES:
                raise ValueError(f"{path}: unknown mesh axis {axis!r}; axes are {AXES}")
            if not isinstance(placement, (Replicate, Shard, Partial)):
                raise ValueError(f"{path}: unknown placement {placement!r} on axis {axis}")
    return spec


def _edges(path: str, module: nn.Module, spec: ModuleSpec) -> Iterator[Edge]:
    """Every change of layout along the module's flows, its own boundary included."""
    flows: tuple[tuple[str, ...], ...] = getattr(module, "flows", ())
    in_flows = {name.split(".")[0] for flow in flows for name in flow}
    for name, _ in module.named_children():
        if name not in in_flows:
            raise ValueError(f"{path or 'model'}: child {name} stands in none of its flows")
    for flow in flows:
        where = path or "model"
        stations = [(f"{where} (input)", REPLICATED, spec.inputs)]
        for name in flow:
            child = module.get_submodule(name)
            members = list(child.named_children()) if isinstance(child, nn.ModuleList) else []
            for sub, member in [(f"{name}.{i}", m) for i, m in members] or [(name, child)]:
                full = f"{path}.{sub}" if path else sub
                child_spec = _spec_of(full, member)
                stations.append((full, child_spec.inputs, child_spec.outputs))
        stations.append((f"{where} (output)", spec.outputs, REPLICATED))
        for (producer, _, have), (consumer, need, _) in pairwise(stations):
            yield from _changes(producer, consumer, have, need)


def _changes(producer: str, consumer: str, have: Layout, need: Layout) -> Iterator[Edge]:
    for axis in AXES:
        source, target = have.get(axis, Replicate()), need.get(axis, Replicate())
        if source == target:
            continue
        if isinstance(target, Partial):
            raise ValueError(
                f"{producer} -> {consumer}: has {source!r} on {axis} but needs {target!r}; "
                "only a module's own sum can make a partial value"
            )
        yield Edge(producer, consumer, axis, source, target)


def _local_shape(path: str, shape: tuple[int, ...], layout: Layout, mesh: Mesh) -> tuple[int, ...]:
    local = list(shape)
    for axis, placement in layout.items():
        if isinstance(placement, Shard):
            if not 0 <= placement.dim < len(local) or local[placement.dim] % mesh.size(axis):
                raise ValueError(f"{path}: {placement} on {axis} does not divide shape {shape}")
            local[placement.dim] //= mesh.size(axis)
    return tuple(local)
