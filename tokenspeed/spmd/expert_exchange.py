# SPDX-License-Identifier: MIT
"""Moves experts' weights between ranks when a placement changes. Knows no loads and no reasons."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenspeed.spmd.expert_placement import ExpertPlacement
from tokenspeed.spmd.group import Group


@torch.inference_mode()
def exchange(
    weights: Sequence[Tensor], old: ExpertPlacement, new: ExpertPlacement, group: Group
) -> int:
    """Makes weights [slots_per_rank, ...], laid out by `old`, those of `new`, in place.

    All ranks of the `ep` group call it together. Rows are copied out before any is overwritten, so
    a slot may be source and target at once. Returns how many slots changed on all ranks.
    `ValueError`: the group or a weight does not fit the placements.
    """
    if len(group.ranks) != old.num_ranks:
        raise ValueError(f"a placement on {old.num_ranks} ranks, a group of {len(group.ranks)}")
    per_rank, me = old.slots_per_rank, group.index
    if any(len(weight) != per_rank for weight in weights):
        raise ValueError(f"weights must have {per_rank} rows: {[len(w) for w in weights]}")
    moves = [(divmod(a, per_rank), divmod(b, per_rank)) for a, b in old.moves_to(new)]
    if not moves:
        return 0
    # Both sides order rows by the other side's rank, then by the slot that they go to.
    leave = sorted((to, source[1]) for source, to in moves if source[0] == me)
    enter = sorted((source[0], to[1]) for source, to in moves if to[0] == me)
    send, receive = [0] * old.num_ranks, [0] * old.num_ranks
    for (rank, _), _ in leave:
        send[rank] += 1
    for rank, _ in enter:
        receive[rank] += 1
    for weight in weights:
        rows = weight[_index([slot for _, slot in leave], weight)].flatten(1)
        rows = group.all_to_all(rows, send, receive)
        weight[_index([slot for _, slot in enter], weight)] = rows.view(-1, *weight.shape[1:])
    return len(moves)


def _index(slots: list[int], like: Tensor) -> Tensor:
    return torch.tensor(slots, dtype=torch.int64, device=like.device)
