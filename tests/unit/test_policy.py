# SPDX-License-Identifier: MIT
"""The policy of speculation: step times, acceptance, depths. No model, no clock."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenspeed._policy import (
    FEATURES,
    Acceptance,
    DepthPolicy,
    StepTimeModel,
    choose_depths,
    experts_touched,
)

COSTS = np.array([2e-3, 1e-4, 5e-5, 3e-5, 2e-5, 4e-5, 2e-4, 3e-4, 4e-4, 6e-4, 1e-3])
EXPERTS = (64, 4)


def features(**amounts: float) -> NDArray[np.float64]:
    """Of one row that proposes, if any does."""
    amounts.setdefault("verifies", amounts.get("verify_tokens", 0) > 0)
    amounts.setdefault("propose_depth", amounts.get("propose_tokens", 0))
    return np.array([amounts.get(name, name == "step") for name in FEATURES], np.float64)


def random_features(rng: np.random.Generator) -> NDArray[np.float64]:
    most = [64, 64, 512, 100, 60, 64, 2, 8, 4, 5]
    return np.concatenate(([1.0], rng.integers(0, most))).astype(np.float64)


def known(costs: NDArray[np.float64]) -> StepTimeModel:
    """A model that is sure of these."""
    return StepTimeModel(costs, prior_weight=1e12)


def i32(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def observe(acceptance: Acceptance, hits: int, missed: bool, request_id: int = 1, **which: int):
    acceptance.observe(
        np.array([request_id], np.uint64),
        i32(which.get("drafter", 0)),
        i32(which.get("match_len", 0)),
        i32(hits),
        np.array([missed]),
    )


# ---- Step times --------------------------------------------------------------------------------


def test_coefficients_are_found() -> None:
    rng, model = np.random.default_rng(0), StepTimeModel()
    for _ in range(2000):
        x = random_features(rng)
        assert model.observe(x, float(x @ COSTS))
    whether = FEATURES.index("verifies")  # hardly any step tells: they nearly all do
    assert model.coefficients[whether] == pytest.approx(COSTS[whether], rel=0.05)
    others = np.arange(len(COSTS)) != whether
    np.testing.assert_allclose(model.coefficients[others], COSTS[others], rtol=0.01)
    assert model.num_observed == 2000
    x = random_features(rng)
    seconds, stddev = model.predict(x)
    assert seconds == pytest.approx(float(x @ COSTS), rel=1e-3)
    assert stddev < 0.05 * seconds
    assert model.median_relative_error < 0.001


def test_noise_and_outliers_do_not_spoil_predictions() -> None:
    rng, model = np.random.default_rng(1), StepTimeModel()
    for i in range(1500):
        x = random_features(rng)
        spike = (60.0, 1e5, 1e-9)[i // 20 % 3] if i % 20 == 0 else 0.0
        model.observe(x, spike or float(x @ COSTS) * float(rng.lognormal(0, 0.1)))
    for _ in range(20):
        x = random_features(rng)
        assert model.predict(x)[0] == pytest.approx(float(x @ COSTS), rel=0.1)
    assert 0.04 < model.relative_error < 0.12
    before = model.predict(x)[0]
    model.observe(x, 3600.0)
    assert model.predict(x)[0] == pytest.approx(before, rel=0.05)


def test_a_first_step_of_a_minute_is_forgotten() -> None:
    model, x = StepTimeModel(), features(decode_rows=1)
    model.observe(x, 60.0)
    for _ in range(10):
        model.observe(x, 1e-3)
    assert model.predict(x)[0] == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_none_teach_nothing(seconds: float) -> None:
    model = StepTimeModel()
    assert not model.observe(features(decode_rows=1), seconds)
    assert not model.observe(features(decode_rows=math.nan), 1e-3)
    assert not model.observe(features(decode_rows=-1), 1e-3)
    assert not model.observe(features(step=0), 1e-3)  # all zero
    assert model.num_observed == 0
    np.testing.assert_array_equal(model.coefficients, StepTimeModel().coefficients)


def test_what_changes_is_learnt_anew() -> None:
    rng, model = np.random.default_rng(2), StepTimeModel()
    for costs in (COSTS, 3 * COSTS, COSTS / 2):
        for _ in range(600):
            x = random_features(rng)
            model.observe(x, float(x @ costs) * float(rng.lognormal(0, 0.1)))
        steps = [random_features(rng) for _ in range(100)]
        errors = [abs(model.predict(x)[0] / float(x @ costs) - 1) for x in steps]
        assert np.median(errors) < 0.1
        assert max(errors) < 0.4


def test_what_does_not_occur_is_remembered() -> None:
    """Drafts' cost through many steps without any, and without windup: the matrix stays sound."""
    rng, model = np.random.default_rng(3), StepTimeModel()
    for _ in range(300):
        x = random_features(rng)
        model.observe(x, float(x @ COSTS))
    plain = features(decode_rows=4, context_thousands=10)
    for _ in range(20_000):
        model.observe(plain, float(plain @ COSTS) * float(rng.lognormal(0, 0.1)))
    verify = FEATURES.index("verify_tokens")
    assert model.coefficients[verify] == pytest.approx(COSTS[verify], rel=0.02)
    seconds, stddev = model.predict(features(decode_rows=4, verify_tokens=100))
    assert 0 < stddev < seconds


