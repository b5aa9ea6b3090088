# SPDX-License-Identifier: MIT
"""`ExpertPlacement`: its tables, what it refuses, and the moves between two placements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.spmd.expert_placement import ExpertPlacement


@st.composite
def placements(draw: st.DrawFn, num_experts: int = 6, num_ranks: int = 3) -> ExpertPlacement:
    extra = draw(st.integers(0, 3)) * num_ranks
    slots = list(range(num_experts)) + draw(
        st.lists(st.integers(0, num_experts - 1), min_size=extra, max_size=extra)
    )
    return ExpertPlacement(np.array(draw(st.permutations(slots))), num_experts, num_ranks)


@given(placements())
def test_tables_agree_with_the_slots(placement: ExpertPlacement) -> None:
    slots = placement.slots.tolist()
    for expert in range(placement.num_experts):
        where = [i for i, e in enumerate(slots) if e == expert]
        assert placement.num_replicas[expert] == len(where)
        row = placement.replicas[expert].tolist()
        assert row == [where[i % len(where)] for i in range(len(row))]
    back = ExpertPlacement.from_json(placement.to_json())
    assert back.slots.tolist() == slots
    assert (back.num_experts, back.num_ranks) == (placement.num_experts, placement.num_ranks)


@given(st.data())
def test_moves_make_the_new_placement_of_the_old_one(data: st.DataObject) -> None:
    old = data.draw(placements())
    new = ExpertPlacement(data.draw(st.permutations(old.slots.tolist())), 6, 3)
    held = old.slots.copy()
    for source, target in old.moves_to(new):
        held[target] = old.slots[source]
    assert held.tolist() == new.slots.tolist()
    assert len(old.moves_to(new)) == int((old.slots != new.slots).sum())


def test_moves_prefer_the_own_rank_and_share_the_others() -> None:
    old = ExpertPlacement(np.array([0, 1, 0, 2, 3, 4, 5, 5]), 6, 4)
    new = ExpertPlacement(np.array([1, 0, 3, 2, 0, 4, 5, 0]), 6, 4)
    assert old.moves_to(new) == [(1, 0), (0, 1), (4, 2), (0, 4), (2, 7)]
    with pytest.raises(ValueError, match="different sizes"):
        old.moves_to(ExpertPlacement.default(6, 2))


@pytest.mark.parametrize(
    ("sizes", "slots"),
    [
        ((8, 4, 0), [0, 1, 2, 3, 4, 5, 6, 7]),
        ((8, 2, 2), [0, 1, 2, 3, 4, 4, 5, 6, 7, 0]),
        ((8, 3, 1), [0, 1, 2, 2, 3, 4, 5, 6, 7]),
        ((3, 3, 6), [0, 1, 2, 1, 2, 0, 2, 0, 1]),
    ],
)
def test_default_is_contiguous_with_redundant_slots_dealt_out(
    sizes: tuple[int, int, int], slots: list[int]
) -> None:
    placement = ExpertPlacement.default(*sizes)
    assert placement.slots.tolist() == slots
    assert placement.slots_per_rank == len(slots) // sizes[1]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30))
def test_default_exists_for_all_sizes_that_fit(experts: int, ranks: int, extra: int) -> None:
    num_slots = experts + extra
    if num_slots % ranks or num_slots // ranks > experts:
        with pytest.raises(ValueError, match="redundant"):
            ExpertPlacement.default(experts, ranks, extra)
        return
    placement = ExpertPlacement.default(experts, ranks, extra)
    for rank in placement.slots.reshape(ranks, -1).tolist():
        assert len(set(rank)) == len(rank)


def test_loads_of_ranks() -> None:
    placement = ExpertPlacement(np.array([0, 1, 0, 2]), 3, 2)
    assert placement.rank_loads(np.array([4, 1, 5])).tolist() == [3, 7]
    assert placement.imbalance(np.array([4, 1, 5])) == 1.4
    assert placement.imbalance(np.zeros(3)) == 1.0


@pytest.mark.parametrize(
    ("slots", "num_experts", "num_ranks", "message"),
    [
        ([0, 1, 1], 2, 2, "3 slots cannot be shared evenly by 2"),
        ([0, 1], 2, 0, "cannot be shared evenly by 0"),
        ([0, 0, 1, 3], 3, 2, "slots name expert 3 of 3"),
        ([0, -1, 1, 2], 3, 2, "slots name expert -1 of 3"),
        ([0, 0, 2, 2], 3, 2, "1 expert.* without a slot, the first is 1"),
        ([0, 1], 2**31, 1, "2 slots for 2147483648 experts"),
        ([], 0, 1, "must be a list of expert ids"),
        ([[0, 1]], 2, 1, "must be a list of expert ids"),
        ([0.0, 1.0], 2, 1, "must be a list of expert ids"),
    ],
)
def test_what_is_no_placement(
    slots: list[int], num_experts: int, num_ranks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertPlacement(np.array(slots), num_experts, num_ranks)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"slots": [0]}',
        '{"num_experts": 1, "num_ranks": 1, "slots": "0"}',
        '{"num_experts": 1, "num_ranks": 1, "slots": [true]}',
        '{"num_experts": 1, "num_ranks": 1, "slots": [0.0]}',
        '{"num_experts": 1, "num_ranks": 1, "slots": [99999999999]}',
        '{"num_experts": 2, "num_ranks": 1, "slots": [0]}',
        '{"num_experts": 1, "num_ranks": 1, "slots": [0], "more": 1}',
    ],
)
def test_texts_that_are_no_placement(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        ExpertPlacement.from_json(text)
