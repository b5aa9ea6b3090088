# SPDX-License-Identifier: MIT
"""What the compiled model asks of communication: `Communicator` and `Group`. Knows no placements.

Implementations: `spmd/simulate.py` (threads of one process), `spmd/torch_group.py` (gloo, NCCL),
`spmd/shm_group.py` (processes of one machine, CPU tensors). All ranks of a group must make the same
calls in the same order.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """Some ranks that exchange tensors. `index` is this rank's place in `ranks`.

    Ragged: `sizes[i]` is what the i-th rank holds along `dim` (0 allowed); every rank knows all of
    them. Results are fresh tensors or the input's own memory; callers do not use the input again.
    Every rank gets bit-identical results where results are meant to be equal. A peer that died is
    `RankDiedError` within ten seconds, never a hang.
    """

    ranks: tuple[int, ...]
    index: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the group's ranks, on each of them."""

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """All ranks' pieces concatenated along `dim`, on each of them."""

    def reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """This rank's piece, along `dim`, of the sum."""

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows: the first `send[0]` of x go to the group's rank 0, the next to rank 1, and so on.

        The result is what came from rank 0, then from rank 1...: sum(receive) rows.
        """

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """`x` of the group's rank `root`; on the others x gives shape and dtype."""

    def send(self, x: Tensor, to: int) -> None:
        """Hands `x` to the group's rank `to`; returns when x may be changed again."""

    def receive(self, x: Tensor, source: int) -> Tensor:
        """Fills x with what the group's rank `source` sends, in the order in which it sends."""


class Communicator(Protocol):
    """All ranks of the engine."""

    rank: int
    num_ranks: int

    def group(self, partition: Sequence[tuple[int, ...]]) -> Group:
        """This rank's group of a partition of all ranks. All ranks ask in the same order."""

    def close(self) -> None:
        """Leaves. The groups are of no use afterwards."""
