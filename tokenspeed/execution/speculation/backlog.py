# SPDX-License-Identifier: MIT
"""`Backlog`: what a model drafter has not fed yet, by slot. Knows no weights and no pages.

A place is a position of a sequence: what the model left there, and the token that is fed with it.

    sequence of a slot:   | fed ... | first ... end - 1 | next row begins at end
                                      kept here, at most `room` of them

Where more go by, the oldest are forgotten, and are a hole in the drafter's keys and values.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Backlog:
    """Keeps [width] features and an id for each place."""

    def __init__(
        self, num_slots: int, room: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._room = room
        self._first = np.zeros(num_slots, np.int64)
        self._end = np.full(num_slots, -1, np.int64)
        self._ids = torch.zeros(num_slots * room, dtype=torch.int64, device=device)
        self._beside = torch.zeros((num_slots * room, width), dtype=dtype, device=device)

    def forget(self, slots: NDArray[np.integer]) -> None:
        """Nothing is kept of these slots."""
        self._end[slots] = -1

    def counts(self, slots: Ints, starts: Ints) -> Ints:
        """[R] places kept right before `starts`."""
        end = self._end[slots]
        return np.where(end == starts, end - self._first[slots], 0)

    def tell(self, slots: Ints, starts: Ints, ids: Tensor) -> None:
        """The ids [R] that are fed with the last place kept, at `starts` - 1."""
        self._ids[self._at(slots, starts - 1)] = ids

    def read(self, slots: Ints, positions: Ints) -> tuple[Tensor, Tensor]:
        """Ids [n] and features [n, width] of places that are kept."""
        at = self._at(slots, positions)
        return self._ids[at], self._beside[at]

    def write(self, slots: Ints, positions: Ints, ids: Tensor, beside: Tensor) -> None:
        """Places [n], their ids [n] and features [n, width]: to be kept from now on."""
        at = self._at(slots, positions)
        self._ids[at], self._beside[at] = ids, beside

    def keep(self, slots: Ints, starts: Ints, ends: Ints) -> None:
        """From now on places [starts, ends) of these slots are kept, or the last `room` of them."""
        self._first[slots] = np.maximum(starts, ends - self._room)
        self._end[slots] = ends

    def _at(self, slots: Ints, positions: Ints) -> Tensor:
        return torch.from_numpy(slots * self._room + positions % self._room).to(self._ids.device)
