# SPDX-License-Identifier: MIT
"""Virtual ranks: threads of one process whose collectives are plain sums and concatenations.

Knows no transport. Sums run in rank order in the tensor's own dtype (bfloat16 and float16: in
float32, rounded once), so results are deterministic and equal on all ranks. Ranks that disagree on
a call, and ranks that wait for each other for ever, are errors that name the ranks and their calls.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from tokenspeed.errors import RankDiedError
from tokenspeed.spmd.call import Call, Count, own_part
from tokenspeed.spmd.group import Communicator, Group

T = TypeVar("T")
Partition = Sequence[tuple[int, ...]]
_GRACE_S = 5.0  # for the other ranks to notice a failure


def run_ranks(
    num_ranks: int, work: Callable[["VirtualCommunicator"], T], timeout_s: float = 120.0
) -> list[T]:
    """Runs `work` on every rank at once; its results by rank.

    The first rank's exception ends the others at their next call and is raised again with a note
    that names the rank. `TimeoutError` after `timeout_s` names the ranks that still run.
    """
    world = _World(num_ranks)
    results: dict[int, T] = {}
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def body(rank: int) -> None:
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                results[rank] = work(VirtualCommunicator(rank, world))
        except BaseException as error:
            world.fail(rank, error)
        else:
            world.end(rank)

    threads = [
        threading.Thread(target=body, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(num_ranks)
    ]
    for thread in threads:
        thread.start()
    if not world.over.wait(timeout_s):
        error = TimeoutError(f"after {timeout_s} s: {world.state()}")
        world.fail(-1, error)
        raise error
    for thread in threads:
        thread.join(timeout_s if world.failure is None else _GRACE_S)
    if world.failure is not None:
        raise world.failure
    return [results[rank] for rank in range(num_ranks)]


class VirtualCommunicator(Communicator):
    """One virtual rank. `calls` records what it asked of groups of several ranks."""

    def __init__(self, rank: int, world: "_World") -> None:
        self.rank = rank
        self.num_ranks = world.num_ranks
        self.calls: list[Call] = []
        self._world = world
        self._asked: dict[tuple[tuple[int, ...], ...], VirtualGroup] = {}

    def group(self, partition: Partition) -> Group:
        key = tuple(tuple(part) for part in partition)
        if key not in self._asked:
            ranks = own_part(key, self.rank, self.num_ranks)
            self._world.check_order(self.rank, len(self._asked), key)
            self._asked[key] = VirtualGroup(self, ranks, self._world)
        return self._asked[key]

    @property
    def counts(self) -> dict[str, Count]:
        """Calls and bytes by kind."""
        counts: dict[str, Count] = defaultdict(Count)
        for call in self.calls:
            old = counts[call.kind]
            counts[call.kind] = Count(old.calls + 1, old.num_bytes + call.num_bytes)
        return dict(counts)

    def close(self) -> None:
        """Nothing to leave: the threads end with `run_ranks`."""


class VirtualGroup(Group):
    """A rank's view of a group; see `Group`."""

    def __init__(
        self, communicator: VirtualCommunicator, ranks: tuple[int, ...], world: "_World"
    ) -> None:
        self.ranks = ranks
        self.index = ranks.index(communicator.rank)
        self._communicator = communicator
        self._world = world

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._meet(self._call("all_reduce", x), x)

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        dim = dim % x.dim()
        self._expect(x.shape[dim] == sizes[self.index], "all_gather", x, sizes)
        return self._meet(self._call("all_gather", x, dim=dim, sizes=tuple(sizes)), x)

    def reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        dim = dim % x.dim()
        self._expect(x.shape[dim] == sum(sizes), "reduce_scatter", x, sizes)
        return self._meet(self._call("reduce_scatter", x, dim=dim, sizes=tuple(sizes)), x)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        self._expect(x.shape[0] == sum(send), "all_to_all", x, send)
        self._expect(send[self.index] == receive[self.index], "all_to_all", x, receive)
        return self._meet(self._call("all_to_all", x, sizes=tuple(send), receive=tuple(receive)), x)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return self._meet(self._call("broadcast", x, peer=root), x)

    def send(self, x: Tensor, to: int) -> None:
        call = self._call("send", x, peer=to)
        self._world.send(self._rank, (self.ranks, self.index, to), _Posted(call, x.clone()))

    def receive(self, x: Tensor, source: int) -> Tensor:
        call = self._call("receive", x, peer=source)
        posted = self._world.receive(self._rank, (self.ranks, source, self.index), call)
        if (posted.call.shape, posted.call.dtype) != (call.shape, call.dtype):
            raise RuntimeError(
                f"ranks disagree: rank {self.ranks[source]} calls {posted.call}, "
                f"rank {self._rank} calls {call}"
            )
        x.copy_(posted.tensor)
        return x

    @property
    def _rank(self) -> int:
        return self.ranks[self.index]

    def _call(self, kind: str, x: Tensor, **fields: object) -> Call:
        call = Call(kind, self.ranks, x.dtype, tuple(x.shape))
        return self._record(replace(call, **fields))  # type: ignore[arg-type]

    def _record(self, call: Call) -> Call:
        self._expect(call.peer < len(self.ranks), call.kind, None, [call.peer])
        if len(self.ranks) > 1:
            self._communicator.calls.append(call)
        return call

    def _meet(self, call: Call, x: Tensor) -> Tensor:
        return self._world.meet(self._rank, self.index, _Posted(call, x))

    def _expect(self, holds: bool, kind: str, x: Tensor | None, sizes: Sequence[int]) -> None:
        if not holds:
            shape = "" if x is None else f" of {list(x.shape)}"
            raise ValueError(f"rank {self._rank}: {kind}{shape}: bad sizes {list(sizes)}")


