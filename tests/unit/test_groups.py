# SPDX-License-Identifier: MIT
"""One suite over all communicators: virtual ranks, shared memory, gloo."""

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import on_processes, on_ranks, on_threads
from tokenspeed.errors import RankDiedError
from tokenspeed.spmd.group import Communicator, Group
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.simulate import Count, run_ranks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32)
# All groups of 1, 2, 3 and 4 ranks that four ranks can form side by side.
PARTITIONS = (
    [(0,), (1,), (2,), (3,)],
    [(0, 1), (2, 3)],
    [(0, 2), (1, 3)],
    [(0, 1, 2), (3,)],
    [(0, 1, 2, 3)],
)
SIZES = ((2, 2, 2, 2), (3, 0, 1, 2), (0, 0, 5, 0), (1, 4, 0, 0))
LARGE = 70_001  # elements: several rounds of shared memory


def piece(rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Small whole numbers: their sums are exact in every dtype."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * (rank + 3)) % 7 - 3).reshape(tuple(shape)).to(dtype)


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    if actual.dtype != expected.dtype or not torch.equal(actual, expected):
        raise AssertionError(f"{what}: {actual} is not {expected}")


def check_sums(group: Group, dtype: torch.dtype) -> None:
    for shape in ((5,), (0, 4), (3, 5, 2), (1,), (LARGE,)):
        total = sum(piece(r, shape, torch.float64) for r in group.ranks)
        x = piece(group.ranks[group.index], shape, dtype)
        check(group.all_reduce(x), torch.as_tensor(total).to(dtype), f"all_reduce {shape}")


def check_pieces(group: Group, dtype: torch.dtype) -> None:
    me, count = group.index, len(group.ranks)
    for sizes in (s[:count] for s in SIZES):
        for dim, rest in ((0, ()), (0, (3,)), (1, (3,)), (-1, (2, 3)), (1, (2, 3)), (0, (30000,))):
            shapes = [[*rest] for _ in range(count)]
            for shape, size in zip(shapes, sizes, strict=True):
                shape.insert(dim if dim >= 0 else len(rest), size)
            parts = [piece(r, s, dtype) for r, s in zip(group.ranks, shapes, strict=True)]
            whole = torch.cat(parts, dim)
            what = f"{dtype} sizes {sizes} dim {dim} of {rest}"
            check(group.all_gather(parts[me].clone(), dim, sizes), whole, f"all_gather {what}")
            inputs = [piece(r, whole.shape, torch.float64) for r in group.ranks]
            total = torch.stack(inputs).sum(0).to(dtype)
            mine = torch.split(total, list(sizes), dim)[me]
            got = group.reduce_scatter(inputs[me].to(dtype), dim, sizes)
            check(got, mine, f"reduce_scatter {what}")


def check_exchange(group: Group, dtype: torch.dtype) -> None:
    me, ranks = group.index, group.ranks
    for factor, width in ((1, 3), (0, 3), (900, 100)):
        rows = [
            [factor * ((2 * i + 3 * j) % 4) for j in range(len(ranks))] for i in range(len(ranks))
        ]
        sent = [piece(r, (sum(row), width), dtype) for r, row in zip(ranks, rows, strict=True)]
        cut = [torch.split(x, row) for x, row in zip(sent, rows, strict=True)]
        got = group.all_to_all(sent[me].clone(), rows[me], [row[me] for row in rows])
        check(got, torch.cat([pieces[me] for pieces in cut]), f"all_to_all {factor}")


def check_peers(group: Group, dtype: torch.dtype) -> None:
    me = group.index
    for root, rank in enumerate(group.ranks):
        for shape in ((4, 3), (LARGE,)):
            x = piece(group.ranks[me], shape, dtype)
            check(group.broadcast(x, root), piece(rank, shape, dtype), f"broadcast from {root}")
    for source, rank in enumerate(group.ranks):
        for to in range(len(group.ranks)):
            for shape in ((3,), (LARGE,), (2, 5)) if source != to else ():
                if me == source:
                    group.send(piece(rank, shape, dtype), to)
                elif me == to:
                    x = group.receive(torch.empty(shape, dtype=dtype), source)
                    check(x, piece(rank, shape, dtype), f"receive from {source}")


def everything(communicator: Communicator, partitions: Any, dtypes: Any) -> int:
    checks = 0
    for partition in partitions:
        group = communicator.group(partition)
        assert communicator.rank == group.ranks[group.index]
        for dtype in dtypes:
            for part in (check_sums, check_pieces, check_exchange, check_peers):
                part(group, dtype)
                checks += 1
    return checks


@pytest.mark.parametrize("kind", ["virtual", "threads", "shm", "gloo"])
def test_every_call_in_every_group(kind: str) -> None:
    dtypes = DTYPES if kind != "shm" else DTYPES[2:3]  # threads run the same code
    results = on_ranks(kind, 4, partial(everything, partitions=PARTITIONS, dtypes=dtypes))
    assert results == [len(PARTITIONS) * len(dtypes) * 4] * 4


def views(communicator: Communicator) -> dict[str, int]:
    """Each axis of a mesh sums over its own ranks, in any order of axes, again and again."""
    mesh = Mesh(tp=2, dp=2, ep=4)
    sums: dict[str, int] = {}
    for turn in range(100):
        for axis in ("tp", "dp", "ep")[:: 1 if turn % 2 else -1]:
            group = communicator.group(mesh.groups(mesh.axis_atoms(axis)))
            total = group.all_reduce(torch.full((1 + turn % 5,), 10**communicator.rank))
            assert total.unique().tolist() == [sums.setdefault(axis, int(total[0]))]
            x = group.all_gather(torch.tensor([communicator.rank]), 0, [1] * len(group.ranks))
            assert tuple(x.tolist()) == group.ranks
    return sums


@pytest.mark.parametrize("kind", ["virtual", "threads", "gloo"])
def test_groups_of_a_mesh(kind: str) -> None:
    expected = [(11, 101, 1111), (11, 1010, 1111), (1100, 101, 1111), (1100, 1010, 1111)]
    results = on_ranks(kind, 4, views)
    assert [(sums["tp"], sums["dp"], sums["ep"]) for sums in results] == expected


def rounded(communicator: Communicator) -> list[bytes]:
    """Sums that round: their bits."""
    group = communicator.group([tuple(range(communicator.num_ranks))])
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for size in (1000, LARGE):
            random = torch.Generator().manual_seed(communicator.rank)
            x = torch.randn(size, generator=random, dtype=torch.float64).to(dtype)
            total = group.all_reduce(x)
            results.append(total.view(torch.uint8).numpy().tobytes())
    return results


@pytest.mark.parametrize("kind", ["threads", "gloo"])
def test_all_ranks_get_the_same_bits(kind: str) -> None:
    results = on_ranks(kind, 3, rounded)
    assert results[0] == results[1] == results[2]
    if kind == "threads":  # both sum in the order of ranks
        assert results == run_ranks(3, rounded)


def special(communicator: Communicator) -> list[float]:
    group = communicator.group([(0, 1)])
    values = [[float("nan"), float("inf"), 3e38, 1.0], [1.0, float("-inf"), 3e38, -0.0]]
    x = torch.tensor(values[communicator.rank], dtype=torch.bfloat16)
    return group.all_reduce(x).tolist()


@pytest.mark.parametrize("kind", ["virtual", "threads"])
def test_sums_that_are_no_numbers(kind: str) -> None:
    for total in on_ranks(kind, 2, special):
        assert [str(value) for value in total] == ["nan", "nan", "inf", "1.0"]


def random_calls(communicator: Communicator, seed: int, count: int) -> list[int]:
    """The same random program on every rank; a checksum of each result."""
    shared = random.Random(seed)
    sums = []
    for _ in range(count):
        group = communicator.group(shared.choice(PARTITIONS))
        dtype, width = shared.choice(DTYPES), shared.choice([1, 3, 64, 5000])
        sizes = [shared.choice([0, 1, 2, 5, 40]) for _ in range(4)]
        rows = [[shared.choice([0, 1, 3, 9]) for _ in range(4)] for _ in range(4)]
        kind, root = shared.choice(["sum", "gather", "scatter", "exchange", "broadcast"]), 0
        me, n = group.index, len(group.ranks)
        if kind == "sum":
            x = group.all_reduce(piece(communicator.rank, (sizes[0] + 1, width), dtype))
        elif kind == "gather":
            x = group.all_gather(piece(communicator.rank, (sizes[me], width), dtype), 0, sizes[:n])
        elif kind == "scatter":
            x = piece(communicator.rank, (width, sum(sizes[:n])), dtype)
            x = group.reduce_scatter(x, 1, sizes[:n])
        elif kind == "exchange":
            sent = piece(communicator.rank, (sum(rows[me][:n]), width), dtype)
            x = group.all_to_all(sent, rows[me][:n], [rows[i][me] for i in range(n)])
        else:
            x = group.broadcast(piece(communicator.rank, (sizes[0], width), dtype), root)
        weights = torch.arange(x.numel(), dtype=torch.int64) % 1009 + 1
        sums.append(int((x.flatten().to(torch.int64) * weights).sum()))
    return sums


@pytest.mark.full
@pytest.mark.parametrize("kind", ["threads", "shm", "gloo"])
def test_random_programs_end_like_virtual_ranks(kind: str) -> None:
    for seed in range(3):
        program = partial(random_calls, seed=seed, count=1500)
        assert on_ranks(kind, 4, program) == run_ranks(4, program)


# ---- Death and disagreement --------------------------------------------------------------------


def dies_at(communicator: Communicator, victim: int, how: str) -> tuple[float, str]:
    """Seconds from the death (a little after it, at most) to the error, and its text."""
    group = communicator.group([tuple(range(communicator.num_ranks))])
    for step in range(10_000):
        if step == 50 and communicator.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGTERM)
        start = time.monotonic()
        try:
            group.all_reduce(torch.ones(1 << (10 + step % 8)))
        except RankDiedError as error:
            return time.monotonic() - start, str(error)
    raise AssertionError("nobody died")


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_a_death_ends_the_others_calls(kind: str) -> None:
    before = set(os.listdir("/dev/shm"))
    results = on_processes(kind, 3, partial(dies_at, victim=1, how="killed"), timeout_s=40)
    assert results[1] is None
    for rank in (0, 2):
        seconds, text = results[rank]
        assert seconds < (2 if kind == "shm" else 10)
        if kind == "shm":
            assert "rank 1 died" in text
    assert set(os.listdir("/dev/shm")) <= before


