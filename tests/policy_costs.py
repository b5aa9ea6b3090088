# SPDX-License-Identifier: MIT
"""Made-up costs of steps, and a policy that is sure of them: for tests of speculation."""

import numpy as np
from numpy.typing import NDArray

from tokenspeed._policy import (
    FEATURES,
    Acceptance,
    DepthPolicy,
    StepTimeModel,
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


def policy_for(acceptance: Acceptance, costs: NDArray[np.float64] = COSTS) -> DepthPolicy:
    return DepthPolicy(known(costs), acceptance)


def meet(policy: DepthPolicy, request_id: int, match_len: int = 0, drafter: int = 0) -> None:
    """Makes the request known to the policy."""
    ids = np.array([request_id], np.uint64)
    policy.choose(
        features(decode_rows=1), ids, i32(drafter), i32(match_len), i32(1), np.array([False]), 0
    )
