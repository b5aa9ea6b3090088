# SPDX-License-Identifier: MIT
"""`Ledger`: what drafts have cost and gained, as measured, and when to go without them for a time.

Whatever is believed of drafts, looking for them, choosing and verifying take time. So all nap now
and then, for some steps in a row, and what these take is the measure. Drafts may lose `SHARE` of
the time in the long run, and what they gained before or have as a credit. Steps with prefill are
not judged. Knows times and counts; refuses to know requests, drafters and how depths are chosen.
"""

from typing import Final

# Units are the time of a step without drafts, where nothing else is said.
SHARE: Final = 0.005  # of the time may be lost
MOST: Final = 64.0  # is lent at first; more than that is not kept of what is gained
FORGIVEN: Final = 4.0  # is lent where debts are forgiven
FORGIVES_AFTER: Final = (64, 4096)  # steps, first and longest; twice as many after each in vain
MEASURES_AFTER: Final = 256  # steps in which somebody was awake; fewer if nothing is known
MEASURES: Final = 2  # pieces of a nap, the first of which comes right after drafts, and is slow
LEAST: Final = 8  # steps in a row are a measurement
OUTLIER: Final = 8.0  # is the most that a step is believed to cost
MEMORY: Final = 2  # measurements
NEAR: Final = 0.25  # of the rows, more or fewer: as far a measurement holds


class Ledger:
    """naps -> over, for each step; only for steps that do not overlap."""

    def __init__(self) -> None:
        self._plain_s: dict[int, float] = {}  # by rows: a step in which all nap
        self._balance_s: float | None = None  # may be lost from now on
        self._rows = 1  # of the latest step
        self._num_awake = 0  # steps with somebody awake, since a measurement was wanted
        self._measures_after = 1
        self._num_measures = 0  # that are to come
        self._num_steps = self._forgives_at = 0
        self._forgives_after, self._won_s = FORGIVES_AFTER[0], 0.0  # since debts were forgiven

    @property
    def is_broke(self) -> bool:
        return self._balance_s is not None and self._balance_s < 0

    def naps(self) -> bool:
        """Before a step: whether nobody shall look for drafts."""
        if self._num_measures:
            self._num_measures -= 1
            return True
        return self.is_broke

    def over(self, rows: int, seconds: float, accepted: int | None, num_alike: int = 1) -> None:
        """A step of so many rows, one token each and the accepted ones. None: nobody was awake.
        `seconds` are those of so many steps of as many rows; only the last one can be other."""
        self._num_steps += num_alike
        self._rows = rows
        if accepted is None:
            if num_alike >= LEAST:
                self._learn(rows, seconds / num_alike)
            self._add(SHARE * seconds)
            return
        self._num_awake += 1
        plain_s = self._expected(rows)
        if self._num_awake >= (self._measures_after if plain_s is None else MEASURES_AFTER):
            self._num_measures, self._num_awake = MEASURES, 0
            self._measures_after = min(2 * self._measures_after, MEASURES_AFTER)
        if plain_s is not None:
            cost_s = min(seconds - num_alike * plain_s, OUTLIER * plain_s)
            self._won_s += accepted / rows * plain_s - cost_s
            self._add(accepted / rows * plain_s - cost_s + SHARE * seconds)
            if self._won_s > 2 * FORGIVEN * plain_s:
                self._forgives_at, self._forgives_after = 0, FORGIVES_AFTER[0]

    def passed(self, seconds: float, num_steps: int = 1) -> None:
        """Steps that are not judged."""
        self._num_steps += num_steps
        self._add(SHARE * seconds)

    def forgive(self) -> None:
        """Something long was repeated: drafts deserve another chance, if they had none lately."""
        plain_s = self._expected(self._rows)
        if plain_s is not None and self.is_broke and self._num_steps >= self._forgives_at:
            self._balance_s, self._won_s = FORGIVEN * plain_s, 0.0
            self._forgives_at = self._num_steps + self._forgives_after
            self._forgives_after = min(2 * self._forgives_after, FORGIVES_AFTER[1])

    def _learn(self, rows: int, seconds: float) -> None:
        self._num_awake, self._measures_after = 0, 1
        known = self._plain_s.setdefault(rows, seconds)
        self._plain_s[rows] += (min(seconds, 2 * known) - known) / MEMORY

    def _expected(self, rows: int) -> float | None:
        nearest = min(self._plain_s, key=lambda known: abs(known - rows), default=None)
        if nearest is None or abs(nearest - rows) > NEAR * rows:
            return None
        return self._plain_s[nearest]

    def _add(self, gained_s: float) -> None:
        plain_s = self._expected(self._rows)
        if plain_s is None:
            return
        before = MOST * plain_s if self._balance_s is None else self._balance_s
        self._balance_s = min(before + gained_s, MOST * plain_s)