def dies_somewhere(communicator: Communicator, seed: int) -> float:
    """Rank 2 is killed from outside its calls' order, at any instruction."""
    if communicator.rank == 2:
        delay = random.Random(seed).random() * 0.2
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    start = time.monotonic()
    try:
        random_calls(communicator, seed, 1_000_000)
    except RankDiedError:
        return time.monotonic() - start
    raise AssertionError("nobody died")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["shm", "gloo"])
@pytest.mark.parametrize("seed", range(8))
def test_a_death_at_any_time(kind: str, seed: int) -> None:
    before = set(os.listdir("/dev/shm"))
    results = on_processes(kind, 4, partial(dies_somewhere, seed=seed), timeout_s=60)
    assert results[2] is None
    for rank in (0, 1, 3):
        assert isinstance(results[rank], float), results[rank]
        assert results[rank] < 10
    assert set(os.listdir("/dev/shm")) <= before


def sleeps_until_killed(communicator: Communicator) -> float:
    """Rank 0 waits for a message of rank 1, which dies without a word; a bystander is there."""
    group = communicator.group([(0, 1, 2)])
    if communicator.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RankDiedError):
        group.receive(torch.empty(3), 1)
    return time.monotonic() - start


def test_a_sleeping_wait_notices_a_death() -> None:
    results = on_processes("shm", 3, sleeps_until_killed, timeout_s=40)
    assert results[1] is None
    assert results[0] < 3
    assert results[2] < 3


