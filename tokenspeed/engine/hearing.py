# SPDX-License-Identifier: MIT
"""`Hearing`: tells token drafters what was sampled, as late as may be, and knows who sleeps.

Two things put to sleep: a request rests on its own for some steps, and all nap where the ledger
says so. While nobody is awake, drafters hear `NAP` steps at once, and the steps between cost
nothing: they doze. A long match ends a rest when it is heard, and a very long one is a reason to
look again although drafts have lost. Knows ids; refuses to know what drafts are found.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenspeed.engine.ledger import Ledger
from tokenspeed.execution.plan_view import Plans
from tokenspeed.execution.speculation.drafter import TokenDrafter

NAP: Final = 32  # steps, of which drafters hear at once while nobody is awake,
LEAST_NAP: Final = 8  # or as many as a rest has left, but not fewer
WAKING_MATCH: Final = 8  # tokens, and twice what matched before: ends a rest
LONG_MATCH: Final = 16  # tokens

Heard = tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32]]
ALWAYS: Final = (0, 0)  # awake by any match, at any step


class Hearing:
    """prepared -> dozes -> hear -> over, for each step. `ahead`: steps overlap, and nobody naps."""

    def __init__(
        self, drafters: Sequence[TokenDrafter], ledger: Ledger | None, *, ahead: bool
    ) -> None:
        self._drafters, self._ledger, self._ahead = drafters, ledger, ahead
        self._heard: list[Heard] = []  # that drafters were not told
        self._resting: dict[int, tuple[int, int]] = {}  # the match, and the step, that end it
        self._num_steps = self._num_dozes = self._num_dozed = 0  # dozes: to come; dozed: lately
        self._busy_s = 0.0
        self.naps = self.is_dozing = False  # in this step
        self.num_unseen = 0  # rows that brought ids and were not looked at, ever

    def remove(self, request_id: int) -> None:
        """The request is over."""
        self.listen()
        self._resting.pop(request_id, None)

    def rouse(self) -> None:
        """Something is new: unless all nap, no step is slept through."""
        self._num_dozes *= self.naps

    def rest(self, request_id: int, match_len: int, num_steps: int) -> None:
        """Nothing is looked for in this request for so many steps, unless much more matches."""
        match = max(WAKING_MATCH, 2 * match_len)
        self._resting[request_id] = match, self._num_steps + num_steps

    def prepared(self) -> bool:
        """Before a step: whether all nap."""
        if not self._num_dozes:
            self.naps = self._ledger is not None and self._ledger.naps()
        return self.naps or self._num_dozes > 0

    def dozes(self, plans: Plans) -> bool:
        """Whether nobody need know anything of this step but the ids that it brings."""
        self.is_dozing = self._num_dozes > 0
        if not self.is_dozing:
            return False
        self._num_dozes -= 1
        for plan in plans:
            if plan is not None and (not plan.only_decodes or len(plan.binds)):
                self.is_dozing = False
        self._num_dozed += self.is_dozing
        return self.is_dozing

    def overhear(self, heard: Heard) -> None:
        """As `hear`, dozing."""
        self._heard.append(heard)

    def hear(self, heard: Heard, num_live: int, *, is_busy: bool) -> list[tuple[int, int]]:
        """Requests [R] got the next `num_ids[r]` of ids. The rows of those that are awake, and how
        many tokens matched. `is_busy`: the step verified, or proposed."""
        self._heard.append(heard)
        sleep = not self._ahead and not is_busy and (self.naps or len(self._resting) == num_live)
        broke = self._ledger is not None and self._ledger.is_broke
        if sleep and self.naps and not broke:  # it is measured what steps take without drafts
            self._num_dozes = LEAST_NAP - 1
            return []
        matches = self.listen()
        if sleep:
            self._num_dozes = NAP - 1 if self.naps else self._most_dozes()
            if self.naps and self._ledger is not None:
                if max(matches, default=0) >= LONG_MATCH:
                    self._ledger.forgive()
                return []
        return self._awake(heard[0].tolist(), matches)

    def over(self, rows: int, busy_s: float, accepted: int | None, *, is_typical: bool) -> None:
        """The step that was heard is over, as were those dozed through: see `Ledger.over`. `busy_s`
        in all steps until now; no rows: it had prefill."""
        num_alike, self._num_dozed = 1 + self._num_dozed, 0
        self._num_steps += num_alike
        seconds, self._busy_s = busy_s - self._busy_s, busy_s
        if self._ledger is not None and rows and is_typical:
            self._ledger.over(rows, seconds, accepted, num_alike)

    def listen(self) -> list[int]:
        """Tells drafters all; how many tokens each piece ends with that occurred before."""
        if not self._heard:
            return []
        heard, self._heard = self._heard, []
        told = heard[0] if len(heard) == 1 else [np.concatenate(of) for of in zip(*heard)]  # noqa: B905
        self.num_unseen += len(told[0])
        lengths = [drafter.extend(*told) for drafter in self._drafters]
        return list(map(max, zip(*lengths, strict=True))) or [0] * len(told[0])

    def _most_dozes(self) -> int:
        """Until the first rest ends."""
        ends = min((step for _, step in self._resting.values()), default=0)
        left = min(ends - self._num_steps, NAP)
        return left - 1 if left >= LEAST_NAP else 0

    def _awake(self, owners: list[int], matches: list[int]) -> list[tuple[int, int]]:
        """Ends rests; `matches` ends with those of the owners."""
        awake, first = [], len(matches) - len(owners)
        for row, owner in enumerate(owners):
            match = matches[first + row]
            until = self._resting.get(owner, ALWAYS)
            if match >= until[0] or self._num_steps >= until[1]:
                self._resting.pop(owner, None)
                awake.append((row, match))
        if awake:
            self.rouse()
        self.num_unseen -= len(awake)
        return awake
