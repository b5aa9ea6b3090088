# SPDX-License-Identifier: MIT
"""Type-checks placements from the token ids to the logits and finds where data has to move.

Reads three attributes of each module: `spec` (its boundary), `flows` (chains of children from its
input to its output) and its own parameters; it never looks at a forward. A wrong annotation is a
`ValueError` that names the module or the edge, what it has and what it needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokenspeed.spmd.layout import AtomLayout, axis_of, hidden_on_atoms, moves, on_atoms
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.placement import (
    Flow,
    Fused,
    Inline,
    Layout,
    ModuleSpec,
    Partial,
    Shard,
    tokens,
)
from tokenspeed.spmd.rules import RULES, Types
from tokenspeed.spmd.site import Site, check_sites

GENERIC = Mesh(dp=2, tp=4, kv=2, ep=4)  # every axis has ranks, and no two axes coincide


@dataclass(frozen=True)
class _Station:
    """A place in a flow: a child, or the composite's own input or output."""

    name: str
    path: str | None  # None: the composite's boundary
    inputs: Layout
    outputs: Layout


def check_model(model: nn.Module, mesh: Mesh) -> list[Site]:
    """All sites of `model` on `mesh`, in the order of its flows, after checking everything.

    Types are checked on a mesh where every axis counts first, so that one device refuses what many
    would.
    """
    modules = list(modules_of(model))
    specs = {path: spec_of(path, module) for path, module in modules}
    kinds = {path: spec.kind for path, spec in specs.items()}
    _check_borrowed(modules, specs)
    for each in (GENERIC, mesh):
        edges: dict[tuple[str, str], Site] = {}
        sites: dict[tuple[str, str], Site] = {}
        for path, module in modules:
            _check_leaf(path, module, specs[path], each)
        for path, module in modules:
            for site, from_sibling in _sites(path, module, specs[path], each):
                _add(edges, site)
                if site.moves or from_sibling:
                    _add(sites, _sunk(model, site, each))
        _check_root(model, each)
        check_sites(sites.values(), kinds, each)
    return [site for site in sites.values() if site.moves]


def modules_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module but lists, by path."""
    return ((p, m) for p, m in model.named_modules() if not isinstance(m, nn.ModuleList))


def spec_of(path: str, module: nn.Module) -> ModuleSpec:
    """The module's spec. `ValueError` if it has none, or one that its parameters do not fit."""
    spec = getattr(module, "spec", None)
    if not isinstance(spec, ModuleSpec):
        raise ValueError(f"{path or 'model'} ({type(module).__name__}) declares no ModuleSpec")
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if spec.kind == "composite" and own:
        raise ValueError(f"{path or 'model'}: a composite has parameters of its own: {own}")
    for name in own:
        if name not in spec.weights:
            raise ValueError(f"{path}: parameter {name} has no placement in its spec")
    return spec


def _check_borrowed(modules: list[tuple[str, nn.Module]], specs: dict[str, ModuleSpec]) -> None:
    """Who multiplies with another module's parameter says of it what its owner says."""
    owners = {
        id(parameter): (f"{path}.{name}", specs[path].weights[name])
        for path, module in modules
        for name, parameter in module.named_parameters(recurse=False)
    }
    for path, module in modules:
        for name, parameter in getattr(module, "borrowed", {}).items():
            owner, layout = owners[id(parameter)]
            if specs[path].weights.get(name) != layout:
                raise ValueError(
                    f"{path}: its {name} is {owner} and must be laid out as that is: {layout}"
                )


def _check_root(model: nn.Module, mesh: Mesh) -> None:
    """Who calls the model expects whole rows of its own tokens."""
    spec = spec_of("", model)
    for what, layout in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        have = on_atoms(layout, mesh, f"model {what}")
        for atom, (source, target) in enumerate(
            zip(have, on_atoms(tokens(), mesh, "model"), strict=True)
        ):
            if source != target:
                axis = axis_of(atom, mesh, layout)
                raise ValueError(
                    f"model: its {what} are {source!r} on {axis}, and the sampler needs {target!r}:"
                    " whole rows of logits for the tokens of one dp rank"
                )


