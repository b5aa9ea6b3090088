# SPDX-License-Identifier: MIT
"""`Call`: what one rank asks of its group, as data to compare and to count. Moves no tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def own_part(partition: Sequence[tuple[int, ...]], rank: int, num_ranks: int) -> tuple[int, ...]:
    """The part that holds `rank`. `ValueError`: not every rank is in exactly one part."""
    if sorted(rank for part in partition for rank in part) != list(range(num_ranks)):
        raise ValueError(f"{list(partition)} is no partition of {num_ranks} ranks")
    return next(tuple(part) for part in partition if rank in part)


@dataclass(frozen=True)
class Call:
    """One call of one rank. `shape` is that of its own tensor; sizes run along `dim`."""

    kind: str
    ranks: tuple[int, ...]  # the group
    dtype: torch.dtype
    shape: tuple[int, ...]
    dim: int = 0
    sizes: tuple[int, ...] = ()  # all_to_all: rows sent to each rank
    receive: tuple[int, ...] = ()  # all_to_all: rows from each rank
    peer: int = -1  # root, receiver or source, in the group

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's tensor or of its result, whichever is larger."""
        elements = 1
        for axis, size in enumerate(self.shape):
            whole = max(size, sum(self.sizes), sum(self.receive)) if axis == self.dim else size
            elements *= whole
        return elements * self.dtype.itemsize

    def __str__(self) -> str:
        sizes = f", dim {self.dim}, sizes {list(self.sizes)}" if self.sizes else ""
        rows = f", receive {list(self.receive)}" if self.receive else ""
        peer = f", peer {self.peer}" if self.peer >= 0 else ""
        shape = f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"
        return f"{self.kind}({shape}{sizes}{rows}{peer}) in {self.ranks}"


@dataclass(frozen=True)
class Count:
    """Calls of one kind, and the bytes of all of them."""

    calls: int = 0
    num_bytes: int = 0