@dataclass
class _Posted:
    call: Call
    tensor: Tensor


@dataclass
class _Wait:
    """A rank that waits. Whoever completes it takes it out of `_World.waiting`."""

    call: Call
    done: threading.Event = field(default_factory=threading.Event)


class _World:
    """What the threads share; everything but `over` under one lock.

    Every rank runs, waits (`waiting`) or has ended. When none runs, the waiting ones wait for ever,
    and that is the failure of the run.
    """

    def __init__(self, num_ranks: int) -> None:
        if num_ranks < 1:
            raise ValueError(f"at least one rank is needed, not {num_ranks}")
        self.num_ranks = num_ranks
        self.over = threading.Event()
        self.failure: BaseException | None = None
        self._lock = threading.Lock()
        self._waiting: dict[int, _Wait] = {}
        self._ended: set[int] = set()
        self._order: list[tuple[tuple[int, ...], ...]] = []
        self._posted: dict[tuple[int, ...], dict[int, _Posted]] = defaultdict(dict)
        self._results: dict[int, Tensor] = {}
        self._queues: dict[object, deque[_Posted]] = defaultdict(deque)

    def check_order(self, rank: int, place: int, key: tuple[tuple[int, ...], ...]) -> None:
        """All ranks ask for the same partitions in the same order."""
        with self._lock:
            if place == len(self._order):
                self._order.append(key)
            if self._order[place] != key:
                raise RuntimeError(
                    f"rank {rank} asks for partition {key} where others asked for "
                    f"{self._order[place]}"
                )

    def meet(self, rank: int, index: int, posted: _Posted) -> Tensor:
        """Waits for the whole group; the last to come combines what all posted."""
        ranks = posted.call.ranks
        with self._lock:
            self._check(rank)
            present = self._posted[ranks]
            present[index] = posted
            if len(present) < len(ranks):
                wait = self._wait(rank, posted.call)
            else:
                self._results.update(zip(ranks, _combine(present), strict=True))
                present.clear()
                for other in ranks:
                    if other != rank:
                        self._waiting.pop(other).done.set()
                return self._results.pop(rank)
        wait.done.wait()
        with self._lock:
            self._check(rank)
            return self._results.pop(rank)

    def send(self, rank: int, queue: object, posted: _Posted) -> None:
        with self._lock:
            self._check(rank)
            self._queues[queue].append(posted)
            to = posted.call.ranks[posted.call.peer]
            wait = self._waiting.get(to)
            source = posted.call.ranks.index(rank)
            if wait and (wait.call.kind, wait.call.ranks, wait.call.peer) == (
                "receive",
                posted.call.ranks,
                source,
            ):
                self._waiting.pop(to).done.set()

    def receive(self, rank: int, queue: object, call: Call) -> _Posted:
        with self._lock:
            self._check(rank)
            if self._queues[queue]:
                return self._queues[queue].popleft()
            wait = self._wait(rank, call)
        wait.done.wait()
        with self._lock:
            self._check(rank)
            return self._queues[queue].popleft()

    def fail(self, rank: int, error: BaseException) -> None:
        with self._lock:
            self._fail(rank, error)

    def end(self, rank: int) -> None:
        with self._lock:
            self._ended.add(rank)
            self._find_deadlock()
            if len(self._ended) == self.num_ranks:
                self.over.set()

    def state(self) -> str:
        """What each rank does."""
        return "; ".join(
            f"rank {rank} "
            + (
                f"waits in {self._waiting[rank].call}"
                if rank in self._waiting
                else "has ended"
                if rank in self._ended
                else "runs"
            )
            for rank in range(self.num_ranks)
        )

    def _wait(self, rank: int, call: Call) -> _Wait:
        wait = self._waiting[rank] = _Wait(call)
        self._find_deadlock()
        return wait

    def _find_deadlock(self) -> None:
        if self._waiting and len(self._waiting) + len(self._ended) == self.num_ranks:
            self._fail(-1, RuntimeError(f"ranks wait for ever: {self.state()}"))

    def _fail(self, rank: int, error: BaseException) -> None:
        """Keeps the first failure and wakes every rank that waits."""
        if self.failure is None:
            if rank >= 0:
                error.add_note(f"on virtual rank {rank} of {self.num_ranks}")
            self.failure = error
        for wait in self._waiting.values():
            wait.done.set()
        self._waiting.clear()
        self.over.set()

    def _check(self, rank: int) -> None:
        if self.failure is not None:
            raise RankDiedError(f"rank {rank} stops: {self.failure!r}")


