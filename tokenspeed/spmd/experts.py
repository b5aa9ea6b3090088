# SPDX-License-Identifier: MIT
"""Experts over ranks: which of them are here, and how tokens reach them and come back.

    gather     every token of the step is on every rank; a rank adds what its own experts say
    dispatch   a token goes once to each rank that holds one of its experts, and its sums come back

Knows slots and groups; refuses to know how experts were chosen and what they compute.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tokenspeed.spmd.expert_placement import ExpertPlacement
from tokenspeed.spmd.group import Group
from tokenspeed.spmd.program import Convert, Step, piece, piece_start

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Slots:
    """One layer's placement as lookup tables on the device. Replaced between steps only."""

    def __init__(self, placement: ExpertPlacement, place: int, device: torch.device) -> None:
        self.place, self._device = place, device
        self._load: Tensor | None = None
        self._places = torch.arange(0, device=device)[:, None]  # of tokens, as many as ever needed
        self.replace(placement)

    def replace(self, placement: ExpertPlacement) -> None:
        """Takes another placement with as many slots."""
        self.placement, self.per_rank = placement, placement.slots_per_rank
        replicas = placement.replicas
        inside = replicas - self.place * self.per_rank
        here = np.where((inside >= 0) & (inside < self.per_rank), inside, -1).astype(np.int32)
        self._replicas = torch.from_numpy(replicas.copy()).to(self._device)
        self._here = torch.from_numpy(here).to(self._device)
        self._counts = torch.from_numpy(placement.num_replicas.copy()).to(self._device)

    def count_into(self, load: Tensor) -> None:
        """From now on adds the tokens routed to each expert to `load` [E] int64."""
        self._load = load

    def count(self, ids: Tensor) -> None:
        """ids [T, k] of experts, each token's on one rank only."""
        if self._load is not None:
            ones = torch.ones(ids.numel(), dtype=torch.int64, device=ids.device)
            self._load.index_add_(0, ids.flatten(), ones)

    def physical(self, ids: Tensor) -> Tensor:
        """ids [T, k] of experts -> slots [T, k], replicas taken in turns of the token's place."""
        return self._look_up(self._replicas, ids)

    def local(self, ids: Tensor) -> Tensor:
        """ids [T, k] of experts -> indices into this rank's weights, -1 where others compute."""
        return self._look_up(self._here, ids)

    def _look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """table [E, max_replicas] int32, ids [T, k] int32 -> [T, k] int32"""
        if table.shape[1] == 1:
            return table.index_select(0, ids.flatten()).view(ids.shape)
        if len(self._places) < len(ids):
            self._places = torch.arange(2 * len(ids), device=ids.device)[:, None]
        chosen = ids.long()
        return table[chosen, self._places[: len(ids)] % self._counts[chosen]]

    def only(self, slots: Tensor, rank: int | Tensor) -> Tensor:
        """Slots as indices into the weights of `rank`, -1 for those of others."""
        inside = slots - rank * self.per_rank
        return torch.where((inside >= 0) & (inside < self.per_rank), inside, -1)


class Gathered:
    """`forward` of experts with every token on every rank. `slots` None: all experts are here."""

    def __init__(
        self, forward: Forward, slots: Slots | None, enter: Convert, leave: Convert
    ) -> None:
        self._forward, self._slots, self._enter, self._leave = forward, slots, enter, leave

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        x, weights, ids = self._enter(x), self._enter(weights), self._enter(ids)
        if self._slots is not None:
            if self._slots.place == 0:
                self._slots.count(ids)
            ids = self._slots.local(ids)
        return self._leave(self._forward(x, weights, ids))


class Dispatched:
    """`forward` of experts with all-to-all. Ranks that share tokens each take a piece of them."""

    def __init__(
        self,
        forward: Forward,
        slots: Slots,
        step: Step,
        ep: Group,
        sharing: tuple[int, int],
        leave: Convert,
    ) -> None:
        self._forward, self._slots, self._step, self._ep = forward, slots, step, ep
        self._pieces, self._piece = sharing
        self._leave = leave

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Sums over the ranks that share tokens are left to `leave`: each has zeros elsewhere."""
        begin = piece_start(len(x), self._pieces, self._piece)
        mine = slice(begin, begin + piece(len(x), self._pieces, self._piece))
        self._slots.count(ids[mine])
        out = torch.zeros(x.shape, dtype=_wide(x.dtype), device=x.device)
        out[mine] = self._exchange(x[mine], weights[mine], self._slots.physical(ids)[mine])
        return self._leave(out.to(x.dtype))

    def _exchange(self, x: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        """[t, hidden] -> [t, hidden], the sum of what all ranks' experts say of these tokens."""
        count, ep = len(self._ep.ranks), self._ep
        owner = torch.div(slots, self._slots.per_rank, rounding_mode="floor")
        wanted = torch.zeros((count, len(x)), dtype=torch.bool, device=x.device)
        for choice in owner.unbind(1):
            wanted[choice.long(), torch.arange(len(x), device=x.device)] = True
        rank, token = wanted.nonzero(as_tuple=True)
        send = wanted.sum(1).tolist()
        ones = [1] * count
        counts = torch.tensor(send, dtype=torch.int64, device=x.device)[:, None]
        receive = [int(n) for n in ep.all_to_all(counts, ones, ones).flatten().tolist()]
        local = self._slots.only(slots[token], rank[:, None].to(slots.dtype))
        got = [
            ep.all_to_all(rows.contiguous(), send, receive)
            for rows in (x[token], weights[token], local)
        ]
        back = ep.all_to_all(self._forward(got[0], got[1], got[2]), receive, send)
        out = torch.zeros(x.shape, dtype=_wide(x.dtype), device=x.device)
        return out.index_add_(0, token, back.to(out.dtype))


class Expert:
    """Chooses between the two forms for each step."""

    def __init__(self, step: Step, gathered: Gathered, dispatched: Dispatched | None) -> None:
        self._step, self._gathered, self._dispatched = step, gathered, dispatched

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if self._step.dispatch and self._dispatched is not None:
            return self._dispatched(x, weights, ids)
        return self._gathered(x, weights, ids)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
