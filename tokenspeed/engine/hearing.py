# SPDX-License-Identifier: MIT
"""`Hearing`: tells token drafters what was sampled, as late as may be, and knows who is awake.

    awake   somebody looks for drafts of a request before each step
    rest    of one request: nobody does, for some steps or until much more matches
    nap     of all: nobody does, because the ledger says so
    doze    a step of which nobody need know more than its ids, as all that it has nap or rest

Drafters hear what was dozed through at once: up to `NAP` steps. A long match ends a rest when it is
heard, and is a reason to try again although drafts have lost. Knows ids; refuses to know what
drafts are found.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from tokenspeed.engine.ledger import LEAST, Ledger
from tokenspeed.execution.plan_view import Plans
from tokenspeed.execution.speculation.drafter import TokenDrafter

NAP: Final = 32  # steps of a doze, and the one before it, at most
WAKING_MATCH: Final = 8  # tokens, and twice what matched before: ends a rest
LONG_MATCH: Final = 16  # tokens

# Of a step: requests [R], how many ids each got, and the ids of all.
Heard = tuple[Sequence[int], Sequence[int], Sequence[int]]
ALWAYS: Final = (0, 0)  # awake by any match, at any step


class Hearing:
    """begin_step -> dozes -> hear -> over, for each step. `never_naps`: steps overlap, or several
    schedulers plan them."""

    def __init__(
        self, drafters: Sequence[TokenDrafter], ledger: Ledger | None, *, never_naps: bool
    ) -> None:
        self._drafters, self._ledger, self._never_naps = drafters, ledger, never_naps
        self._heard: tuple[list[int], ...] = [], [], []  # as `Heard`, that drafters were not told
        self._resting: dict[int, tuple[int, int]] = {}  # the match, and the step, that end it
        self._num_steps = 0
        self._num_dozes = 0  # to come
        self._num_dozed = 0  # not booked yet
        self._begins = True  # the step was not to be dozed through
        self._busy_s, self._rows, self._is_typical = 0.0, 0, True  # when, and of what, it was over
        self.naps = self.is_dozing = False  # in this step
        self.num_unseen = 0  # rows that brought ids and were not looked at, ever

    @property
    def _now(self) -> int:
        """Steps before the one that is heard, if one is."""
        return self._num_steps + self._num_dozed

    def remove(self, request_id: int) -> None:
        """The request is over."""
        self.listen()
        self._resting.pop(request_id, None)

    def rouse(self) -> None:
        """Something is new: unless all nap, no step is dozed through."""
        if not self.naps:
            self._num_dozes = 0

    def rest(self, request_id: int, match_len: int, num_steps: int) -> None:
        """Nothing is looked for in this request for so many steps, unless much more matches.

        `num_steps` is a power of two; where steps are dozed through, some more, so that rests end
        together: in between nobody is awake."""
        match, until = max(WAKING_MATCH, 2 * match_len), self._now + num_steps
        if not self._never_naps:
            until += -until % min(num_steps, NAP)
        self._resting[request_id] = match, until

    def begin_step(self) -> bool:
        """Whether nobody looks for drafts in it."""
        self._begins = not self._num_dozes
        if self._begins:
            self.naps = self._ledger is not None and self._ledger.naps()
        return self.naps or self._num_dozes > 0

    def dozes(self, plans: Plans, busy_s: float) -> bool:
        """Whether nobody need know anything of this step but the ids that it brings. `busy_s`: in
        all steps before it."""
        self.is_dozing = self._num_dozes > 0
        if not self.is_dozing:
            return False
        self._num_dozes -= 1
        rows = 0
        for plan in plans:
            if plan is not None:
                self.is_dozing &= plan.only_decodes and not len(plan.binds)
                rows += plan.num_rows
        if rows != self._rows or not self.is_dozing:
            self._settle(busy_s)
            self._rows = rows
        self._num_dozed += self.is_dozing
        return self.is_dozing

    def held_up(self) -> None:
        """A step that was dozed through took longer than others like it will."""
        self._is_typical = False

    def overhear(self, heard: Heard) -> None:
        """As `hear`, dozing."""
        for known, new in zip(self._heard, heard, strict=True):
            known += new

    def hear(self, heard: Heard, *, is_busy: bool) -> list[tuple[int, int]]:
        """Which rows are awake, and how many tokens matched. `is_busy`: the step verified, or
        proposed."""
        self.overhear(heard)
        owners = heard[0]
        if not self._never_naps and not is_busy:
            if self.naps:
                self._nap()
                return []
            if all(owner in self._resting for owner in owners):
                self._num_dozes = self._num_dozes or self._most_dozes(owners)
        return self._awake(owners, self.listen())

    def over(self, rows: int, busy_s: float, accepted: int | None, *, is_typical: bool) -> None:
        """The step that was heard is over, as were those dozed through: see `Ledger.over`. `busy_s`
        in all steps until now; no rows: it had prefill."""
        self._num_dozed += 1
        self._is_typical &= is_typical
        self._rows = rows
        self._settle(busy_s, accepted)

    def _settle(self, busy_s: float, accepted: int | None = None) -> None:
        """The steps since the last call are over."""
        num_alike, self._num_dozed = self._num_dozed, 0
        typical, self._is_typical = self._is_typical, True
        seconds, self._busy_s = busy_s - self._busy_s, busy_s
        self._num_steps += num_alike
        if self._ledger is None or not num_alike:
            return
        if self._rows and typical:
            self._ledger.over(self._rows, seconds, accepted, num_alike)
        else:
            self._ledger.passed(seconds, num_alike)

    def _nap(self) -> None:
        """In a step of a nap: the next ones are dozed through."""
        if not self._begins or self._ledger is None:
            return
        if not self._ledger.is_broke:  # it is measured what steps take
            self._num_dozes = LEAST - 1
            return
        self._num_dozes = NAP - 1
        if max(self.listen(), default=0) >= LONG_MATCH:
            self._ledger.forgive()

    def listen(self) -> list[int]:
        """Tells drafters all; how many tokens each piece ends with that occurred before."""
        owners, counts, ids = self._heard
        if not owners:
            return []
        self._heard = [], [], []
        self.num_unseen += len(owners)
        told = np.array(owners, np.uint64), np.array(counts, np.int32), np.array(ids, np.int32)
        lengths = [drafter.extend(*told) for drafter in self._drafters]
        if len(lengths) == 1:
            return lengths[0]
        return list(map(max, zip(*lengths, strict=True))) or [0] * len(owners)

    def _most_dozes(self, owners: Sequence[int]) -> int:
        """Until the step that ends the first rest of these."""
        ends = min((self._resting[owner][1] for owner in owners), default=0)
        return max(min(ends - self._now - 1, NAP) - 1, 0)

    def _awake(self, owners: Sequence[int], matches: list[int]) -> list[tuple[int, int]]:
        """Ends rests; `matches` ends with those of the owners."""
        awake, first = [], len(matches) - len(owners)
        for row, owner in enumerate(owners):
            match = matches[first + row]
            until = self._resting.get(owner, ALWAYS)
            if match >= until[0] or self._now + 1 >= until[1]:
                self._resting.pop(owner, None)
                awake.append((row, match))
        if awake:
            self.rouse()
        self.num_unseen -= len(awake)
        return awake
