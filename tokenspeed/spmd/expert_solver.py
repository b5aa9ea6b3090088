# SPDX-License-Identifier: MIT
"""From measured loads to expert placements: nodes first, then devices, moving little.

Groups of experts go to nodes (group-limited routing then keeps a token's experts on few nodes),
then each node's experts are replicated and packed on its ranks (`spmd/expert_search.py`). With an
old placement, each layer takes the cheapest of three: the old one, the old one improved in steps
that are worth their moves, a fresh one. Deterministic. Knows no weights and no time.
Source of the hierarchical scheme: arXiv:2412.19437, section 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenspeed.spmd.expert_placement import ExpertPlacement, check_slots
from tokenspeed.spmd.expert_search import Floats, Slots, improve, pack

GOOD_ENOUGH = 1.05  # heaviest rank over mean up to which no fresh placement is tried
MOVE_COST = 0.1


@dataclass(frozen=True)
class Solver:
    """Places `num_experts` + `num_redundant` experts on the `num_ranks` ranks of the `ep` axis.

    The ranks of a node are neighbours. `num_groups`: the router's groups of neighbouring experts;
    where nodes do not divide them, or there is one node, all ranks are treated alike. `move_cost`:
    by how much the heaviest rank over the mean must fall to be worth moving all of a layer's slots.
    """

    num_experts: int
    num_ranks: int
    num_redundant: int = 0
    num_nodes: int = 1
    num_groups: int = 1
    move_cost: float = MOVE_COST

    def __post_init__(self) -> None:
        check_slots(self.num_experts, self.num_ranks, self.num_redundant)
        if self.num_nodes < 1 or self.num_ranks % self.num_nodes:
            raise ValueError(
                f"{self.num_nodes} node(s) cannot share {self.num_ranks} rank(s) evenly"
            )
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"{self.num_experts} experts are not {self.num_groups} equal groups")

    def default(self) -> ExpertPlacement:
        return ExpertPlacement.default(self.num_experts, self.num_ranks, self.num_redundant)

    def solve(
        self, loads: NDArray[Any], old: Sequence[ExpertPlacement] | None = None
    ) -> list[ExpertPlacement]:
        """loads [num_layers, num_experts] tokens routed -> a placement for each layer.

        `ValueError`: loads of another shape, negative or not finite; `old` of other sizes.
        """
        wide = np.asarray(loads, np.float64)
        if wide.ndim != 2 or wide.shape[1] != self.num_experts:
            raise ValueError(f"loads must be [layers, {self.num_experts}]: {wide.shape}")
        if not np.isfinite(wide).all() or (wide < 0).any():
            raise ValueError("loads must be finite and not negative")
        if old is not None and len(old) != len(wide):
            raise ValueError(f"{len(old)} old placements for {len(wide)} layers")
        before = old if old is not None else [None] * len(wide)
        return [self._layer(row, was) for row, was in zip(wide, before, strict=True)]

    def _layer(self, loads: Floats, old: ExpertPlacement | None) -> ExpertPlacement:
        if not loads.any():
            return old or self.default()
        mean = float(loads.sum()) / self.num_ranks
        if old is None:
            return self._placement(self._fresh(loads, mean))
        if (old.num_experts, old.num_ranks) != (self.num_experts, self.num_ranks):
            raise ValueError(
                f"an old placement of {old.num_experts} experts, {old.num_ranks} ranks"
            )
        was = old.slots.reshape(self.num_ranks, -1).astype(np.int64)
        per_slot = self.move_cost / was.size
        candidates = [was, self._improved(was, loads, mean, per_slot)]
        if self._placement(candidates[1]).imbalance(loads) > GOOD_ENOUGH:
            candidates.append(_aligned(self._fresh(loads, mean), was, self.num_nodes))
        costs = [
            self._placement(slots).imbalance(loads) + per_slot * int((slots != was).sum())
            for slots in candidates
        ]
        return self._placement(candidates[int(np.argmin(costs))])

    def _placement(self, slots: Slots) -> ExpertPlacement:
        return ExpertPlacement(slots.reshape(-1), self.num_experts, self.num_ranks)

    @property
    def _grouped(self) -> bool:
        """Whether groups belong to nodes: these divide them and need no expert twice on a rank."""
        per_rank = (self.num_experts + self.num_redundant) // self.num_ranks
        divides = self.num_nodes > 1 and self.num_groups % self.num_nodes == 0
        return divides and per_rank <= self.num_experts // self.num_nodes

    def _fresh(self, loads: Floats, mean: float) -> Slots:
        per_rank = (self.num_experts + self.num_redundant) // self.num_ranks
        if not self._grouped:
            return improve(pack(loads, self.num_ranks, per_rank), loads, mean)
        size, ranks = self.num_experts // self.num_groups, self.num_ranks // self.num_nodes
        weights = loads.reshape(self.num_groups, size).sum(1)
        groups = pack(weights, self.num_nodes, self.num_groups // self.num_nodes)
        groups = improve(groups, weights, float(weights.sum()) / self.num_nodes)
        nodes = []
        for mine in groups:
            experts = (mine[:, None] * size + np.arange(size)).reshape(-1)
            packed = improve(pack(loads[experts], ranks, per_rank), loads[experts], mean)
            nodes.append(experts[packed])
        return np.concatenate(nodes)

    def _improved(self, was: Slots, loads: Floats, mean: float, per_slot: float) -> Slots:
        """Steps stay inside a node where groups belong to nodes."""
        slots = was.copy()
        for part in np.split(slots, self.num_nodes if self._grouped else 1):
            outside = self._counts(slots) - self._counts(part)
            part[:] = improve(part, loads, mean, per_slot, outside)
        return slots

    def _counts(self, slots: Slots) -> NDArray[np.int64]:
        counts: Slots = np.bincount(slots.reshape(-1), minlength=self.num_experts)
        return counts


def _aligned(new: Slots, old: Slots, num_nodes: int) -> Slots:
    """`new` with its nodes, the ranks in them and the slots in these renamed to resemble `old`."""
    common = _common(new, old)
    ranks = len(new) // num_nodes
    shared = common.reshape(num_nodes, ranks, num_nodes, ranks).sum((1, 3))
    out = np.empty_like(new)
    for node, to in _matched(shared):
        mine, theirs = slice(node * ranks, (node + 1) * ranks), slice(to * ranks, (to + 1) * ranks)
        for i, j in _matched(common[mine, theirs]):
            out[to * ranks + j] = _in_place(new[mine][i].tolist(), old[theirs][j].tolist())
    return out


def _common(new: Slots, old: Slots) -> NDArray[np.int64]:
    """[R, R] how many experts a new rank and an old one share."""
    size = int(max(new.max(), old.max())) + 1
    has = np.zeros((2, len(new), size), np.int64)
    rows = np.arange(len(new))[:, None]
    has[0, rows, new], has[1, rows, old] = 1, 1
    common: Slots = has[0] @ has[1].T
    return common


def _matched(common: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs (row, column), the largest first; each row and each column once."""
    rest, pairs = common.astype(np.float64), []
    for _ in range(len(common)):
        i, j = (int(n) for n in np.unravel_index(int(rest.argmax()), rest.shape))
        pairs.append((i, j))
        rest[i], rest[:, j] = -1, -1
    return pairs


def _in_place(new: list[int], old: list[int]) -> list[int]:
    """The experts of `new`, each where `old` has it if it does."""
    left = list(new)
    out: list[int | None] = []
    for expert in old:
        out.append(expert if expert in left else None)
        if expert in left:
            left.remove(expert)
    rest = iter(sorted(left))
    return [next(rest) if expert is None else expert for expert in out]