def _check_leaf(path: str, module: nn.Module, spec: ModuleSpec, mesh: Mesh) -> None:
    if spec.kind == "composite":
        return
    if spec.kind not in RULES:
        raise ValueError(f"{path}: unknown kind {spec.kind!r}; known: {', '.join(RULES)}")
    present = {name for name, _ in module.named_parameters(recurse=False)}
    present |= set(getattr(module, "borrowed", ()))
    weights = {
        name: _weight_on_atoms(f"{path}.{name}", layout, mesh)
        for name, layout in spec.weights.items()
        if name in present
    }
    inputs = hidden_on_atoms(spec.inputs, mesh, path)
    outputs = hidden_on_atoms(spec.outputs, mesh, path)
    for atom in range(len(mesh.atoms)):
        types = Types(inputs[atom], outputs[atom], {n: w[atom] for n, w in weights.items()})
        try:
            wrong = RULES[spec.kind](types)
        except KeyError as name:
            raise ValueError(f"{path}: kind {spec.kind} needs a weight named {name}") from None
        if wrong is not None:
            plain = [w for w in spec.weights.values() if not isinstance(w, Fused)]
            axis = axis_of(atom, mesh, spec.inputs, spec.outputs, *plain)
            raise ValueError(f"{path or 'model'} ({type(module).__name__}), axis {axis}: {wrong}")
    if spec.kind == "residual_norm" and inputs != on_atoms(tokens(), mesh, path):
        raise ValueError(f"{path}: the residual stream is whole tokens of one's own dp rank")
    if spec.kind == "experts":
        over = tuple(atom for atom, placement in enumerate(weights["w2"]) if placement == Shard(0))
        if over != mesh.axis_atoms("ep"):
            raise ValueError(f"{path}: its experts must be divided over ep, and over nothing else")


def _weight_on_atoms(where: str, layout: Layout | Fused, mesh: Mesh) -> AtomLayout:
    """A fused weight's parts must agree; a part on `kv` counts as one on `tp`."""
    if not isinstance(layout, Fused):
        return on_atoms(layout, mesh, where)
    found = {}
    for number, part in enumerate(layout.parts):
        widened = {"tp" if axis == "kv" else axis: p for axis, p in part.layout.items()}
        found[number] = on_atoms(widened, mesh, f"{where} part {number}")
        if found[number] != found[0]:
            raise ValueError(
                f"{where}: part {number} is {dict(part.layout)}, part 0 is "
                f"{dict(layout.parts[0].layout)}: fused parts are divided alike"
            )
    return found[0]


def _sites(
    path: str, module: nn.Module, spec: ModuleSpec, mesh: Mesh
) -> Iterator[tuple[Site, bool]]:
    """Every edge into a child along the module's flows, and into its own output where that changes.

    With each, whether it comes from another child.
    """
    flows: tuple[Flow, ...] = getattr(module, "flows", ())
    where = path or "model"
    in_flows = {item.split(".")[0] for flow in flows for item in flow if isinstance(item, str)}
    if spec.kind == "composite" and not flows:
        raise ValueError(f"{where}: a composite has flows from its input to its output")
    for name, _ in module.named_children():
        if name not in in_flows:
            raise ValueError(f"{where}: child {name} stands in none of its flows")
    for flow in flows:
        before = _Station(f"{where} (input)", None, spec.inputs, spec.inputs)
        inline: Inline | None = None
        for item in flow:
            if isinstance(item, Inline):
                _check_inline(where, before, item, mesh)
                inline = item
                continue
            for station in _stations(path, module, item):
                yield from _edge(before, station, inline, mesh)
                before, inline = station, None
        if inline is None or inline.kind != "shared":
            end = _Station(f"{where} (output)", None, spec.outputs, spec.outputs)
            yield from _edge(before, end, inline, mesh)


