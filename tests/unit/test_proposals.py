# SPDX-License-Identifier: MIT
"""What proposals by weights are worth beside drafts that cost nothing."""

import numpy as np
import pytest

from tests.policy_costs import COSTS, features, i32, observe, policy_for
from tokenspeed._policy import (
    FEATURES,
    Acceptance,
)


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