def test_no_coefficient_is_negative() -> None:
    """Steps that get shorter with more rows: the rows count as free, and nothing is below zero."""
    model = StepTimeModel()
    for i in range(500):
        rows = i % 16
        model.observe(features(decode_rows=rows), 2e-3 - 1e-4 * rows)
    assert np.all(model.coefficients >= 0)
    assert model.coefficients[FEATURES.index("decode_rows")] < 1e-6
    times = [model.predict(features(decode_rows=n))[0] for n in range(100)]
    assert times == sorted(times)
    assert times[0] > 0


def test_errors_are_counted() -> None:
    model, x = known(COSTS), features(decode_rows=2)
    assert model.median_relative_error == 1
    exact = float(x @ COSTS)
    for error in [0.1] * 150 + [0.3] * 106:
        model.observe(x, exact * (1 + error))
    assert model.median_relative_error == pytest.approx(0.1, rel=1e-2)
    assert model.relative_error == pytest.approx(0.3, rel=1e-2)


def test_a_prior_of_zero_is_for_ever() -> None:
    model = StepTimeModel(features() * 1e-3)
    for rows in range(50):
        model.observe(features(decode_rows=rows), 1e-3 + rows)
    assert np.count_nonzero(model.coefficients) == 1


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="features"):
        StepTimeModel().observe(np.ones(3), 1.0)
    with pytest.raises(ValueError, match="features"):
        StepTimeModel().predict(features(decode_rows=math.nan))
    with pytest.raises(ValueError, match="prior"):
        StepTimeModel(np.zeros(len(FEATURES)))
    with pytest.raises(ValueError, match="forgetting"):
        StepTimeModel(forgetting=0)
    with pytest.raises(ValueError, match="num_drafters"):
        Acceptance(0)
    with pytest.raises(ValueError, match="drafters"):
        observe(Acceptance(1), 1, True, drafter=1)
    with pytest.raises(ValueError, match="hits"):
        observe(Acceptance(1), -1, True)
    zero = i32(0)
    for name, proposes, rivals in [
        ("same length", np.array([True] * 2), None),
        ("rivals", np.array([True]), np.zeros((2, 3), np.int32)),
        ("rivals", np.array([True]), np.array([[2, 0, 1]], np.int32)),
        ("rivals", np.array([True]), np.array([[0, 0, -1]], np.int32)),
    ]:
        with pytest.raises(ValueError, match=name):
            policy_for(Acceptance(2)).choose(
                features(), np.array([1], np.uint64), zero, zero, zero, proposes, 9, rivals=rivals
            )
    with pytest.raises(ValueError, match="experts_per_token"):
        experts_touched(3, 4, 5)


# ---- Acceptance --------------------------------------------------------------------------------


def policy_for(acceptance: Acceptance, costs: NDArray[np.float64] = COSTS) -> DepthPolicy:
    return DepthPolicy(known(costs), acceptance)


