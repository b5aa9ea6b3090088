# SPDX-License-Identifier: MIT
"""`ExpertPlacement`: which physical slot holds which logical expert. Knows no weights and no loads.

    rank        |    0    |    1    |        8 experts, 2 ranks, 2 redundant slots:
    slot        | 0 1 2 3 4 | 5 6 7 8 9 |    num_replicas of experts 0 and 4 is 2
    expert      | 0 1 2 3 4 | 4 5 6 7 0 |    replicas[4] = 4, 5

A token at place t of the step that is routed to expert e goes to slot
`replicas[e, t % num_replicas[e]]`, so that replicas share an expert's tokens evenly.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Move = tuple[int, int]  # slot that has the expert now, slot that gets a copy of it


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """One layer's experts on the ranks of the `ep` axis; every rank has equally many slots.

    `ValueError`: slots that the ranks cannot share evenly, an unknown expert, one without a slot.
    """

    slots: NDArray[
        np.signedinteger[Any]
    ]  # [num_slots] logical expert of each slot; a rank's slots are neighbours
    num_experts: int
    num_ranks: int

    def __post_init__(self) -> None:
        slots = np.asarray(self.slots)
        if slots.ndim != 1 or not np.issubdtype(slots.dtype, np.integer):
            raise ValueError(f"slots must be a list of expert ids: {slots.dtype} {slots.shape}")
        if self.num_ranks < 1 or len(slots) % self.num_ranks:
            raise ValueError(
                f"{len(slots)} slots cannot be shared evenly by {self.num_ranks} rank(s)"
            )
        if not 0 < self.num_experts <= len(slots):
            raise ValueError(f"{len(slots)} slots for {self.num_experts} experts")
        unknown = slots[(slots < 0) | (slots >= self.num_experts)]
        if len(unknown):
            raise ValueError(f"slots name expert {unknown[0]} of {self.num_experts}")
        missing = np.setdiff1d(np.arange(self.num_experts), slots)
        if len(missing):
            raise ValueError(f"{len(missing)} expert(s) without a slot, the first is {missing[0]}")
        slots = slots.astype(np.int32)
        slots.flags.writeable = False
        object.__setattr__(self, "slots", slots)

    @classmethod
    def default(cls, num_experts: int, num_ranks: int, num_redundant: int = 0) -> "ExpertPlacement":
        """Experts in order; each rank's redundant slots repeat the experts that follow its own."""
        check_slots(num_experts, num_ranks, num_redundant)
        per_rank = (num_experts + num_redundant) // num_ranks
        starts = np.arange(num_ranks + 1) * num_experts // num_ranks
        slots = (starts[:-1, None] + np.arange(per_rank)) % num_experts
        return cls(slots.reshape(-1).astype(np.int32), num_experts, num_ranks)

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    @property
    def slots_per_rank(self) -> int:
        return len(self.slots) // self.num_ranks

    @cached_property
    def num_replicas(self) -> Ints:
        """[E] slots that hold each expert."""
        return np.bincount(self.slots, minlength=self.num_experts).astype(np.int32)

    @cached_property
    def replicas(self) -> Ints:
        """[E, max_replicas] the slots of each expert in rising order, repeated to fill the row."""
        order = np.argsort(self.slots, kind="stable")
        counts = self.num_replicas.astype(np.int64)
        first = np.cumsum(counts) - counts
        place = np.arange(counts.max()) % counts[:, None]
        table: Ints = order[first[:, None] + place].astype(np.int32)
        return table

    def rank_loads(self, loads: NDArray[Any]) -> NDArray[np.float64]:
        """loads [E], tokens routed to each expert -> [num_ranks], tokens computed by each rank."""
        share = np.asarray(loads, np.float64) / self.num_replicas
        ranks: NDArray[np.float64] = share[self.slots].reshape(self.num_ranks, -1).sum(1)
        return ranks

    def imbalance(self, loads: NDArray[Any]) -> float:
        """The heaviest rank's load over the mean of all; 1 where nothing was routed."""
        ranks = self.rank_loads(loads)
        return float(ranks.max() / ranks.mean()) if ranks.any() else 1.0

    def moves_to(self, new: "ExpertPlacement") -> list[Move]:
        """The copies that turn this placement into `new`, by target slot.

        A source on the target's own rank is preferred; the others take turns.
        """
        if (new.num_experts, new.num_ranks, new.num_slots) != (
            self.num_experts,
            self.num_ranks,
            self.num_slots,
        ):
            raise ValueError(f"placements of different sizes: {self.num_slots}, {new.num_slots}")
        found: list[Move] = []
        asked = np.zeros(self.num_experts, np.int64)
        for target in np.flatnonzero(self.slots != new.slots).tolist():
            expert = new.slots[target]
            holders = self.replicas[expert, : self.num_replicas[expert]]
            own = holders[holders // self.slots_per_rank == target // self.slots_per_rank]
            found.append(
                (int(own[0] if len(own) else holders[asked[expert] % len(holders)]), target)
            )
            asked[expert] += not len(own)
        return found

    def to_json(self) -> str:
        return json.dumps(
            {
                "num_experts": self.num_experts,
                "num_ranks": self.num_ranks,
                "slots": self.slots.tolist(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "ExpertPlacement":
        """The inverse of `to_json`. `ValueError`: not such a text, or not a valid placement."""
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {"num_experts", "num_ranks", "slots"}:
            raise ValueError("an expert placement has num_experts, num_ranks and slots")
        sizes = [values["num_experts"], values["num_ranks"]]
        slots: Sequence[Any] = values["slots"]
        if not isinstance(slots, list) or not all(type(n) is int for n in [*sizes, *slots]):
            raise ValueError("an expert placement consists of whole numbers")
        if not all(0 <= n < 2**31 for n in [*sizes, *slots]):
            raise ValueError("an expert placement's numbers must be from 0 to 2^31 - 1")
        return cls(np.array(slots, np.int32), *sizes)


def check_slots(num_experts: int, num_ranks: int, num_redundant: int) -> None:
    """`ValueError`: redundant experts that the ranks cannot share evenly, or that are too many."""
    num_slots = num_experts + num_redundant
    if num_experts < 1 or num_ranks < 1 or num_redundant < 0:
        raise ValueError(f"no {num_experts} experts and {num_redundant} more on {num_ranks} ranks")
    if num_slots % num_ranks:
        raise ValueError(
            f"{num_experts} experts and {num_redundant} redundant ones cannot be shared evenly by "
            f"{num_ranks} ranks: num_redundant_experts must be {-num_experts % num_ranks} or that "
            f"plus a multiple of {num_ranks}"
        )
    if num_slots // num_ranks > num_experts:
        raise ValueError(
            f"{num_redundant} redundant experts are too many: {num_ranks} ranks would have "
            f"{num_slots // num_ranks} slots each for {num_experts} experts"
        )
