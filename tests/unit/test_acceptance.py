# SPDX-License-Identifier: MIT
"""How often drafts are right: by request, drafter and place. No model, no clock."""

import numpy as np
import pytest

from tests.policy_costs import meet, observe, policy_for
from tokenspeed._policy import (
    Acceptance,
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