def _combine(present: dict[int, _Posted]) -> list[Tensor]:
    """Each rank's result of one call, which must be the same call on all of them."""
    first = present[0].call
    for index in range(1, len(present)):
        _check_same(first, present[index].call, index)
    tensors = [present[index].tensor for index in range(len(present))]
    count = len(tensors)
    if first.kind == "all_to_all":
        return _exchange([present[index].call for index in range(count)], tensors)
    if first.kind == "reduce_scatter":
        pieces = torch.split(_sum(tensors), list(first.sizes), first.dim)
        return [piece.clone() for piece in pieces]
    if first.kind == "all_gather":
        total = torch.cat(tensors, first.dim)
    elif first.kind == "all_reduce":
        total = _sum(tensors)
    else:
        total = tensors[first.peer]
    return [total.clone() for _ in range(count)]


def _check_same(first: Call, other: Call, index: int) -> None:
    """Equal but for what may differ: the gathered dimension, and the rows of an exchange."""

    def shared(call: Call) -> tuple[object, ...]:
        shape = list(call.shape)
        sizes = call.sizes
        if call.kind in ("all_gather", "all_to_all"):
            del shape[call.dim]
        if call.kind == "all_to_all":
            sizes = ()
        return call.kind, call.dtype, shape, call.dim, sizes, call.peer

    if shared(first) != shared(other):
        raise RuntimeError(
            f"ranks disagree: rank {first.ranks[0]} calls {first}, "
            f"rank {first.ranks[index]} calls {other}"
        )


def _sum(tensors: list[Tensor]) -> Tensor:
    dtype = tensors[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = tensors[0].to(wide, copy=True)
    for tensor in tensors[1:]:
        total += tensor.to(wide)
    return total.to(dtype)


def _exchange(calls: list[Call], tensors: list[Tensor]) -> list[Tensor]:
    ranks = calls[0].ranks
    for source, sent in enumerate(calls):
        for to, received in enumerate(calls):
            if sent.sizes[to] != received.receive[source]:
                raise RuntimeError(
                    f"ranks disagree: rank {ranks[source]} calls {sent}, "
                    f"rank {ranks[to]} calls {received}"
                )
    pieces = [torch.split(t, list(c.sizes)) for t, c in zip(tensors, calls, strict=True)]
    return [torch.cat([rows[index] for rows in pieces]) for index in range(len(calls))]
