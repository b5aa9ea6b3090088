# SPDX-License-Identifier: MIT
"""Depths of one step, against brute force and by hand, with floors and without."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.policy_costs import (
    COSTS,
    EXPERTS,
    features,
    i32,
    known,
)
from tokenspeed._policy import (
    FEATURES,
    choose_depths,
    experts_touched,
)


def step_s(depths: tuple[int, ...], proposes: NDArray[np.bool_], base: NDArray[np.float64]):
    num_tokens = base[1] + base[3]
    x = base.copy()
    x[FEATURES.index("prefill_tokens")] = 0
    x[2] += sum(depths)
    x[5] += experts_touched(num_tokens + sum(depths), *EXPERTS)
    x[5] -= experts_touched(num_tokens, *EXPERTS)
    proposed = [d for d, p in zip(depths, proposes, strict=True) if p]
    x[6] += sum(proposed)
    x[7] = max(x[7], sum(depths) > 0)
    x[8] += max(proposed, default=0)
    return float(x @ COSTS)


@pytest.mark.parametrize("seed", range(60))
def test_depths_are_those_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(1, 5))
    limits = rng.integers(0, 5, num_rows).astype(np.int32)
    rates = rng.random((num_rows, 4)) ** 0.5
    proposes = rng.random(num_rows) < 0.5
    most = int(rng.integers(0, 12))
    base = features(
        decode_rows=num_rows + int(rng.integers(0, 3)),
        prefill_tokens=float(rng.integers(0, 2) * 300),
        experts=20,
        context_thousands=float(rng.integers(0, 60)),
    )

    def value(depths: tuple[int, ...]) -> float:
        gains = (rates[i, :d].cumprod().sum() for i, d in enumerate(depths))
        return (base[1] + sum(gains)) / step_s(depths, proposes, base)

    options = itertools.product(*(range(limit + 1) for limit in limits))
    best = max(value(depths) for depths in options if sum(depths) <= most)
    got = choose_depths(
        known(COSTS), base, rates, limits, proposes, most,
        num_experts=EXPERTS[0], experts_per_token=EXPERTS[1],
    )  # fmt: skip
    assert np.all(got <= limits)
    assert got.sum() <= most
    assert value(tuple(got.tolist())) == pytest.approx(best, rel=1e-9)


def test_depths_by_hand() -> None:
    """A step of 10 ms that gives a token; drafts give 0.9, 0.81 and 0.729, and cost 3 ms each."""
    costs = COSTS * 0
    for name, cost in {"step": 10e-3, "verify_tokens": 3e-3, "propose_tokens": 3e-3}.items():
        costs[FEATURES.index(name)] = cost
    rates = np.full((1, 3), 0.9)
    base, model = features(decode_rows=1), known(costs)

    def depth(*, proposes: bool) -> int:
        return int(choose_depths(model, base, rates, i32(3), np.array([proposes]), 9)[0])

    assert depth(proposes=False) == 3  # tokens a second: 100, 146, 169, 181
    assert depth(proposes=True) == 2  # 100, 118.8, 123.2, 122.8


def test_a_long_prefill_does_not_make_drafts_cheap() -> None:
    model, rates, off = known(COSTS * 10), np.full((1, 4), 0.02), np.array([False])
    for prefill in (0, 8000):
        base = features(decode_rows=1, prefill_tokens=prefill)
        assert choose_depths(model, base, rates, i32(4), off, 9).tolist() == [0]


def depths_under(
    floors: list[float] | None, others: float = 0.0, rates: tuple[float, ...] = (0.9, 0.3)
) -> list[int]:
    """Of two rows in a step of 10 ms, where each draft takes 1 ms."""
    costs = COSTS * 0
    costs[FEATURES.index("step")], costs[FEATURES.index("verify_tokens")] = 10e-3, 1e-3
    table = np.repeat(np.array(rates)[:, None], 8, axis=1)
    asked = None if floors is None else np.array(floors)
    chosen: list[int] = choose_depths(
        known(costs), features(decode_rows=2), table, i32(8, 8), np.zeros(2, bool), 99,
        floors=asked, floor_of_others=others,
    ).tolist()  # fmt: skip
    return chosen


def test_floors_that_hold_anyway_change_nothing() -> None:
    assert depths_under(None) == [8, 0]  # a step of 18 ms
    assert depths_under([55.0, 55.0], 55.0) == [8, 0]


def test_a_floor_forbids_deep_drafts_of_others() -> None:
    assert depths_under(None, 70.0) == [4, 0]  # 1 / 14 ms is more
    assert depths_under([0.0, 70.0], rates=(0.9, 0.0)) == [4, 0]
    assert depths_under(None, 99.0) == [0, 0]


def test_a_stream_has_the_drafts_that_it_needs() -> None:
    assert depths_under([0.0, 99.0]) == [2, 1]  # 1.3 / 13 ms; without its own not beside others
    assert depths_under([0.0, 70.0]) == [7, 1]  # 1.3 / 18 ms
    assert depths_under([0.0, 110.0]) == [0, 1]
    assert depths_under([300.0, 0.0]) == [8, 0]  # has them anyway


def test_where_no_depths_hold_a_floor_the_nearest_do() -> None:
    assert depths_under(None, 120.0) == [0, 0]
    assert depths_under([0.0, 200.0]) == [0, 1]  # 1.3 / 11 ms; 1.39 / 12 ms and 1 / 10 ms are less
    assert depths_under([0.0, 200.0], 200.0) == [0, 0]  # the others would have less


@pytest.mark.parametrize("floors", [[1.0], [1.0, math.nan], [-1.0, 1.0]])
def test_bad_floors_are_refused(floors: list[float]) -> None:
    with pytest.raises(ValueError, match="floors"):
        depths_under(floors)


def test_a_bad_floor_of_others_is_refused() -> None:
    with pytest.raises(ValueError, match="floor_of_others"):
        depths_under(None, math.inf)
