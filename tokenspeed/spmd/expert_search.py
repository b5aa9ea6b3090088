# SPDX-License-Identifier: MIT
"""One layer's slots on the ranks of one node: a first packing, and local search from any packing.

`pack` replicates the heaviest experts and deals replicas to the lightest ranks, heaviest first
(LPT: Graham, 1969, with equal numbers of slots). `improve` takes load off the heaviest rank, one
step at a time: it swaps two slots, or gives a replica's slot to another expert. Deterministic;
knows no layers, no nodes and no old placement.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Slots = NDArray[np.int64]  # [num_ranks, slots_per_rank] experts
EVEN = 1.005  # heaviest over mean at which the search has nothing left to do
SMALL = 32  # slots up to which every replica's change is tried
EPS = 1e-9


def pack(loads: Floats, num_ranks: int, slots_per_rank: int) -> Slots:
    """loads [E] -> slots: every expert at least once, no more often than there are ranks."""
    counts = _replicate(loads, num_ranks, num_ranks * slots_per_rank)
    experts = np.repeat(np.arange(len(loads)), counts)
    share = (loads / counts)[experts]
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    lightest = [(0.0, rank) for rank in range(num_ranks)]
    for at in np.lexsort((experts, -share)).tolist():
        expert, passed = int(experts[at]), []
        while lightest and expert in held[lightest[0][1]]:
            passed.append(heapq.heappop(lightest))
        # If every rank with room has the expert already, one of them gets it twice.
        load, rank = heapq.heappop(lightest) if lightest else passed.pop(0)
        held[rank].append(expert)
        for entry in passed:
            heapq.heappush(lightest, entry)
        if len(held[rank]) < slots_per_rank:
            heapq.heappush(lightest, (load + float(share[at]), rank))
    return np.array(held, np.int64)


def _replicate(loads: Floats, num_ranks: int, num_slots: int) -> NDArray[np.int64]:
    """[E] replicas: each further slot goes to the expert whose replicas carry most."""
    counts = np.ones(len(loads), np.int64)
    heap = [(-load, expert) for expert, load in enumerate(loads.tolist())]
    heapq.heapify(heap)
    for _ in range(num_slots - len(loads)):
        expert = heapq.heappop(heap)[1]
        counts[expert] += 1
        if counts[expert] < num_ranks:
            heapq.heappush(heap, (-float(loads[expert]) / int(counts[expert]), expert))
    return counts


def improve(
    slots: Slots,
    loads: Floats,
    mean: float,
    cost_per_slot: float = 0.0,
    outside: NDArray[np.int64] | int = 0,
) -> Slots:
    """A better packing, reached by steps that are worth what they move.

    `mean` is the mean load of all ranks; a step must lower the heaviest rank it touches by more
    than `cost_per_slot` x mean for each slot that changes. `outside`: [E] replicas elsewhere.
    """
    search = _Search(slots.copy(), loads, mean, cost_per_slot, outside)
    for _ in range(4 * slots.size):
        if not search.step():
            break
    return search.slots


@dataclass
class _Search:
    slots: Slots
    loads: Floats  # [E]
    mean: float
    cost: float
    outside: NDArray[np.int64] | int
    copies: NDArray[np.int64] = field(init=False)  # [num_ranks, E] replicas on each rank
    counts: NDArray[np.int64] = field(init=False)  # [E] replicas, those outside too

    def __post_init__(self) -> None:
        num_ranks = len(self.slots)
        self.copies = np.zeros((num_ranks, len(self.loads)), np.int64)
        np.add.at(self.copies, (np.arange(num_ranks)[:, None], self.slots), 1)
        self.counts = self.copies.sum(0) + self.outside

    def step(self) -> bool:
        """Takes the step that gains most; False if none is worth its cost."""
        share = self.loads / np.maximum(self.counts, 1)
        ranks = (share[self.slots]).sum(1)
        heaviest = int(ranks.argmax())
        if ranks[heaviest] <= EVEN * ranks.mean():
            return False
        swap_gain, swap = self._swap(share, ranks, heaviest)
        other_gain, other = self._replace(share, ranks, heaviest)
        if max(swap_gain, other_gain) <= EPS:
            return False
        for rank, place, expert in swap if swap_gain >= other_gain else other:
            self._put(rank, place, expert)
        return True

    def _put(self, rank: int, place: int, expert: int) -> None:
        old = int(self.slots[rank, place])
        self.slots[rank, place] = expert
        for changed, by in ((old, -1), (expert, 1)):
            self.copies[rank, changed] += by
            self.counts[changed] += by

    def _gain(self, ranks: Floats, heaviest: int, after: Floats, num_slots: int) -> Floats:
        gain: Floats = (ranks[heaviest] - after) / self.mean - self.cost * num_slots
        return gain

    def _swap(
        self, share: Floats, ranks: Floats, heaviest: int
    ) -> tuple[float, list[tuple[int, int, int]]]:
        """The best exchange of a slot of the heaviest rank [P] with a slot [R, P] of another."""
        mine, slots = self.slots[heaviest], self.slots
        given = share[mine][:, None, None] - share[slots]  # [P, R, P]
        after = np.maximum(ranks[heaviest] - given, ranks[None, :, None] + given)
        has = self.copies > 0
        after[has[:, mine].T] = np.inf  # the other rank has it already
        after[:, has[heaviest][slots]] = np.inf  # this rank has it already, or is the other one
        best = int(after.argmin())
        i, rank, j = (int(n) for n in np.unravel_index(best, after.shape))
        gain = float(self._gain(ranks, heaviest, after[i, rank, j], 2))
        return gain, [(heaviest, i, int(slots[rank, j])), (rank, j, int(mine[i]))]

    def _replace(
        self, share: Floats, ranks: Floats, heaviest: int
    ) -> tuple[float, list[tuple[int, int, int]]]:
        """The best change of a replica's slot into one more replica of another expert.

        In a large problem only experts of the heaviest rank are tried.
        """
        at, place = np.nonzero(self.counts[self.slots] > 1)  # [K]
        if not len(at):
            return -np.inf, []
        old, new = self.slots[at, place], np.unique(self.slots[heaviest])  # [K], [B]
        if self.slots.size <= SMALL:
            new = np.unique(self.slots)
        less = self.loads[old] / (self.counts[old] - 1)  # share of a replica of `old` afterwards
        more = self.loads[new] / (self.counts[new] + 1)
        after = ranks + self.copies[:, old].T * (less - share[old])[:, None]  # [K, R]
        after[np.arange(len(at)), at] -= less
        after = after[:, None] + self.copies[:, new].T * (more - share[new])[:, None]  # [K, B, R]
        after[np.arange(len(at)), :, at] += more
        touched = (self.copies[:, old].T > 0)[:, None] | (self.copies[:, new].T > 0)
        touched[:, :, heaviest] = True
        top = np.where(touched, after, -np.inf).max(2)
        top[(self.copies[at][:, new] > 0) | (old[:, None] == new)] = np.inf
        k, b = (int(n) for n in np.unravel_index(int(top.argmin()), top.shape))
        gain = float(self._gain(ranks, heaviest, top[k, b], 1))
        return gain, [(int(at[k]), int(place[k]), int(new[b]))]
