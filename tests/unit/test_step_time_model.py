# SPDX-License-Identifier: MIT
"""The model of step times: what it learns, forgets and refuses. No engine, no clock."""

import math

import numpy as np
import pytest

from tests.policy_costs import COSTS, features, i32, known, observe, policy_for, random_features
from tokenspeed._policy import (
    FEATURES,
    Acceptance,
    StepTimeModel,
    experts_touched,
)


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
