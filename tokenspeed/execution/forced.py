# SPDX-License-Identifier: MIT
"""`ForcedOutputs`: ids that requests dictate, put in the place of those that were sampled.

Which id it is follows from its position alone, as noise does: nothing is counted, so a request that
is bound again, or verifies drafts, is where it was. Knows slots and positions; refuses to know how
ids are sampled, and when a request ends.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


class ForcedOutputs:
    """False while no slot has any; then nothing here need be called but `bind`."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._held: dict[int, tuple[int, torch.Tensor]] = {}  # prompt length and ids, by slot
        self._shape, self._device = max_num_seqs, device

    def __bool__(self) -> bool:
        return bool(self._held)

    def bind(self, slot: int, prompt_len: int, ids: Sequence[int] | None) -> None:
        """The slot's output is `ids`; None: what is sampled."""
        if ids is None and slot not in self._held:
            return
        self._held.pop(slot, None)
        if ids is not None:
            self._held[slot] = (prompt_len, torch.tensor(ids, dtype=torch.int64))
        self._lay_out()

    def impose(
        self, ids: torch.Tensor, slots: NDArray[np.int32], places: torch.Tensor
    ) -> torch.Tensor:
        """ids [L] int64 at `places` [L] int64 of `slots` [L] -> those that come. -1 stays -1."""
        at = torch.from_numpy(slots.astype(np.int64)).to(self._device)
        index = places + self._shifts[at]
        dictated = (index < self._ends[at]) & (ids >= 0)
        return torch.where(dictated, self._ids[index.clamp(0, len(self._ids) - 1)], ids)

    def _lay_out(self) -> None:
        """All ids in a row: the slot's at place p is the one at p + shift, before its end."""
        shifts = torch.zeros(self._shape, dtype=torch.int64)
        ends = torch.zeros(self._shape, dtype=torch.int64)  # 0: before any place
        begin = 0
        for slot, (prompt_len, ids) in self._held.items():
            shifts[slot], ends[slot] = begin - prompt_len, begin + len(ids)
            begin += len(ids)
        held = [ids for _, ids in self._held.values()]
        self._shifts, self._ends = shifts.to(self._device), ends.to(self._device)
        self._ids = torch.cat(held).to(self._device) if held else ends
