# SPDX-License-Identifier: MIT
"""The policy of depths in time: what it tries, what it costs, what it recovers from."""

from typing import Any

import numpy as np
import pytest

from tests.policy_costs import COSTS, features, i32, known, observe, random_features
from tokenspeed._policy import (
    FEATURES,
    Acceptance,
    DepthPolicy,
    StepTimeModel,
)


class Row:
    """One request whose drafts cost 0.4 of a step each, proposed by a model."""

    def __init__(
        self, model: StepTimeModel, cost: float = 0.4, floors: tuple[float, float] | None = None
    ) -> None:
        """`floors`: its own and that of others."""
        self.model, self.cost = model, cost
        self.floors: dict[str, Any] = {}
        if floors is not None:
            self.floors = {"floors": np.array(floors[:1]), "floor_of_others": floors[1]}
        self.acceptance = Acceptance(1)
        self.policy = DepthPolicy(model, self.acceptance)
        self.rng = np.random.default_rng(6)
        self.seconds: list[float] = []
        self.tokens = 0

    def step(self, chance: float, request_id: int = 1) -> int:
        ids = np.array([request_id], np.uint64)
        base, zero = features(decode_rows=1), i32(0)
        proposes = np.array([True])
        depth = int(
            self.policy.choose(base, ids, zero, zero, i32(4), proposes, 4, **self.floors)[0]
        )
        x = features(decode_rows=1, verify_tokens=depth, propose_tokens=depth)
        seconds = 1e-3 * (1 + self.cost * depth)
        self.model.observe(x, seconds)
        hits = 0
        while hits < depth and self.rng.random() < chance:
            hits += 1
        observe(self.acceptance, hits, hits < depth, request_id)
        self.seconds.append(seconds)
        self.tokens += hits + 1
        return depth


def test_a_useless_drafter_is_tried_rarely_and_for_ever() -> None:
    row = Row(StepTimeModel())
    depths = [row.step(0.0) for _ in range(6000)]
    lost = sum(row.seconds[200:]) / (1e-3 * len(row.seconds[200:])) - 1
    assert 0 < lost < 0.01
    assert any(depths[-1100:])


def test_drafts_that_could_not_pay_if_all_were_right_are_not_tried() -> None:
    row = Row(StepTimeModel(), cost=1.3)
    depths = [row.step(0.9, request_id=step // 20) for step in range(3000)]
    assert any(depths[:200])  # nobody knew
    assert not any(depths[1000:])


def test_trying_on_short_requests_costs_little_too() -> None:
    """Each request is new, and would be tried within a few steps."""
    row = Row(StepTimeModel())
    for i in range(4000):
        row.step(0.0, request_id=i // 20)
        if i % 20 == 19:
            row.acceptance.forget(i // 20)
    lost = sum(row.seconds[200:]) / (1e-3 * len(row.seconds[200:])) - 1
    assert 0 < lost < 0.01


def test_a_request_recovers_when_its_text_changes() -> None:
    row = Row(StepTimeModel())
    for _ in range(800):
        row.step(0.0)
    depths = [row.step(0.95) for _ in range(700)]
    assert np.mean(depths[-50:]) > 2
    worse = [row.step(0.0) for _ in range(60)]
    assert np.mean(worse[-30:]) < 0.2


@pytest.mark.parametrize("floor", [0.0, 350.0])
@pytest.mark.parametrize("num_outliers", [1, 2])
@pytest.mark.parametrize("seconds", [3e-3, 2e-2, 1.0])
def test_a_belief_from_outliers_does_not_stay(
    num_outliers: int, seconds: float, floor: float
) -> None:
    """The first drafts that are seen take far longer than they should, or than a floor allows."""
    model = StepTimeModel()
    for _ in range(30):
        model.observe(features(decode_rows=1), 1e-3)
    for _ in range(num_outliers):
        model.observe(features(decode_rows=1, verify_tokens=1, propose_tokens=1), seconds)
    row = Row(model, floors=(floor, floor))
    for _ in range(30):
        row.step(0.95)
    assert np.mean([row.step(0.95) for _ in range(10)]) > 2


def test_what_is_tried_leaves_floors_alone() -> None:
    """The drafter is useless, and a draft takes 0.4 ms."""
    costs = COSTS * 0
    costs[FEATURES.index("step")], costs[FEATURES.index("verify_tokens")] = 1e-3, 0.4e-3
    tried = {}
    for floor in (0.0, 700.0, 720.0):  # 1 / 1.4 ms is 714
        row = Row(known(costs), floors=(0.0, floor))
        tried[floor] = sum(row.step(0.0) > 0 for _ in range(3000))
    assert tried[0.0] == tried[700.0] > 5
    assert tried[720.0] == 0


def test_floors_that_hold_anyway_change_nothing_in_time() -> None:
    free, held = Row(StepTimeModel()), Row(StepTimeModel(), floors=(1e-3, 1e-3))
    assert [free.step(0.6) for _ in range(500)] == [held.step(0.6) for _ in range(500)]


def test_what_drafts_cost_is_told_from_what_steps_cost() -> None:
    """All steps had the same drafts; the prior said that these are nearly free."""
    model = StepTimeModel()
    for _ in range(200):
        model.observe(features(decode_rows=1, verify_tokens=4, propose_tokens=4), 2.6e-3)
    row = Row(model)
    for _ in range(400):
        row.step(0.4)
    assert np.mean([row.step(0.4) for _ in range(100)]) < 0.5


def test_the_same_calls_give_the_same_depths() -> None:
    one, other = Row(StepTimeModel()), Row(StepTimeModel())
    assert [one.step(0.6) for _ in range(300)] == [other.step(0.6) for _ in range(300)]


@pytest.mark.parametrize("seed", range(10))
def test_depths_stay_within_limits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    acceptance = Acceptance(3)
    model = StepTimeModel()
    policy = DepthPolicy(model, acceptance, num_experts=8, experts_per_token=2)
    for _ in range(100):
        n = int(rng.integers(0, 20))
        ids = rng.integers(0, 8, n).astype(np.uint64)
        drafters, matches = (rng.integers(0, 3, n).astype(np.int32) for _ in range(2))
        limits = rng.integers(0, 200, n).astype(np.int32)
        most = int(rng.integers(-1, 60))
        base = random_features(rng)
        rivals = np.stack([drafters, matches, rng.integers(0, 40, n)], axis=1).astype(np.int32)
        proposes = rng.random(n) < 0.5
        depths = policy.choose(
            base, ids, drafters, matches, limits, proposes, most,
            rivals=None if rng.random() < 0.3 else rivals,
        )  # fmt: skip
        assert depths.shape == (n,)
        assert np.all((depths >= 0) & (depths <= limits))
        assert depths.sum() <= max(most, 0)
        hits = rng.integers(0, depths + 1).astype(np.int32)
        acceptance.observe(ids, drafters, matches, hits, hits < depths)
        model.observe(base, float(rng.random() * 10.0 ** rng.integers(-9, 6)))
    assert acceptance.num_requests <= 8
    assert np.all(np.isfinite(model.coefficients))