def leaves(communicator: Communicator) -> str:
    group = communicator.group([(0, 1)])
    group.all_reduce(torch.ones(3))
    if communicator.rank == 1:
        communicator.close()
        return ""
    with pytest.raises(RankDiedError) as caught:
        group.all_reduce(torch.ones(3))
    return str(caught.value)


def test_a_rank_that_left_is_named() -> None:
    assert on_threads(2, leaves) == ["rank 1 has left", ""]


def test_a_rank_that_never_comes() -> None:
    from tokenspeed.spmd.shm_group import shm_communicator

    with pytest.raises(RankDiedError, match="no rank made shared memory nobody-all"):
        shm_communicator(1, 2, "nobody", 0.2)
    name = f"tokenspeed-test-alone-{os.getpid()}"
    with pytest.raises(RankDiedError, match="rank 1 does not answer"):
        shm_communicator(0, 2, name, 0.2)
    assert not [entry for entry in os.listdir("/dev/shm") if entry.startswith(name)]


def disagree(communicator: Communicator, case: str) -> None:
    group = communicator.group([(0, 1)])
    odd = communicator.rank
    x = torch.ones(4, 2)
    if case == "shape":
        group.all_reduce(torch.ones(4 + odd))
    elif case == "dtype":
        group.all_reduce(x if odd else x.double())
    elif case == "kind":
        group.broadcast(x, 0) if odd else group.all_reduce(x)
    elif case == "dim":
        group.reduce_scatter(torch.ones(4, 4), odd, [2, 2])
    elif case == "sizes":
        group.reduce_scatter(x, 0, [4, 0] if odd else [0, 4])
    elif case == "rows":
        group.all_to_all(x, [2, 2], [1, 2] if odd else [2, 1])
    elif case == "message":
        group.receive(torch.empty(3), 0) if odd else group.send(torch.empty(5), 1)


