# SPDX-License-Identifier: MIT
"""The solver: balanced, valid, deterministic, and moving little."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tokenspeed.spmd.expert_placement import ExpertPlacement
from tokenspeed.spmd.expert_solver import Solver


def zipf(num_layers: int, num_experts: int, power: float = 1.0, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    shares = np.arange(1, num_experts + 1) ** -power
    return np.stack([rng.permutation(shares) for _ in range(num_layers)])


def worst(placements: list[ExpertPlacement], loads: NDArray[Any]) -> float:
    return max(p.imbalance(row) for p, row in zip(placements, loads, strict=True))


@pytest.mark.parametrize(("num_ranks", "power"), [(8, 0.5), (8, 1.0), (32, 0.5), (32, 1.0)])
def test_one_redundant_expert_in_eight_balances_a_skewed_load(num_ranks: int, power: float) -> None:
    loads = zipf(8, 256, power)
    solver = Solver(256, num_ranks, 32)
    default = [solver.default()] * 8
    assert worst(default, loads) > 1.2
    assert worst(solver.solve(loads), loads) <= 1.02
    assert worst(solver.solve(loads, default), loads) <= 1.1


def test_close_to_the_best_of_all_placements() -> None:
    """All placements of 4 experts and 2 replicas on 3 ranks, against the solver's."""
    everything = [
        ExpertPlacement(np.array(slots), 4, 3)
        for slots in itertools.product(range(4), repeat=6)
        if len(set(slots)) == 4 and slots[0] <= slots[1] and slots[2] <= slots[3] <= slots[5]
    ]
    for seed in range(10):
        loads = np.random.default_rng(seed).integers(1, 100, (1, 4))
        best = min(p.imbalance(loads[0]) for p in everything)
        assert Solver(4, 3, 2).solve(loads)[0].imbalance(loads[0]) <= 1.1 * best


@given(st.data())
@settings(deadline=None)
def test_every_answer_is_valid_and_repeatable(data: st.DataObject) -> None:
    nodes, per_node = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 2, 3, 6]))
    experts, ranks = groups * data.draw(st.integers(2, 4)), nodes * per_node
    redundant = -experts % ranks + ranks * data.draw(st.integers(0, 2))
    if (experts + redundant) // ranks > experts:
        return
    solver = Solver(experts, ranks, redundant, nodes, groups)
    cells = st.one_of(st.just(0), st.integers(0, 10**6))
    row = st.lists(cells, min_size=experts, max_size=experts)
    loads = np.array(data.draw(st.lists(row, min_size=1, max_size=2)))
    old = [solver.default()] * len(loads)
    again = solver.solve(loads, old)
    fresh = solver.solve(loads)  # `ExpertPlacement` itself refuses what is not valid
    for was, now, made, row_loads in zip(old, again, fresh, loads, strict=True):
        assert now.num_slots == made.num_slots == experts + redundant
        assert now.imbalance(row_loads) <= was.imbalance(row_loads)
        fits = (experts + redundant) // ranks <= experts // nodes
        if nodes > 1 and groups % nodes == 0 and fits and row_loads.any():
            node_of: list[set[int]] = [set() for _ in range(groups)]
            for slot, expert in enumerate(made.slots.tolist()):
                node_of[expert // (experts // groups)].add(slot // (made.num_slots // nodes))
            assert all(len(found) == 1 for found in node_of)
    for a, b in zip(again, solver.solve(loads.astype(np.float32), old), strict=True):
        assert a.slots.tolist() == b.slots.tolist()


def test_a_small_gain_moves_nothing_and_a_large_one_little() -> None:
    solver = Solver(64, 8, 8)
    loads = zipf(4, 64)
    old = solver.solve(loads)
    noise = np.random.default_rng(1).normal(1, 0.005, loads.shape)
    assert [p.slots.tolist() for p in solver.solve(loads * noise, old)] == [
        p.slots.tolist() for p in old
    ]
    drifted = loads * np.random.default_rng(2).lognormal(0, 0.3, loads.shape)
    new = solver.solve(drifted, old)
    moved = [len(a.moves_to(b)) for a, b in zip(old, new, strict=True)]
    assert worst(old, drifted) > 1.1
    assert worst(new, drifted) < 1.05
    assert max(moved) <= 20  # of 72
    free = Solver(64, 8, 8, move_cost=0.0).solve(drifted, old)
    assert worst(free, drifted) <= worst(new, drifted)


def test_a_fresh_placement_is_renamed_to_resemble_the_old_one() -> None:
    """Ranks swapped as a whole: the solver must find that nothing has to move."""
    solver = Solver(16, 4, 4, move_cost=0.0)
    loads = zipf(1, 16)
    best = solver.solve(loads)[0]
    turned = ExpertPlacement(np.roll(best.slots.reshape(4, -1), 1, 0)[:, ::-1].reshape(-1), 16, 4)
    assert solver.solve(loads, [turned])[0].slots.tolist() == turned.slots.tolist()


def test_nothing_routed_changes_nothing() -> None:
    solver = Solver(8, 2, 2)
    old = solver.solve(zipf(1, 8))
    assert solver.solve(np.zeros((1, 8)), old) == old
    assert solver.solve(np.zeros((1, 8)))[0].slots.tolist() == solver.default().slots.tolist()


def test_a_large_model_stays_balanced_as_its_load_drifts() -> None:
    solver = Solver(256, 32, 32)
    loads = zipf(58, 256)
    old = solver.solve(loads)
    drifted = loads * np.random.default_rng(0).lognormal(0, 0.3, loads.shape)
    assert worst(old, drifted) > 1.2
    assert worst(solver.solve(drifted, old), drifted) <= 1.1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_ranks": 3}, "num_redundant_experts must be 1 or that plus a multiple of 3"),
        ({"num_ranks": 2, "num_redundant": 1}, "cannot be shared evenly by 2 ranks"),
        ({"num_ranks": 2, "num_redundant": 10}, "2 ranks would have 9 slots each for 8"),
        ({"num_ranks": 2, "num_redundant": -2}, "no 8 experts and -2 more"),
        ({"num_ranks": 0}, "on 0 ranks"),
        ({"num_ranks": 4, "num_nodes": 3}, "3 node.* cannot share 4 rank"),
        ({"num_ranks": 4, "num_groups": 3}, "8 experts are not 3 equal groups"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solver(8, **sizes)


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        (np.zeros(8), "loads must be"),
        (np.zeros((1, 7)), "loads must be"),
        (np.full((1, 8), -1), "not negative"),
        (np.full((1, 8), np.nan), "finite"),
    ],
)
def test_bad_loads(loads: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solver(8, 2).solve(loads)


def test_bad_old_placements() -> None:
    with pytest.raises(ValueError, match="2 old placements for 1 layers"):
        Solver(8, 2).solve(np.ones((1, 8)), [ExpertPlacement.default(8, 2)] * 2)
    with pytest.raises(ValueError, match="old placement of 4 experts, 2 ranks"):
        Solver(8, 2).solve(np.ones((1, 8)), [ExpertPlacement.default(4, 2)])