def meet(policy: DepthPolicy, request_id: int, match_len: int = 0, drafter: int = 0) -> None:
    """Makes the request known to the policy."""
    ids = np.array([request_id], np.uint64)
    policy.choose(
        features(decode_rows=1), ids, i32(drafter), i32(match_len), i32(1), np.array([False]), 0
    )


def test_rates_are_those_of_places() -> None:
    """The first draft always right, the second never: a request that is not known has both."""
    acceptance = Acceptance(1, shared_memory=1e9)
    for place in range(40):
        assert acceptance.rate(7, 0, 0, place) == 0.5
    for _ in range(100):
        observe(acceptance, 1, True)
    first = (100 + 4 * 0.5) / 104
    assert acceptance.rate(7, 0, 0, 0) == pytest.approx(first, rel=1e-5)
    assert acceptance.rate(7, 0, 0, 1) == pytest.approx(4 * first / 104, rel=1e-5)
    observe(acceptance, 0, False)  # nothing was seen
    assert acceptance.rate(7, 0, 0, 0) == pytest.approx(first, rel=1e-5)


def test_rates_converge_at_every_place() -> None:
    rng, acceptance = np.random.default_rng(4), Acceptance(1)
    meet(policy_for(acceptance), 1)
    wanted = [0.9, 0.5, 0.8, 0.3]
    for _ in range(4000):
        hits = 0
        while hits < 4 and rng.random() < wanted[hits]:
            hits += 1
        observe(acceptance, hits, hits < 4)
    got = [acceptance.rate(1, 0, 0, place) for place in range(4)]
    np.testing.assert_allclose(got, wanted, atol=0.06)


def test_recent_text_matters() -> None:
    acceptance = Acceptance(2)
    policy = policy_for(acceptance)
    for request_id in (1, 2):
        meet(policy, request_id)
        for _ in range(300):
            observe(acceptance, request_id - 1, request_id == 1, request_id)
    assert acceptance.rate(1, 0, 0, 0) < 0.1
    assert acceptance.rate(2, 0, 0, 0) > 0.9
    for _ in range(40):
        observe(acceptance, 1, False, 1)
    assert acceptance.rate(1, 0, 0, 0) > 0.8


def test_an_unlucky_row_among_equals_is_believed_less_than_among_unequals() -> None:
    rng = np.random.default_rng(5)
    rates = {}
    for name, chances in {"equals": (0.6, 0.6), "unequals": (0.2, 1.0)}.items():
        acceptance = Acceptance(2)
        policy = policy_for(acceptance)
        for request_id in range(2, 40):
            meet(policy, request_id)
            for _ in range(40):
                hit = rng.random() < chances[request_id % 2]
                observe(acceptance, int(hit), not hit, request_id)
        meet(policy, 1)
        for _ in range(6):
            observe(acceptance, 0, True, 1)
        rates[name] = acceptance.rate(1, 0, 0, 0)
    assert rates["equals"] > 0.4
    assert rates["unequals"] < 0.3


def test_places_not_reached_follow_those_that_were() -> None:
    acceptance = Acceptance(2)
    policy = policy_for(acceptance)
    for request_id in range(2, 30):
        meet(policy, request_id)
        for _ in range(30):
            observe(acceptance, 2 * (request_id % 2), request_id % 2 == 0, request_id)
    meet(policy, 1)
    for _ in range(30):
        observe(acceptance, 1, False, 1)
    assert acceptance.rate(1, 0, 0, 1) > 0.95


def test_drafters_and_match_lengths_are_kept_apart_and_requests_forgotten() -> None:
    acceptance = Acceptance(2)
    policy = policy_for(acceptance)
    meet(policy, 1, match_len=5)
    for _ in range(50):
        observe(acceptance, 3, False, 1, match_len=4)
    assert acceptance.rate(1, 0, 7, 0) > 0.9  # 4 to 7 tokens are one kind
    assert acceptance.rate(1, 0, 8, 0) == 0.5
    assert acceptance.rate(1, 1, 4, 0) == 0.5
    assert acceptance.num_requests == 1
    acceptance.forget(1)
    assert acceptance.num_requests == 0
    observe(acceptance, 1, False, 1, match_len=4)  # late: the drafter learns, nobody is made
    assert acceptance.num_requests == 0