@pytest.mark.parametrize("case", ["shape", "dtype", "kind", "dim", "sizes", "rows", "message"])
def test_ranks_that_disagree_are_named(case: str) -> None:
    with pytest.raises(RuntimeError, match=r"rank 0.*rank 1"):
        run_ranks(2, partial(disagree, case=case))
    errors = [e for e in on_threads(2, partial(disagree, case=case), timeout_s=2) if e is not None]
    assert any(isinstance(error, RuntimeError) and "rank 1" in str(error) for error in errors)


def test_arguments_that_cannot_be() -> None:
    def sizes(communicator: Communicator) -> None:
        communicator.group([(0, 1)]).all_gather(torch.ones(3), 0, [2, 3])

    def partition(communicator: Communicator) -> None:
        communicator.group([(0,)])

    def half(communicator: Communicator) -> None:
        communicator.group([(0, 1)]).all_reduce(torch.ones(3, dtype=torch.float16))

    with pytest.raises(ValueError, match="sizes"):
        run_ranks(2, sizes)
    with pytest.raises(ValueError, match="no partition of 2 ranks"):
        run_ranks(2, partition)
    assert "sizes" in str(on_threads(2, sizes)[0])
    assert "no partition" in str(on_threads(2, partition)[1])
    assert "sums take float64" in str(on_threads(2, half)[0])


# ---- Virtual ranks -----------------------------------------------------------------------------


def test_a_virtual_rank_that_fails_or_stops_is_named() -> None:
    def fails(communicator: Communicator) -> None:
        if communicator.rank == 2:
            raise KeyError("weight")
        communicator.group([(0, 1, 2)]).all_reduce(torch.ones(1))

    def stops(communicator: Communicator) -> None:
        if communicator.rank != 2:
            communicator.group([(0, 1, 2)]).all_reduce(torch.ones(1))

    def crosses(communicator: Communicator) -> None:
        group = communicator.group([(0, 1)])
        group.receive(torch.ones(1), 1 - communicator.rank)

    with pytest.raises(KeyError) as caught:
        run_ranks(3, fails)
    assert caught.value.__notes__ == ["on virtual rank 2 of 3"]
    with pytest.raises(RuntimeError, match=r"rank 0 waits in all_reduce.*rank 2 has ended"):
        run_ranks(3, stops)
    with pytest.raises(RuntimeError, match=r"rank 0 waits in receive.*rank 1 waits in receive"):
        run_ranks(2, crosses)
    with pytest.raises(TimeoutError, match="rank 1 runs"):
        run_ranks(2, lambda communicator: time.sleep(0.5 * communicator.rank), timeout_s=0.1)


def test_virtual_ranks_count_their_calls() -> None:
    def work(communicator: Any) -> dict[str, Count]:
        group = communicator.group([(0, 1)])
        communicator.group([(0,), (1,)]).all_reduce(torch.ones(8))  # alone: says nothing
        for _ in range(3):
            group.all_reduce(torch.ones(5, 2))
        group.all_gather(torch.ones(1 + communicator.rank, 4), 0, [1, 2])
        return communicator.counts

    expected = {"all_reduce": Count(3, 3 * 40), "all_gather": Count(1, 48)}
    assert run_ranks(2, work) == [expected, expected]
