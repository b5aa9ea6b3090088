# SPDX-License-Identifier: MIT
"""Ranks that are processes of one machine, over shared memory: CPU tensors only (Linux).

Each group has a segment of its own (csrc/shm/group.h says how it works), whose name is gone once
all of its ranks have it: nothing stays behind, however they end. Knows no process launch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenspeed import _shm
from tokenspeed.spmd.call import own_part
from tokenspeed.spmd.group import Communicator, Group


def shm_communicator(
    rank: int, num_ranks: int, name: str, timeout_s: float = 300.0
) -> "ShmCommunicator":
    """Meets the other ranks under `name`, which they alone use. `RankDiedError`: one did not come.

    `timeout_s` is also how long a call waits for a rank that lives but does not answer. A rank that
    dies ends the others' calls within a fraction of a second.
    """
    return ShmCommunicator(rank, num_ranks, name, timeout_s)


class ShmCommunicator(Communicator):
    """See `Communicator`. Sums of bfloat16 are taken in float32 and rounded once."""

    def __init__(self, rank: int, num_ranks: int, name: str, timeout_s: float) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} of {num_ranks}")
        if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
            raise ValueError(f"torch {torch.__version__} has no DLPack exchange API: use gloo")
        self.rank = rank
        self.num_ranks = num_ranks
        self._name = name
        self._timeout_s = timeout_s
        self._all = _shm.Group(f"{name}-all", list(range(num_ranks)), rank, timeout_s, None)
        self._groups: dict[tuple[tuple[int, ...], ...], ShmGroup] = {}

    def group(self, partition: Sequence[tuple[int, ...]]) -> Group:
        key = tuple(tuple(part) for part in partition)
        if key not in self._groups:
            ranks = own_part(key, self.rank, self.num_ranks)
            index = ranks.index(self.rank)
            if ranks == tuple(range(self.num_ranks)):
                memory = self._all
            else:
                name = f"{self._name}-{len(self._groups)}-{ranks[0]}"
                memory = _shm.Group(name, list(ranks), index, self._timeout_s, self._all)
            self._groups[key] = ShmGroup(ranks, index, memory)
        return self._groups[key]

    def close(self) -> None:
        for group in self._groups.values():
            group.memory.leave()
        self._all.leave()


class ShmGroup(Group):
    """See `Group`. Calls that do not fit those of another rank: `RuntimeError` naming it.

    `send` waits for its receiver where the tensor is larger than a mailbox of 64 KiB.
    """

    def __init__(self, ranks: tuple[int, ...], index: int, memory: _shm.Group) -> None:
        self.ranks = ranks
        self.index = index
        self.memory = memory

    def all_reduce(self, x: Tensor) -> Tensor:
        if len(self.ranks) == 1:
            return x
        x = x.contiguous()
        self.memory.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        dim %= x.dim()
        shape = list(x.shape)
        shape[dim] = sum(sizes)
        out = x.new_empty(shape)
        self.memory.all_gather(x.contiguous(), out, dim, list(sizes))
        return out

    def reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        dim %= x.dim()
        shape = list(x.shape)
        shape[dim] = sizes[self.index]
        out = x.new_empty(shape)
        self.memory.reduce_scatter(x.contiguous(), out, dim, list(sizes))
        return out

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        out = x.new_empty([sum(receive), *x.shape[1:]])
        self.memory.all_to_all(x.contiguous(), out, list(send), list(receive))
        return out

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        x = x.contiguous()
        self.memory.broadcast(x, root)
        return x

    def send(self, x: Tensor, to: int) -> None:
        self.memory.send(x.contiguous(), to)

    def receive(self, x: Tensor, source: int) -> Tensor:
        out = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        self.memory.receive(out, source)
        return x if out is x else x.copy_(out)