# ---- Depths ------------------------------------------------------------------------------------


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


# ---- The policy in time ------------------------------------------------------------------------


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


def proposed_beside(
    rival_len: int, rate: float, *, num_in_hand: int = 0, num_lately: int = 0
) -> int:
    """How many always right proposals, of 8 at most, a step of 10 ms has where a draft from tokens
    has so many places, each right so often. A proposal takes 0.5 ms, verifying as long."""
    costs = COSTS * 0
    for name, cost in {"step": 10e-3, "verify_tokens": 5e-4, "propose_tokens": 5e-4}.items():
        costs[FEATURES.index(name)] = cost
    acceptance, rng = Acceptance(2, request_memory=1000), np.random.default_rng(1)
    policy = policy_for(acceptance, costs)
    for _ in range(400):
        observe(acceptance, 8, False, drafter=1)
        hits = int(np.cumprod(rng.random(8) < rate).sum())
        observe(acceptance, hits, hits < 8)
    rivals = np.array([[0, 0, 0], [0, 0, rival_len]], np.int32)
    proposed = 0
    for limits in [(num_lately, 0)] * 60 + [(num_in_hand, 8)]:
        proposed = policy.choose(
            features(decode_rows=1), np.ones(2, np.uint64), i32(0, 1), i32(0, 0), i32(*limits),
            np.array([False, True]), 99, rivals=rivals,
        )[1]  # fmt: skip
    return int(proposed)


def test_proposals_are_worth_what_tokens_alone_do_not_give() -> None:
    assert proposed_beside(0, 0.99) == 8
    assert proposed_beside(8, 0.99) == 0  # 0.4 tokens in 8 ms, and 1 in 10 without
    assert proposed_beside(2, 0.99) == 8  # 6, for the sake of the last
    assert proposed_beside(8, 0.3) == 8
    assert proposed_beside(8, 0.95) == 8  # 1.6 tokens
    assert proposed_beside(8, 0.95, num_lately=2) == 0  # 3 tokens in 11 ms, in steps before


def test_drafts_in_hand_are_what_proposals_have_to_beat() -> None:
    assert proposed_beside(0, 0.99) == 8  # 9 tokens in 18 ms
    assert proposed_beside(0, 0.99, num_in_hand=8) == 8  # and 8 more, in the same time
    assert proposed_beside(8, 0.99, num_in_hand=8) == 0


@pytest.mark.parametrize("rival_len", [0, 1])
def test_proposals_must_beat_what_time_gained_lately(rival_len: int) -> None:
    """Verifying takes 0.5 ms, proposing 2; drafts in hand give 9 tokens in 14 ms, no drafts 1 in
    10."""
    costs = COSTS * 0
    for name, cost in {"step": 10e-3, "verify_tokens": 5e-4, "propose_tokens": 2e-3}.items():
        costs[FEATURES.index(name)] = cost
    acceptance = Acceptance(2)
    policy = policy_for(acceptance, costs)

    def depths(num_in_hand: int, num_proposed: int) -> list[int]:
        for drafter in (0, 1):
            observe(acceptance, 8, False, drafter=drafter)
        chosen: list[int] = policy.choose(
            features(decode_rows=1), np.ones(2, np.uint64), i32(0, 1), i32(0, 0),
            i32(num_in_hand, num_proposed), np.array([False, True]), 99,
            rivals=np.array([[0, 0, 0], [0, 0, rival_len]], np.int32),
        ).tolist()  # fmt: skip
        return chosen

    for _ in range(300):  # both are known to be right
        depths(0, 0)
    assert depths(0, 8) == [0, 8]
    for _ in range(60):
        assert depths(8, 0) == [8, 0]
    assert depths(0, 8) == [0, 0]
    for _ in range(200):
        depths(0, 0)
    assert depths(0, 8) == [0, 8]


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
