# SPDX-License-Identifier: MIT
"""`Site`: where data is laid out anew, and where none can be although the types would allow it.

A conversion is attached to one module and lays one tensor of the step's tokens anew. Knows kinds of
modules, no modules.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tokenspeed.spmd.layout import AtomLayout, Move, label
from tokenspeed.spmd.mesh import Mesh


@dataclass(frozen=True)
class Site:
    """A module's boundary at which data is laid out anew; without `moves`, one that is checked."""

    module: str  # its path
    side: Literal["in", "out"]
    producer: str  # the edge, for people
    consumer: str
    have: AtomLayout
    need: AtomLayout
    moves: tuple[Move, ...]


def after_stream(kinds: Mapping[str, str]) -> list[str]:
    """Modules that see sampled rows: linears outside of all that the residual stream runs through.

    `kinds` of all modules by path.
    """
    stream = [p.rpartition(".")[0] for p, kind in kinds.items() if kind == "residual_norm"]
    inside = tuple(f"{parent}." for parent in stream if parent)
    linears = [path for path, kind in kinds.items() if kind == "linear"]
    return [path for path in linears if stream and not path.startswith(inside)]


def check_sites(sites: Iterable[Site], kinds: Mapping[str, str], mesh: Mesh) -> None:
    """`ValueError` names the edge on which no conversion can stand, and why."""
    sampled = after_stream(kinds)
    for site in sites:
        for move in site.moves:
            wrong = _wrong(site, move, kinds, sampled, mesh)
            if wrong is not None:
                raise ValueError(
                    f"{site.producer} -> {site.consumer}: {wrong}; this needs {move.kind} over "
                    f"{label(move.atoms, mesh)}"
                )


def _wrong(
    site: Site, move: Move, kinds: Mapping[str, str], sampled: list[str], mesh: Mesh
) -> str | None:
    kind = kinds[site.module]
    if kind == "residual_norm":
        inside = set(move.atoms) <= set(mesh.axis_atoms("tp"))
        if site.side == "out" or move.kind != "all_reduce" or not inside:
            return "the residual stream takes sums over tp or whole tokens"
    if kind in ("mean_square", "head_linear"):
        return "several tensors enter it, and a conversion lays one anew"
    if site.module in sampled and move.kind != "all_reduce" and 0 in (move.dim, _source(move)):
        return "its rows are those that are sampled, not the tokens of the step"
    within = f"{site.module}."
    if kind == "composite" and any(
        path.startswith(within) for path, k in kinds.items() if k == "embedding"
    ):
        return "token ids are laid anew at the embedding only"
    return None


def _source(move: Move) -> int:
    """The dimension that was divided; that of the move where there is but one."""
    return move.source_dim if move.kind == "all_to_all" else move.dim