def _stations(path: str, module: nn.Module, name: str) -> Iterator[_Station]:
    """A child, or the members of a list of children, one after the other."""
    try:
        child = module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{path or 'model'}: its flows name {name}, which it has not") from None
    many = isinstance(child, nn.ModuleList)
    members = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
    for index, member in members:
        full = ".".join(filter(None, (path, name, index if many else "")))
        spec = spec_of(full, member)
        yield _Station(full, full, spec.inputs, spec.outputs)


def _check_inline(where: str, before: _Station, inline: Inline, mesh: Mesh) -> None:
    have = on_atoms(before.outputs, mesh, before.name)
    own_tokens = on_atoms(tokens(), mesh, where)
    for atom, placement in enumerate(have):
        wrong = isinstance(placement, Partial)
        if inline.kind == "headwise":
            wrong |= (placement == Shard(0)) != (own_tokens[atom] == Shard(0))
        if inline.kind == "shared":
            wrong |= placement != own_tokens[atom]
        if wrong:
            axis = axis_of(atom, mesh, before.outputs)
            raise ValueError(
                f"{before.name} -> {where}.{inline.name}: has {placement!r} on {axis}, which a "
                f"{inline.kind} computation cannot take"
            )


def _edge(
    producer: _Station, consumer: _Station, inline: Inline | None, mesh: Mesh
) -> Iterator[tuple[Site, bool]]:
    have = hidden_on_atoms(producer.outputs, mesh, producer.name)
    need = hidden_on_atoms(consumer.inputs, mesh, consumer.name)
    sibling = producer.path is not None
    if have == need:
        if consumer.path is not None:
            yield Site(consumer.path, "in", producer.name, consumer.name, have, need, ()), sibling
        return
    edge = f"{producer.name} -> {consumer.name}"
    changed = [a for a in range(len(have)) if have[a] != need[a]]
    atom = next((a for a in changed if isinstance(need[a], Partial)), changed[0])
    axis = axis_of(atom, mesh, producer.outputs, consumer.inputs)
    what = f"{edge}: has {have[atom]!r} on {axis} but needs {need[atom]!r}"
    if inline is not None:
        raise ValueError(f"{what}; no collective can stand beside {inline.name} between them")
    try:
        found = moves(have, need)
    except ValueError as error:
        raise ValueError(f"{what}; {error}") from None
    if consumer.path is not None:
        yield Site(consumer.path, "in", producer.name, consumer.name, have, need, found), sibling
    elif producer.path is not None:
        yield Site(producer.path, "out", producer.name, consumer.name, have, need, found), sibling
    else:
        raise ValueError(f"{what}; nothing stands between them")


def _sunk(model: nn.Module, site: Site, mesh: Mesh) -> Site:
    """Moves an entry's conversion down to the one child that takes the input as it is."""
    while site.side == "in" and site.moves:
        module = model.get_submodule(site.module)
        flows: tuple[Flow, ...] = getattr(module, "flows", ())
        first = {flow[0] for flow in flows}
        if len(first) != 1:
            break
        (name,) = first
        if not isinstance(name, str) or isinstance(module.get_submodule(name), nn.ModuleList):
            break
        inner = spec_of(name, module.get_submodule(name))
        if on_atoms(inner.inputs, mesh, name) != site.need:
            break
        site = replace(site, module=f"{site.module}.{name}")
    return site


def _add(sites: dict[tuple[str, str], Site], site: Site) -> None:
    """Two edges into one boundary must ask for the same conversion, which is then done once."""
    other = sites.setdefault((site.module, site.side), site)
    if (other.have, other.need) != (site.have, site.need):
        raise ValueError(
            f"{site.producer} -> {site.consumer}: {site.module} also gets data from "
            f"{other.producer}, laid out otherwise"
        )
