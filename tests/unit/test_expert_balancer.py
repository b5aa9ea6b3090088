# SPDX-License-Identifier: MIT
"""Measured loads, moved weights, and the balancer over virtual ranks."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenspeed.execution.expert_balancer import BalancedLayer, BalanceStats, ExpertBalancer
from tokenspeed.execution.expert_load import ExpertLoad
from tokenspeed.spmd.expert_exchange import exchange
from tokenspeed.spmd.expert_placement import ExpertPlacement
from tokenspeed.spmd.expert_solver import Solver
from tokenspeed.spmd.experts import Slots
from tokenspeed.spmd.group import Communicator, Group
from tokenspeed.spmd.simulate import run_ranks

CPU = torch.device("cpu")


def everybody(communicator: Communicator) -> Group:
    return communicator.group([tuple(range(communicator.num_ranks))])


def weights_of(placement: ExpertPlacement, rank: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Two weights whose rows tell expert and layer."""
    mine = torch.from_numpy(placement.slots.reshape(placement.num_ranks, -1)[rank].copy())
    wide = (mine + 100.0 * layer)[:, None, None] + torch.arange(6.0).view(2, 3) / 8
    return wide.double(), mine[:, None].bfloat16() * torch.ones(5, dtype=torch.bfloat16)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_exchange_makes_the_new_placement(num_ranks: int) -> None:
    rng = np.random.default_rng(num_ranks)
    more = rng.integers(0, 12, 12)
    old, new = (
        ExpertPlacement(rng.permutation(np.concatenate([np.arange(12), more])), 12, num_ranks)
        for _ in range(2)
    )

    def work(communicator: Communicator) -> int:
        group = everybody(communicator)
        held = weights_of(old, group.index)
        assert exchange(held, old, old, group) == 0
        moved = exchange(held, old, new, group)
        for have, want in zip(held, weights_of(new, group.index), strict=True):
            assert torch.equal(have, want)
        return moved

    assert run_ranks(num_ranks, work) == [int((old.slots != new.slots).sum())] * num_ranks


def test_exchange_refuses_what_does_not_fit() -> None:
    old, new = ExpertPlacement.default(4, 2), ExpertPlacement(np.array([1, 0, 2, 3]), 4, 2)

    def work(communicator: Communicator) -> None:
        group = everybody(communicator)
        with pytest.raises(ValueError, match=r"weights must have 2 rows: \[3\]"):
            exchange([torch.zeros(3, 1)], old, new, group)
        with pytest.raises(ValueError, match="a placement on 1 ranks, a group of 2"):
            exchange([torch.zeros(4, 1)], ExpertPlacement.default(4, 1), new, group)

    run_ranks(2, work)


def test_the_window_moves() -> None:
    load = ExpertLoad(1, 2, window_steps=16, device=CPU)
    assert load.window().tolist() == [[0, 0]]
    for step in range(100):
        load.now[0, int(step >= 40)] += 1
        load.end_step()
        if step < 17:
            assert load.window().tolist() == [[step + 1, 0]]
        if step == 49:  # 10 steps since the turn, and 6 or 7 of those before it
            assert load.window().tolist() == [[6, 10]]
        if step >= 57:
            assert load.window()[0, 0] == 0
            assert 16 <= load.window()[0, 1] < 18
    with pytest.raises(ValueError, match="at least 1"):
        ExpertLoad(1, 2, window_steps=0, device=CPU)


@pytest.mark.parametrize("window_steps", [1, 3, 9, 17])
def test_the_window_has_its_length(window_steps: int) -> None:
    load = ExpertLoad(1, 1, window_steps=window_steps, device=CPU)
    for _ in range(100):
        load.now += 1
        load.end_step()
        length = int(load.window())
    assert window_steps <= length <= window_steps * 9 / 8 + 3


@dataclass
class Seen:
    """What one rank had after each step."""

    slots: list[list[list[int]]]  # [steps][layers]
    stats: list[BalanceStats]


def drive(
    communicator: Communicator,
    loads: list[list[list[int]]],
    redundant: int,
    interval: int,
) -> Seen:
    """Feeds loads [steps][layers][experts] to a balancer; checks the weights after each step.

    Each rank sees only the experts whose number is its own modulo the ranks.
    """
    group = everybody(communicator)
    num_ranks, me = communicator.num_ranks, communicator.rank
    num_experts = len(loads[0][0])
    first = ExpertPlacement.default(num_experts, num_ranks, redundant)
    layers = [
        BalancedLayer(Slots(first, me, CPU), weights_of(first, me, i)) for i in range(len(loads[0]))
    ]
    solver = Solver(num_experts, num_ranks, redundant)
    balancer = ExpertBalancer(layers, group, solver, window_steps=4, step_interval=interval)
    seen = Seen([], [])
    for step in loads:
        for layer, row in zip(layers, step, strict=True):
            ids = [e for e, n in enumerate(row) for _ in range(n) if e % num_ranks == me]
            layer.slots.count(torch.tensor(ids, dtype=torch.int32)[:, None])
        balancer.end_step()
        for i, layer in enumerate(layers):
            for have, want in zip(
                layer.weights, weights_of(layer.slots.placement, me, i), strict=True
            ):
                assert torch.equal(have, want)
        seen.slots.append([layer.slots.placement.slots.tolist() for layer in layers])
        seen.stats.append(balancer.stats)
    return seen


HOT = [1, 90, 20, 1, 1, 1, 60, 1]
EVEN = [10] * 8


@pytest.mark.parametrize(("num_ranks", "redundant"), [(2, 2), (4, 4)])
def test_a_skewed_load_is_balanced_one_layer_a_step(num_ranks: int, redundant: int) -> None:
    loads = [[HOT, EVEN, HOT[::-1]]] * 40
    seen = run_ranks(num_ranks, lambda c: drive(c, loads, redundant, 8))
    assert all(s.slots == seen[0].slots for s in seen)
    assert all(s.stats == seen[0].stats for s in seen)
    slots, stats = seen[0].slots, seen[0].stats
    changed = [
        sum(a != b for a, b in zip(was, now, strict=True)) for was, now in itertools.pairwise(slots)
    ]
    assert max(changed) == 1
    assert all(s == slots[0] for s in slots[:10])  # measured after step 8, decided after step 10
    assert slots[11][0] != slots[0][0]
    assert stats[7].worst > 1.25
    assert stats[-1].worst < 1.15
    assert stats[-1].num_rebalances >= 1
    assert stats[-1].num_moved > 0
    assert stats[-1].num_rebalances == stats[20].num_rebalances  # the load does not change


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_short_intervals(interval: int) -> None:
    """Nothing due is lost when the next measurement comes before it."""
    loads = [[HOT, HOT], [HOT[::-1], HOT]] * 6
    seen = run_ranks(2, lambda c: drive(c, loads, 2, interval))
    assert seen[0] == seen[1]
    assert seen[0].stats[-1].num_moved > 0


def test_an_idle_or_even_load_moves_nothing() -> None:
    default = ExpertPlacement.default(8, 2).slots.tolist()
    for row in ([0] * 8, EVEN):
        seen = run_ranks(2, lambda c, row=row: drive(c, [[row]] * 20, 0, 4))
        assert all(s == [default] for s in seen[0].slots)
        assert seen[0].stats[-1] == BalanceStats()


def test_bad_settings() -> None:
    def work(communicator: Communicator) -> None:
        with pytest.raises(ValueError, match=r"0 layer\(s\)"):
            ExpertBalancer(
                [], everybody(communicator), Solver(8, 2), window_steps=4, step_interval=4
            )

    run_ranks(2, work)
