# SPDX-License-Identifier: MIT
"""Layouts on atoms, and the moves that turn one into another. Knows no modules and no tensors.

A move works on a set of atoms at once: neighbouring changes of one kind are one collective over all
the ranks that differ in those atoms.

    have -> need        move
    P  -> R             all_reduce
    P  -> S(d)          reduce_scatter
    S(d) -> R           all_gather
    S(a) -> S(b)        all_to_all
    R  -> S(d)          slice (no communication)
    anything else -> P  refused: only a module's own sum makes a partial value
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenspeed.spmd.mesh import AXES, Mesh
from tokenspeed.spmd.placement import Layout, Partial, Placement, Replicate, Shard

AtomLayout = tuple[Placement, ...]
MoveKind = Literal["slice", "reduce_scatter", "all_reduce", "all_to_all", "all_gather"]
_ORDER: tuple[MoveKind, ...] = (
    "slice",
    "reduce_scatter",
    "all_reduce",
    "all_to_all",
    "all_gather",
)


@dataclass(frozen=True)
class Move:
    """One step of a conversion, over all ranks that differ in `atoms`."""

    kind: MoveKind
    atoms: tuple[int, ...]
    dim: int = 0  # that is gathered, scattered or sliced; all_to_all: that becomes divided
    source_dim: int = 0  # all_to_all: that was divided


def on_atoms(layout: Layout, mesh: Mesh, where: str) -> AtomLayout:
    """The placement on each atom. `ValueError` naming `where` if the layout contradicts itself."""
    found: dict[int, tuple[str, Placement]] = {}
    for axis, placement in layout.items():
        if axis not in AXES or axis == "pp":
            raise ValueError(f"{where}: unknown mesh axis {axis!r}; axes are {', '.join(AXES[1:])}")
        if not isinstance(placement, (Replicate, Shard, Partial)):
            raise ValueError(f"{where}: unknown placement {placement!r} on axis {axis}")
        if isinstance(placement, Partial) and placement.reduce_op != "sum":
            raise ValueError(f"{where}: only sums can be partial, not {placement!r} on {axis}")
        for atom in mesh.axis_atoms(axis):
            other, before = found.setdefault(atom, (axis, placement))
            if before != placement:
                raise ValueError(
                    f"{where}: {placement!r} on {axis} contradicts {before!r} on {other}: "
                    "the axes are views of the same ranks"
                )
    return tuple(
        found[atom][1] if atom in found else Replicate() for atom in range(len(mesh.atoms))
    )


def hidden_on_atoms(layout: Layout, mesh: Mesh, where: str) -> AtomLayout:
    """`on_atoms` for hidden states [tokens, features].

    `ValueError` also for another dimension, and for tokens that other ranks divide while those of
    one dp rank are not held apart: their numbers would be known to nobody.
    """
    placed = on_atoms(layout, mesh, where)
    for placement in placed:
        if isinstance(placement, Shard) and placement.dim not in (0, 1):
            raise ValueError(f"{where}: {placement!r}: hidden states are [tokens, features]")
    dp = [placed[atom] == Shard(0) for atom in mesh.axis_atoms("dp")]
    if Shard(0) in placed and not all(dp):
        raise ValueError(f"{where}: tokens are divided over dp before any other axis")
    return placed


def axis_of(atom: int, mesh: Mesh, *layouts: Layout) -> str:
    """The name by which the layouts speak of an atom, for messages."""
    named = [axis for layout in layouts for axis in layout if atom in mesh.axis_atoms(axis)]
    return named[0] if named else label((atom,), mesh)


def label(atoms: Sequence[int], mesh: Mesh) -> str:
    """The axis that these atoms are, or the axes that they are together."""
    for axis in ("tp", "dp", "ep", "etp", "kv"):
        if mesh.axis_atoms(axis) == tuple(atoms):
            return axis
    inside = [a for a in ("dp", "tp") if mesh.axis_atoms(a) and set(mesh.axis_atoms(a)) < {*atoms}]
    return (
        " x ".join(inside)
        if inside
        else next(axis for axis in ("tp", "dp", "ep") if set(atoms) <= set(mesh.axis_atoms(axis)))
    )


def moves(have: AtomLayout, need: AtomLayout) -> tuple[Move, ...]:
    """The moves from `have` to `need`, the cheapest order first.

    `ValueError` says why there are none; the message has no place in it, the caller knows it.
    """
    found: dict[tuple[MoveKind, int, int], list[int]] = {}
    for atom, (source, target) in enumerate(zip(have, need, strict=True)):
        if source != target:
            found.setdefault(_kind(source, target), []).append(atom)
    done = [
        Move(kind, tuple(atoms), dim, source_dim)
        for (kind, dim, source_dim), atoms in sorted(
            found.items(), key=lambda item: _ORDER.index(item[0][0])
        )
    ]
    now = list(have)
    for move in done:
        _check_order(move, now)
        for atom in move.atoms:
            now[atom] = need[atom]
    return tuple(done)


def _kind(source: Placement, target: Placement) -> tuple[MoveKind, int, int]:
    if isinstance(target, Partial):
        raise ValueError("only a module's own sum can make a partial value")
    if isinstance(source, Partial):
        if isinstance(target, Shard):
            return "reduce_scatter", target.dim, 0
        return "all_reduce", 0, 0
    if isinstance(source, Shard):
        if isinstance(target, Shard):
            return "all_to_all", target.dim, source.dim
        return "all_gather", source.dim, 0
    if not isinstance(target, Shard):
        raise ValueError(f"{source!r} cannot become {target!r}")
    return "slice", target.dim, 0


def _check_order(move: Move, now: Sequence[Placement]) -> None:
    """Pieces along one dimension nest, the outer atom first: an outer one cannot move alone."""
    if move.kind == "all_reduce":
        return
    dims = {move.dim, move.source_dim} if move.kind == "all_to_all" else {move.dim}
    for atom in range(min(move.atoms) + 1, len(now)):
        placement = now[atom]
        if atom not in move.atoms and isinstance(placement, Shard) and placement.dim in dims:
            raise ValueError(
                f"an outer axis divides dimension {placement.dim} while an inner one already does; "
                "divide both or neither"
            )
