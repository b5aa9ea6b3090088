# SPDX-License-Identifier: MIT
"""Drafts may lose so much of the time and no more, whatever anybody believes of them."""

from collections.abc import Callable

import pytest

from tokenspeed.engine.ledger import (
    FORGIVES_AFTER,
    LEAST,
    MEASURES,
    MEASURES_AFTER,
    MOST,
    SHARE,
    Ledger,
)
from tokenspeed.engine.worth import PATIENCE, RETRIED, Worth

PLAIN_S = 0.01


def played(ledger: Ledger, steps: int, drafted: Callable[[int], tuple[float, int]]) -> list[bool]:
    """Steps of four rows; `drafted` gives the seconds of one with drafts, and what was accepted.
    Which of them were naps."""
    naps = []
    for step in range(steps):
        naps.append(ledger.naps())
        if naps[-1]:
            ledger.over(4, LEAST * PLAIN_S, None, LEAST)
        else:
            ledger.over(4, *drafted(step))
    return naps


@pytest.mark.parametrize(("cost", "accepted"), [(1.5, 0), (1.5, 1), (3.0, 4)])
def test_what_drafts_lose_is_bounded(cost: float, accepted: int) -> None:
    naps = played(Ledger(), 4000, lambda step: (cost * PLAIN_S, accepted))
    awake, num_steps = len(naps) - sum(naps), len(naps) + (LEAST - 1) * sum(naps)
    lost = awake * (cost - 1 - accepted / 4)
    assert 0 < lost <= SHARE * num_steps * cost + MOST + cost + 1


def test_what_was_gained_may_be_lost_again_as_far_as_it_is_remembered() -> None:
    ledger = Ledger()
    played(ledger, 500, lambda step: (1.5 * PLAIN_S, 4))
    naps = played(ledger, 2000, lambda step: (2 * PLAIN_S, 0))
    assert MOST / 2 < 2000 - sum(naps) <= MOST + SHARE * 2000 * LEAST + 2


def test_drafts_that_pay_are_left_alone_but_for_measurements() -> None:
    naps = played(Ledger(), 4000, lambda step: (1.5 * PLAIN_S, 3))
    assert sum(naps) <= 4000 * MEASURES / MEASURES_AFTER + MEASURES


def test_a_step_that_was_held_up_counts_as_a_long_one_and_no_more() -> None:
    def drafted(step: int) -> tuple[float, int]:
        return (5.0 if step == 100 else 1.2 * PLAIN_S), 2

    naps = played(Ledger(), 400, drafted)
    assert not all(naps[110:130])
    assert sum(naps[150:]) < 60


def test_the_broke_are_forgiven_now_and_then() -> None:
    ledger = Ledger()
    played(ledger, 1100, lambda step: (2 * PLAIN_S, 0))
    while not ledger.is_broke:
        played(ledger, 1, lambda step: (2 * PLAIN_S, 0))
    ledger.forgive()
    assert not ledger.naps()
    ledger.over(4, 6 * PLAIN_S, 0)
    ledger.forgive()
    assert ledger.naps()  # it was so lately
    for _ in range(FORGIVES_AFTER[0]):
        ledger.over(4, PLAIN_S, None)
    ledger.forgive()
    assert not ledger.is_broke
    ledger.over(4, 6 * PLAIN_S, 0)
    for _ in range(FORGIVES_AFTER[0]):
        ledger.over(4, PLAIN_S, None)
    ledger.forgive()
    assert ledger.is_broke  # that was in vain: it takes twice as long


def test_times_of_other_numbers_of_rows_hold_near_by_only() -> None:
    ledger = Ledger()
    ledger.over(16, 0.08, None, LEAST)
    ledger.over(14, 0.03, 7)
    assert not ledger.naps()
    ledger.over(2, 0.03, 1)  # nobody knows what two rows take
    assert [ledger.naps() for _ in range(MEASURES + 1)] == [True] * MEASURES + [False]


def test_a_short_nap_is_no_measurement() -> None:
    ledger = Ledger()
    ledger.over(4, LEAST * 2 * PLAIN_S, None, LEAST)  # far too long
    naps = 0
    for step in range(4000):
        if ledger.naps():
            naps += 1
            ledger.over(4, LEAST * PLAIN_S, None, LEAST)
        elif step % 100 == 0:
            ledger.over(4, 1.9 * PLAIN_S, None)  # somebody rested, right after drafts
        else:
            ledger.over(4, 1.9 * PLAIN_S, 0)
    assert naps > 3000


def test_debts_are_forgiven_by_what_steps_take_now() -> None:
    ledger = Ledger()
    ledger.over(64, 10 * LEAST * PLAIN_S, None, LEAST)
    ledger.over(1, LEAST * PLAIN_S, None, LEAST)
    ledger._balance_s = 0.0
    awake = 0
    for _ in range(20_000):
        ledger.forgive()
        if ledger.naps():
            ledger.over(1, PLAIN_S, None)
        else:
            awake += 1
            ledger.over(1, 2 * PLAIN_S, 0)
    assert awake < 20_000 * 2 * SHARE + 100


def test_steps_that_are_not_judged_pay_debts_too() -> None:
    ledger = Ledger()
    ledger.over(4, LEAST * PLAIN_S, None, LEAST)
    ledger._balance_s = -PLAIN_S
    for _ in range(250):
        ledger.passed(PLAIN_S)
    assert not ledger.is_broke


def test_steps_alike_count_as_many() -> None:
    one, other = Ledger(), Ledger()
    for ledger in (one, other):
        ledger.over(1, LEAST * PLAIN_S, None, LEAST)
        for _ in range(130):
            ledger.over(1, 1.5 * PLAIN_S, 0)
        assert ledger.is_broke
    one.over(1, 300 * PLAIN_S, None, 300)
    for _ in range(300):
        other.over(1, PLAIN_S, None)
    assert one.is_broke == other.is_broke is False


def test_matches_that_give_nothing_are_looked_at_rarely() -> None:
    worth = Worth()
    for _ in range(PATIENCE):
        assert worth.tries(3)
        worth.found(3, is_taken=False)
    assert sum(worth.tries(2) for _ in range(10 * RETRIED)) == 10  # 2 and 3 are of a kind
    assert worth.tries(4)
    worth.found(3, is_taken=True)
    assert all(worth.tries(3) for _ in range(20))
