# SPDX-License-Identifier: MIT
"""`Ledger`: what drafts have cost and gained, as measured, and when to go without them for a time.

Whatever is believed of drafts, looking for them, choosing and verifying take time, and what a step
takes without any of it is measured too: now and then all nap for some steps. Drafts may lose
`SHARE` of the time in the long run, and what they gained before or have as a credit. Knows times
and counts; refuses to know requests, drafters and how depths are chosen.
"""

from typing import Final

SHARE: Final = 0.005  # of the time, that may be lost
MOST: Final = 64.0  # steps without drafts, whose time may be lost at once, and is lent at first
FORGIVEN: Final = 4.0  # ... when debts are forgiven
LOOK_EVERY: Final = 256  # steps; so often it is measured what they take without drafts,
LOOK: Final = 2  # by steps that are not dozed through; the first one counts for nothing,
LEAST: Final = 4  # as steps right after drafts take longer: so many alike are measured
OUTLIER: Final = 8.0  # a step believed to cost no more than so many of those without drafts
MEMORY: Final = 2  # measurements
NEAR: Final = 0.25  # step times hold for so many more or fewer rows, as a share
FORGIVES_AFTER: Final = (64, 4096)  # steps, at first and at most: in vain, the next time twice


class Ledger:
    """naps -> over, for each step; only for steps that do not overlap."""

    def __init__(self) -> None:
        self._plain_s: dict[int, float] = {}  # by rows: a step without drafts
        self._balance_s: float | None = None  # what may be lost from now on
        self._num_awake = 0  # steps since a nap
        self._num_looks = 0  # steps of naps that are to come
        self._num_steps, self._forgives_at, self._forgives_after = 0, 0, FORGIVES_AFTER[0]

    @property
    def is_broke(self) -> bool:
        return self._balance_s is not None and self._balance_s < 0

    def naps(self) -> bool:
        """Before a step: whether nobody shall look for drafts."""
        if self._num_looks:
            self._num_looks -= 1
            return True
        return self.is_broke

    def over(self, rows: int, seconds: float, accepted: int | None, num_alike: int = 1) -> None:
        """A step of so many rows, one token each and the accepted ones. None: nobody was awake.
        `seconds` are those of so many steps alike; of these only the last one can be other."""
        self._num_steps += num_alike
        if accepted is None:
            if num_alike >= LEAST:
                self._learn(rows, seconds / num_alike)
            self._add(SHARE * seconds, rows)
            self._num_awake = 0
            return
        self._num_awake += 1
        plain_s = self._expected(rows)
        if plain_s is None or self._num_awake >= LOOK_EVERY:
            self._num_looks, self._num_awake = LOOK, 0
        if plain_s is not None:
            cost_s = min(seconds - num_alike * plain_s, OUTLIER * plain_s)
            self._add(accepted / rows * plain_s - cost_s + SHARE * seconds, rows)

    def forgive(self) -> None:
        """Something long was repeated: drafts deserve another chance, if they had none lately."""
        if self.is_broke and self._num_steps >= self._forgives_at:
            self._balance_s = FORGIVEN * max(self._plain_s.values(), default=0.0)
            self._forgives_at = self._num_steps + self._forgives_after
            self._forgives_after = min(2 * self._forgives_after, FORGIVES_AFTER[1])

    def _learn(self, rows: int, seconds: float) -> None:
        known = self._plain_s.get(rows)
        if known is None:
            self._plain_s[rows] = seconds
        else:
            self._plain_s[rows] += (min(seconds, 2 * known) - known) / MEMORY

    def _expected(self, rows: int) -> float | None:
        nearest = min(self._plain_s, key=lambda known: abs(known - rows), default=None)
        if nearest is None or abs(nearest - rows) > NEAR * rows:
            return None
        return self._plain_s[nearest]

    def _add(self, gained_s: float, rows: int) -> None:
        plain_s = self._expected(rows)
        if plain_s is None:
            return
        before = MOST * plain_s if self._balance_s is None else self._balance_s
        self._balance_s = min(before + gained_s, MOST * plain_s)
        if self._balance_s > 2 * FORGIVEN * plain_s:
            self._forgives_at, self._forgives_after = 0, FORGIVES_AFTER[0]
