# SPDX-License-Identifier: MIT
"""The test by which the benchmark of tenants decides."""

import random

import pytest

from benchmarks.tenants import ks


def test_known_values():
    assert ks([1, 2, 3], [1, 2, 3]) == (0.0, 1.0)
    d, p = ks(range(100), range(1000, 1100))
    assert d == 1.0
    assert p < 1e-20
    d, p = ks([i / 100 for i in range(100)], [i / 100 + 0.2 for i in range(100)])
    assert d == pytest.approx(0.2, abs=0.011)
    assert p == pytest.approx(0.03, abs=0.01)


def test_false_alarms_are_as_rare_as_they_should_be():
    rng = random.Random(1)
    found = [
        ks([rng.random() for _ in range(60)], [rng.random() for _ in range(90)])[1]
        for _ in range(400)
    ]
    assert 0.02 < sum(p < 0.05 for p in found) / 400 < 0.08
    assert 0.4 < sum(p < 0.5 for p in found) / 400 < 0.6
