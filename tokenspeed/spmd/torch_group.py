# SPDX-License-Identifier: MIT
"""Ranks over torch.distributed: gloo for CPU tensors, NCCL for CUDA. Knows no process launch.

Ragged pieces travel padded to the largest one. gloo sums bfloat16 in float32. Errors of the backend
are `RankDiedError`, and this rank's connections close with it, so that ranks which wait for this
one notice in their turn. NCCL itself does not notice a rank that died: there the engine's control
connections do.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from tokenspeed.errors import RankDiedError
from tokenspeed.spmd.call import own_part
from tokenspeed.spmd.group import Communicator, Group

# Newer versions of torch call them so, and warn of the old names.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_TCP_STORE: Any = dist.TCPStore  # type: ignore[attr-defined]
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def torch_communicator(
    rank: int, num_ranks: int, init_address: str, device: torch.device, timeout_s: float = 300.0
) -> "TorchCommunicator":
    """Joins the process group at `init_address` ("tcp://host:port"; rank 0 listens there).

    One per process. `RankDiedError`: not all came within `timeout_s`, which also bounds each call.
    """
    if dist.is_initialized():
        raise ValueError(
            "this process is already a rank of an engine over torch.distributed: one per process"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"no backend for tensors on {device}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    at, timeout = urlsplit(init_address), timedelta(seconds=timeout_s)
    with _translated(f"rank {rank} cannot meet the others at {init_address}", None):
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            # Made here: under torchrun `init_method` takes torchrun's store to be at any address.
            store=_TCP_STORE(at.hostname, at.port, num_ranks, rank == 0, timeout),
            rank=rank,
            world_size=num_ranks,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    return TorchCommunicator(rank, num_ranks, device)


class TorchCommunicator(Communicator):
    """See `Communicator`. Parts of a partition list their ranks in rising order."""

    def __init__(self, rank: int, num_ranks: int, device: torch.device) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self._groups: dict[tuple[tuple[int, ...], ...], TorchGroup] = {}

    def group(self, partition: Sequence[tuple[int, ...]]) -> Group:
        key = tuple(tuple(part) for part in partition)
        if key not in self._groups:
            ranks = own_part(key, self.rank, self.num_ranks)
            if any(list(part) != sorted(part) for part in key):
                raise ValueError(f"ranks of a part must rise: {list(key)}")
            self._groups[key] = TorchGroup(ranks, ranks.index(self.rank), self._make(key), self)
        return self._groups[key]

    def _make(self, partition: Sequence[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """Every rank takes part in making every group; parts of one rank need none."""
        mine = None
        for part in partition:
            if len(part) == self.num_ranks:
                return dist.group.WORLD
            if len(part) > 1:
                with _translated(f"group {part}", self):
                    made = dist.new_group(list(part))
                mine = made if self.rank in part else mine
        return mine

    def close(self) -> None:
        self._groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


class TorchGroup(Group):
    """See `Group`. `process_group` is None for one rank, which has nothing to say."""

    def __init__(
        self,
        ranks: tuple[int, ...],
        index: int,
        process_group: dist.ProcessGroup | None,
        communicator: TorchCommunicator,
    ) -> None:
        self.ranks = ranks
        self.index = index
        self._group = process_group
        self._communicator = communicator

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._group is None:
            return x
        wide = _summable(x).contiguous()
        with self._named("all_reduce"):
            dist.all_reduce(wide, group=self._group)
        return wide.to(x.dtype)

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        self._expect(x.shape[dim] == sizes[self.index], "all_gather", x, sizes)
        if self._group is None:
            return x
        most = max(sizes)
        rows = _padded(x.movedim(dim, 0), most)
        out = rows.new_empty([len(sizes) * most, *rows.shape[1:]])
        with self._named("all_gather"):
            _ALL_GATHER(out, rows, group=self._group)
        if min(sizes) < most:
            out = torch.cat([out[i * most : i * most + size] for i, size in enumerate(sizes)])
        return out.movedim(0, dim).contiguous()

    def reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        self._expect(x.shape[dim] == sum(sizes), "reduce_scatter", x, sizes)
        if self._group is None:
            return x
        most = max(sizes)
        pieces = torch.split(_summable(x).movedim(dim, 0), list(sizes))
        rows = torch.cat([_padded(piece, most) for piece in pieces])
        out = rows.new_empty([most, *rows.shape[1:]])
        with self._named("reduce_scatter"):
            _REDUCE_SCATTER(out, rows, group=self._group)
        return out[: sizes[self.index]].movedim(0, dim).to(x.dtype).contiguous()

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        self._expect(x.shape[0] == sum(send), "all_to_all", x, send)
        self._expect(send[self.index] == receive[self.index], "all_to_all", x, receive)
        if self._group is None:
            return x
        out = x.new_empty([sum(receive), *x.shape[1:]])
        with self._named("all_to_all"):
            dist.all_to_all_single(
                out, x.contiguous(), list(receive), list(send), group=self._group
            )
        return out

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        x = x.contiguous()
        if self._group is not None:
            with self._named("broadcast"):
                dist.broadcast(x, self.ranks[root], group=self._group)
        return x

    def send(self, x: Tensor, to: int) -> None:
        with self._named(f"send to rank {self.ranks[to]}"):
            dist.send(x.contiguous(), self.ranks[to], group=self._group)

    def receive(self, x: Tensor, source: int) -> Tensor:
        out = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        with self._named(f"receive from rank {self.ranks[source]}"):
            dist.recv(out, self.ranks[source], group=self._group)
        return x if out is x else x.copy_(out)

    def _named(self, call: str) -> AbstractContextManager[None]:
        rank = self.ranks[self.index]
        return _translated(f"rank {rank}: {call} in {self.ranks}", self._communicator)

    def _expect(self, holds: bool, kind: str, x: Tensor, sizes: Sequence[int]) -> None:
        if not holds:
            rank = self.ranks[self.index]
            raise ValueError(f"rank {rank}: {kind} of {list(x.shape)}: bad sizes {list(sizes)}")


def _summable(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 and not x.is_cuda else x


def _padded(x: Tensor, rows: int) -> Tensor:
    """x, contiguous, with rows of zeros added up to `rows`."""
    if len(x) == rows:
        return x.contiguous()
    out = x.new_zeros([rows, *x.shape[1:]])
    out[: len(x)] = x
    return out


@contextmanager
def _translated(what: str, communicator: TorchCommunicator | None) -> Iterator[None]:
    """The backend's errors as `RankDiedError`; this rank leaves then."""
    try:
        yield
    except RuntimeError as error:
        if communicator is not None:
            communicator.close()
        raise RankDiedError(f"{what}: {error}") from error
