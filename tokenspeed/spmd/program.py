# SPDX-License-Identifier: MIT
"""Conversions as callables: what a compiled module calls in place of a collective by hand.

Knows groups, moves and how many tokens a step has; refuses to know modules and models.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

from torch import Tensor

from tokenspeed.spmd.compile import SpmdPlan
from tokenspeed.spmd.group import Communicator, Group
from tokenspeed.spmd.layout import Move
from tokenspeed.spmd.mesh import Mesh

Convert = Callable[[Tensor], Tensor]


class Step:
    """The step that is running: how many tokens each dp rank has, and which variant serves it."""

    def __init__(self, plan: SpmdPlan, rank: int) -> None:
        self.mesh, self._plan = plan.mesh, plan
        self._dp = plan.mesh.index("dp", rank)
        self.counts: Sequence[int] = [0] * plan.mesh.dp
        self.own = 0  # tokens of this dp rank
        self.split = self.dispatch = False

    def begin(self, tokens_per_dp: Sequence[int]) -> None:
        """`ValueError` unless there is one count for each dp rank."""
        if len(tokens_per_dp) != self.mesh.dp:
            raise ValueError(f"{len(tokens_per_dp)} token counts for {self.mesh.dp} dp ranks")
        self.counts, self.own = tokens_per_dp, tokens_per_dp[self._dp]
        variant = self._plan.variants[self._plan.variant_for(max(tokens_per_dp))]
        self.split, self.dispatch = variant.split, variant.dispatch

    def rows(self, atoms: Sequence[int], ranks: Sequence[int]) -> list[int]:
        """Tokens of each of `ranks` where `atoms` divide them: dp by request, others evenly."""
        dp = self.mesh.axis_atoms("dp")
        other = [atom for atom in atoms if atom not in dp]
        pieces = prod(self.mesh.atoms[atom] for atom in other)
        return [
            piece(self.counts[self.mesh.index("dp", rank)], pieces, place)
            for rank, place in ((r, self.mesh.atoms_index(other, r)) for r in ranks)
        ]


def piece(count: int, pieces: int, index: int) -> int:
    """How many of `count` rows the piece `index` of `pieces` near-equal ones has."""
    return count // pieces + (index < count % pieces)


def piece_start(count: int, pieces: int, index: int) -> int:
    """Where that piece begins."""
    return count // pieces * index + min(index, count % pieces)


class Groups:
    """The groups that a plan needs, made in the same order on every rank."""

    def __init__(self, plan: SpmdPlan, communicator: Communicator) -> None:
        mesh = self._mesh = plan.mesh
        sets = {move.atoms: None for site in plan.sites.values() for move in site.moves}
        sets |= {mesh.axis_atoms(axis): None for axis in ("tp", "dp", "ep")}
        sets |= {mesh.same_tokens: None}
        sets |= {rest: None for site in plan.sites.values() if (rest := _stays(site.have, mesh))}
        self._made = {
            atoms: communicator.group(mesh.groups(atoms)) for atoms in sorted(sets) if atoms
        }
        self.pipeline: Group | None = None
        if mesh.pp > 1:
            size = mesh.stage_ranks
            places = [tuple(range(at, mesh.num_ranks, size)) for at in range(size)]
            self.pipeline = communicator.group(places)

    @property
    def peers(self) -> Group | None:
        """The ranks of this stage that have the same tokens."""
        return self.over(self._mesh.same_tokens)

    def over(self, atoms: tuple[int, ...]) -> Group | None:
        """The group over these atoms; None where they are no ranks at all."""
        return self._made[atoms] if atoms else None


def _stays(have: Sequence[object], mesh: Mesh) -> tuple[int, ...]:
    """Atoms outside dp and tp: after all-to-all, sums over these remain to be added up."""
    inside = {*mesh.axis_atoms("dp"), *mesh.axis_atoms("tp")}
    return tuple(a for a in range(len(have)) if a not in inside)


def conversion(moves: Sequence[Move], groups: Groups, step: Step) -> Convert:
    """All moves one after the other."""
    steps = [_convert(move, groups, step) for move in moves]
    if len(steps) == 1:
        return steps[0]

    def run(x: Tensor) -> Tensor:
        for each in steps:
            x = each(x)
        return x

    return run


def _convert(move: Move, groups: Groups, step: Step) -> Convert:
    group = groups.over(move.atoms)
    if group is None:
        raise ValueError(f"{move} moves nothing")
    if move.kind == "all_reduce":
        return group.all_reduce
    return partial(_MOVES[move.kind], group, step, move)


def _sizes(group: Group, step: Step, move: Move, each: int) -> list[int]:
    """What each rank of the group holds along the move's dimension; features are even."""
    if move.dim == 0:
        return step.rows(move.atoms, group.ranks)
    return [each] * len(group.ranks)


def _reduce_scatter(group: Group, step: Step, move: Move, x: Tensor) -> Tensor:
    sizes = _sizes(group, step, move, x.shape[move.dim] // len(group.ranks))
    return group.reduce_scatter(x, move.dim, sizes)


def _all_gather(group: Group, step: Step, move: Move, x: Tensor) -> Tensor:
    return group.all_gather(x, move.dim, _sizes(group, step, move, x.shape[move.dim]))


def _slice(group: Group, step: Step, move: Move, x: Tensor) -> Tensor:
    sizes = _sizes(group, step, move, x.shape[move.dim] // len(group.ranks))
    return x.narrow(move.dim, sum(sizes[: group.index]), sizes[group.index]).contiguous()


def _all_to_all(group: Group, step: Step, move: Move, x: Tensor) -> Tensor:
    """From divided along one dimension to divided along the other, of [tokens, features]."""
    source, target = move.source_dim, move.dim
    count = len(group.ranks)
    tokens = step.rows(move.atoms, group.ranks)
    if (source, target) == (0, 1):
        own, width = x.shape[0], x.shape[1] // count
        packed = x.view(own, count, width).transpose(0, 1).reshape(own * count, width)
        return group.all_to_all(packed, [own] * count, tokens)
    if (source, target) == (1, 0):
        mine = tokens[group.index]
        got = group.all_to_all(x.contiguous(), tokens, [mine] * count)
        return got.view(count, mine, -1).transpose(0, 1).reshape(mine, -1)
    raise ValueError(f"no all-to-all from dimension {source} to {target} of hidden states")


_MOVES: dict[str, Callable[[Group, Step, Move, Tensor], Tensor]] = {
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "slice": _slice,
    "all_to_all": _all_to_all,
}
