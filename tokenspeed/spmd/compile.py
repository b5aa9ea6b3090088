# SPDX-License-Identifier: MIT
"""From annotations to an `SpmdPlan`: which collectives stand where, and each weight's shard.

Runs once, on meta parameters of whole shapes, before a byte of weight is read, and for all ranks at
once. A plan has variants, which differ in two decisions, and a variant for each range of token
counts, by the cost model:

    split      between blocks the residual stream and its norms are divided over the tokens of tp:
               reduce-scatter, norm, all-gather in place of all-reduce, norm
    dispatch   tokens travel to the ranks of their experts (all-to-all) in place of every token to
               every rank (all-gather) and back (reduce-scatter)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import cast

from torch import nn

from tokenspeed.spmd.check import check_model, modules_of, spec_of
from tokenspeed.spmd.collectives import Collective, Variant, collectives_of, cost_s
from tokenspeed.spmd.cost import Interconnect
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import Fused, Shard
from tokenspeed.spmd.shards import Cut, cut_of
from tokenspeed.spmd.site import Site, after_stream
from tokenspeed.spmd.stages import Stages, find_stages

LOOPBACK = Interconnect(latency_s=20e-6, bandwidth=5e9)  # processes of one machine


@dataclass(frozen=True)
class SpmdPlan:
    """What the compile decided. Indices of `buckets` and `variants` belong together."""

    mesh: Mesh
    sites: Mapping[tuple[str, str], Site]  # by module path and side
    stream: tuple[str, ...]  # paths of the norms that carry the residual stream, in order
    experts: tuple[str, ...]  # paths of modules of kind experts
    stages: Stages
    widths: dict[str, int]  # features of a token at a leaf's input, by path
    out_widths: dict[str, int]  # and at its output
    heads: frozenset[str]  # modules that see rows of logits in place of tokens
    top_k: int  # experts of a token; 0 without experts
    memory_bandwidth: float  # bytes a second of one device
    variants: tuple[Variant, ...]
    buckets: tuple[int, ...]  # variant i serves steps of up to buckets[i] tokens on one dp rank
    num_slots: int  # physical experts a layer, redundant ones included; 0 without experts
    whole_shapes: dict[str, tuple[int, ...]]  # parameter path -> shape over all ranks

    def variant_for(self, num_tokens: int) -> int:
        """The index of the variant for a step of so many tokens on the fullest dp rank."""
        for index, most in enumerate(self.buckets):
            if num_tokens <= most:
                return index
        return len(self.buckets) - 1

    def collectives(self, variant: int, itemsize: int = 2) -> list[Collective]:
        """Every collective of one step in the order of the model, one row a site."""
        return collectives_of(self, self.variants[variant], itemsize)


def compile_model(
    model: nn.Module,
    mesh: Mesh,
    *,
    interconnect: Interconnect = LOOPBACK,
    memory_bandwidth: float = 2e10,
    max_tokens: int = 8192,
    itemsize: int = 2,
    num_redundant_experts: int = 0,
    variant: Variant | None = None,
) -> SpmdPlan:
    """Type-checks `model` and plans it for `mesh`. `ValueError` names the module and what is wrong.

    `max_tokens` is the most tokens of one step on one dp rank; `itemsize` the bytes of a hidden
    feature; `memory_bandwidth` bytes a second of one device; `variant` takes the decision out of
    the cost model's hands.
    """
    mesh = _with_kv(model, mesh)
    sites: dict[tuple[str, str], Site] = {
        (site.module, site.side): site for site in check_model(model, mesh)
    }
    kinds = {path: spec_of(path, m).kind for path, m in modules_of(model)}
    widths = {path: _widths(m) for path, m in modules_of(model) if kinds[path] != "composite"}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    plan = SpmdPlan(
        mesh,
        sites,
        tuple(path for path, kind in kinds.items() if kind == "residual_norm"),
        tuple(path for path, kind in kinds.items() if kind == "experts"),
        find_stages(model, mesh.pp),
        {path: width for path, (width, _) in widths.items()},
        {path: width for path, (_, width) in widths.items()},
        frozenset(after_stream(kinds)),
        max((int(getattr(m, "top_k", 0)) for _, m in modules_of(model)), default=0),
        memory_bandwidth,
        variants=(Variant(),),
        buckets=(max_tokens,),
        num_slots=_num_slots(model, mesh, num_redundant_experts),
        whole_shapes=shapes,
    )
    cuts(model, plan, 0)  # what divides for one rank divides for all
    if variant is not None:
        return replace(plan, variants=(variant,))
    return _choose(plan, interconnect, max_tokens, itemsize)


def cuts(model: nn.Module, plan: SpmdPlan, rank: int) -> dict[str, Cut]:
    """Each parameter's cut on `rank`, by path. Experts are not cut along their first dimension
    here: which of them a rank holds may change while it runs."""
    found = {}
    for path, module in modules_of(model):
        spec = spec_of(path, module)
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            shape = tuple(parameter.shape)
            layout = spec.weights[name]
            if spec.kind == "experts":
                layout = _without_experts(layout, plan.mesh)
            found[full] = cut_of(full, shape, layout, plan.mesh, rank)
    return found


def _without_experts(layout: object, mesh: Mesh) -> Fused | dict[str, Shard]:
    if isinstance(layout, Fused):
        parts = tuple(
            replace(part, layout={a: p for a, p in part.layout.items() if p != Shard(0)})
            for part in layout.parts
        )
        return replace(layout, parts=parts)
    pairs = cast(dict[str, Shard], layout).items()
    return {axis: placement for axis, placement in pairs if placement != Shard(0)}


def _with_kv(model: nn.Module, mesh: Mesh) -> Mesh:
    """`kv` for the model's key-value heads: each rank gets some whole heads, or shares one."""
    heads: set[tuple[str, int]] = set()
    for path, module in modules_of(model):
        for layout in spec_of(path, module).weights.values():
            for part in layout.parts if isinstance(layout, Fused) else ():
                if "kv" in part.layout:
                    heads.add((path, part.size // part.unit))
    for path, count in heads:
        if count % mesh.tp and mesh.tp % count:
            raise ValueError(
                f"{path}: {count} key-value heads and {mesh.tp} ranks of tp: one must divide the "
                "other"
            )
    found = {gcd(mesh.tp, count) for _, count in heads} or {mesh.tp}
    if len(found) > 1:
        paths = ", ".join(f"{path}: {count}" for path, count in sorted(heads))
        raise ValueError(f"key-value heads that {mesh.tp} ranks of tp divide differently: {paths}")
    return replace(mesh, kv=found.pop())


def _num_slots(model: nn.Module, mesh: Mesh, redundant: int) -> int:
    """Physical experts of a layer; all layers have equally many."""
    found = {
        path: int(module.get_parameter("w2").shape[0])
        for path, module in modules_of(model)
        if spec_of(path, module).kind == "experts"
    }
    if not found:
        if mesh.ep > 1:
            raise ValueError(f"mesh {mesh}: the model has no experts for the axis ep")
        if redundant:
            raise ValueError(f"{redundant} redundant experts: the model has no experts")
        return 0
    first, count = next(iter(found.items()))
    for path, other in found.items():
        if other != count:
            raise ValueError(f"{path}: {other} experts where {first} has {count}")
    if (count + redundant) % mesh.ep:
        more = f" and {redundant} redundant ones" if redundant else ""
        raise ValueError(
            f"{first}: {count} experts{more} cannot be divided over {mesh.ep} ranks of ep"
        )
    return count + redundant


def _widths(module: nn.Module) -> tuple[int, int]:
    """Features of a token before and after a leaf; of a head for what works on heads."""
    kind = spec_of("", module).kind
    borrowed = getattr(module, "borrowed", {})
    weights = {**borrowed, **dict(module.named_parameters(recurse=False))}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if kind == "experts":
        return shapes["w13"][-1], shapes["w2"][1]
    if kind == "head_linear":
        return 0, 0
    if kind in ("mean_square", "scale"):
        return 2, 2  # numbers of a token: one of its queries, one of its keys
    first, last = shapes["weight"][0], shapes["weight"][-1]
    return (1, last) if kind == "embedding" else (last, first)


def _choose(plan: SpmdPlan, interconnect: Interconnect, max_tokens: int, itemsize: int) -> SpmdPlan:
    """The cheapest variant for each power of two of tokens, neighbours of one variant merged."""
    candidates = [Variant()]
    if plan.stream and plan.mesh.tp > 1:
        candidates.append(Variant(split=True))
    if plan.experts and can_dispatch(plan.mesh) and _gathers(plan):
        candidates += [replace(each, dispatch=True) for each in candidates]
    found: list[tuple[int, Variant]] = []
    bucket = 1
    while True:
        bucket = min(bucket, max_tokens)
        best = min(candidates, key=lambda v: cost_s(plan, v, bucket, interconnect, itemsize))
        if found and found[-1][1] == best:
            found.pop()
        found.append((bucket, best))
        if bucket == max_tokens:
            break
        bucket *= 2
    return replace(
        plan, variants=tuple(v for _, v in found), buckets=tuple(most for most, _ in found)
    )


def can_dispatch(mesh: Mesh) -> bool:
    """Whether tokens can travel to their experts: ranks that share an expert share its tokens."""
    return mesh.ep > 1 and not {*mesh.axis_atoms("etp")} & {*mesh.axis_atoms("dp")}


def _gathers(plan: SpmdPlan) -> bool:
    """Whether experts get tokens of other dp ranks at all."""
    entries = [plan.sites.get((path, "in")) for path in plan.experts]
    return all(e is not None and any(m.kind == "all_gather" for m in e.moves) for e in entries)
