# SPDX-License-Identifier: MIT
"""`Speculator`: asks drafters what may come next, tells the scheduler, and learns what came of it.

    add -> [prepare -> next_plans -> launched -> extend -> committed] ... -> remove

A request for which drafts did not pay some times in a row rests: for some steps, ever more, nothing
is looked for, chosen or told, unless a long match wakes it. Drafters with weights that hardly ever
pay are tired: they are tried on a request in `TRIED_ANEW`, and the others do without them.
Nothing here can change an output: a draft is verified by the step that it is part of. Knows ids and
slots; refuses to know how drafts are found and verified, and how depths are learnt.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenspeed.engine.depths import NO_RIVAL, Depths, Offers
from tokenspeed.engine.draft_counts import DraftCounts, num_accepted
from tokenspeed.engine.hearing import Heard, Hearing
from tokenspeed.engine.ledger import Ledger
from tokenspeed.engine.messages import SpeculationStats
from tokenspeed.engine.worth import Worth
from tokenspeed.execution.plan_view import ROW_PREFILL, ROW_SAMPLE, Plans, PlanView
from tokenspeed.execution.speculation.drafter import Proposal, TokenDrafter

NONE = np.empty(0, np.int32)
PATIENCE = 3  # times that drafts do not pay before the first rest
FIRST_REST, LONGEST_REST = 2, 128  # steps
# Proposals that were not worth it add 1 to the tiredness, those that were take `TIMES_WORTH` off.
# At `TIRED`, its greatest, one new request in `TRIED_ANEW` has weights propose.
TIRED, TIMES_WORTH, TRIED_ANEW = 24, 4, 32


class TakesDrafts(Protocol):
    """Who takes drafts (see `engine/schedulers.py`)."""

    def speculate(self, request_id: int, draft: NDArray[np.int32], num_propose: int) -> bool:
        """For the request's next row that samples. False: no such live request."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """A drafter with weights, as the engine sees it: it proposes in the step before."""

    name: str
    max_depth: int


@dataclass(eq=False, slots=True)
class _Live:
    """A request, and what was found to come next in it."""

    tries_weights: bool = False
    found: list[tuple[int, Proposal]] = field(default_factory=list)  # by drafter
    drafter: int = 0  # whose draft the scheduler has
    draft: list[int] = field(default_factory=list)
    num_propose: int = 0
    proposed: Sequence[int] = ()  # by the drafter with weights, after the last id
    is_busy: bool = False  # its row in flight verifies, or is proposed for: no other is planned
    in_flight: int = 0  # rows that will bring ids; counted only if steps overlap
    has_ids: bool = False  # it decodes
    num_draft: int = 0  # tokens, ever
    num_accepted: int = 0
    match_len: int = 0
    num_idle: int = 0  # times in a row that nothing was worth while
    rest: int = FIRST_REST  # steps, next time


class Speculator:
    """One per engine, on its thread. Token drafters are asked in order, the first that finds
    something is taken; where it is less likely to be right than a drafter with weights, that one's
    proposals are. Without `depths` drafts are as long as can be."""

    def __init__(
        self,
        drafters: Sequence[TokenDrafter],
        *,
        depth: int,
        weighted: Weighted | None = None,
        depths: Depths | None = None,
        num_dp: int = 1,
        ledger: Ledger | None = None,
        ahead: bool = False,
    ) -> None:
        """`depth`: most tokens of a draft. `ahead`: steps are planned before the last ids came,
        and there is no `ledger`."""
        self._drafters, self._weighted = list(drafters), weighted
        self._depth, self._depths, self._ahead = depth, depths, ahead
        names = [drafter.name for drafter in drafters]
        names += [] if weighted is None else [weighted.name]
        self._max_propose = 0 if weighted is None else min(depth, weighted.max_depth)
        self._counts = [DraftCounts(name) for name in names]
        self._histogram = [0] * (depth + 1)
        self._live: dict[int, _Live] = {}
        self._fresh: dict[int, None] = {}  # requests with news since the last plans
        self._worth = Worth()
        self._hearing = Hearing(self._drafters, ledger, never_naps=ahead or num_dp > 1)
        self._num_added = self._tiredness = 0
        self._num_accepted = 0  # of the oldest step in flight
        self._usual_rest = FIRST_REST  # of requests that begin, until a draft is accepted
        self._num_rows = 0  # of the latest plans; 0: there was prefill
        self._is_awake = False  # somebody was, before the latest plans
        self._latest: Plans = ()
        # Of each step in flight: how many draft tokens the row of each busy request has.
        self._flights: deque[dict[int, int]] = deque()
        self._owners: list[dict[int, int]] = [{} for _ in range(num_dp)]  # slot -> request

    @property
    def is_adaptive(self) -> bool:
        """Whether step times are asked for."""
        return self._depths is not None

    def add(self, request_id: int, prompt_ids: NDArray[np.int32], salt: bytes) -> None:
        """A request that the scheduler has taken."""
        for drafter in self._drafters:
            drafter.add(request_id, prompt_ids, salt)
        self._num_added += 1
        tries = self._tiredness < TIRED or self._num_added % TRIED_ANEW == 0
        live = self._live[request_id] = _Live(tries and self._weighted is not None)
        if live.tries_weights:  # the last piece of the prompt can bring proposals already
            self._hearing.rouse()
            self._fresh[request_id] = None

    def remove(self, request_id: int) -> None:
        """The request is over, whichever way."""
        self._hearing.remove(request_id)
        del self._live[request_id]
        self._fresh.pop(request_id, None)
        for drafter in self._drafters:
            drafter.remove(request_id)
        if self._depths is not None:
            self._depths.forget(request_id)

    def prepare(self, schedulers: TakesDrafts) -> None:
        """Gives the scheduler drafts for requests whose ids changed. Call it before planning."""
        napped = self._hearing.naps
        naps = self._hearing.begin_step()
        self._is_awake = bool(self._fresh) and not naps
        if not self._is_awake:
            return
        if napped:
            self._wake()
        fresh, self._fresh = self._fresh, {}
        ready: list[tuple[int, _Live]] = []
        for request_id in fresh:
            live = self._live[request_id]
            if not live.is_busy:
                was_set = bool(live.draft)
                self._find(request_id, live)
                if live.found or live.num_propose or was_set:
                    ready.append((request_id, live))
                else:
                    self._histogram[0] += live.has_ids
                    if self._depths is not None:
                        self._rest(request_id, live)
        if ready and self._depths is not None:
            self._shorten(ready, self._depths)
            for request_id, live in ready:
                self._rest(request_id, live)
        for request_id, live in ready:
            self._histogram[len(live.draft)] += live.has_ids
            draft = np.array(live.draft, np.int32) if live.draft else NONE
            schedulers.speculate(request_id, draft, live.num_propose)

    def _wake(self) -> None:
        """After a nap: what was proposed before it is of no use any more."""
        self._hearing.listen()
        for request_id in self._fresh:
            self._live[request_id].proposed = ()

    def dozes(self, plans: Plans, busy_s: float) -> bool:
        """Once for each step: whether of one of these plans nothing is told but `extend`, and
        `held_up` where it was. `busy_s`: seconds in all steps before it."""
        return self._hearing.dozes(plans, busy_s)

    def held_up(self) -> None:
        """The step, which was dozed through, took longer than others like it will."""
        self._hearing.held_up()

    def launched(self, plans: Plans) -> None:
        """These plans run now: notes which drafts they verify, as the planner shortened them."""
        carried: dict[int, int] = {}
        self._num_rows = sum(plan.num_rows for plan in plans if plan is not None)
        for owners, plan in zip(self._owners, plans, strict=True):
            if plan is None:
                continue
            if len(plan.binds):
                self._bind(owners, plan)
            if self._ahead:
                for slot in plan.slots[plan.flags & ROW_SAMPLE != 0].tolist():
                    self._live[owners[slot]].in_flight += 1
            if not plan.only_decodes:
                if (plan.flags & ROW_PREFILL).any():
                    self._num_rows = 0
                rows = (plan.num_draft + plan.num_propose).nonzero()[0]
                busy = [owners[slot] for slot in plan.slots[rows].tolist()]
                carried.update(zip(busy, plan.num_draft[rows].tolist(), strict=True))
        for request_id in carried:
            self._live[request_id].is_busy = True
        self._latest = plans
        self._flights.append(carried)

    def extend(self, heard: Heard, proposed: Mapping[int, Sequence[int]]) -> None:
        """What the oldest step in flight gave. `proposed`: what the model drafter says may
        follow."""
        if self._hearing.is_dozing:
            self._hearing.overhear(heard)
            return
        awake = self._hearing.hear(heard, is_busy=bool(self._flights[0]))
        if self._ahead:
            for request_id in heard[0]:
                live = self._live[request_id]
                live.in_flight -= live.in_flight > 0
        if not awake:
            return
        owners, num_ids, ids = heard
        ends = list(accumulate(num_ids))
        for row, match_len in awake:
            live = self._live[owners[row]]
            live.match_len = match_len
            own = ids[ends[row] - num_ids[row] : ends[row]]
            self._extend(owners[row], live, own, proposed)

    def _extend(
        self,
        request_id: int,
        live: _Live,
        ids: Sequence[int],
        proposed: Mapping[int, Sequence[int]],
    ) -> None:
        carried = self._flights[0].get(request_id)
        if carried is not None:
            live.is_busy = False
            if carried:
                accepted = num_accepted(live.draft[:carried], ids)
                live.num_draft += carried
                live.num_accepted += accepted
                self._num_accepted += accepted
                if accepted:
                    live.rest = self._usual_rest = FIRST_REST
                self._counts[live.drafter].record(carried, accepted)
        if self._depths is not None and live.found and (carried or not self._ahead):
            self._compare(request_id, live, ids, self._depths)
        if carried is not None or not self._ahead:
            live.draft = []
            live.found.clear()
        live.proposed = proposed.get(request_id, ())
        begins = bool(ids) and not live.has_ids
        if begins:
            live.has_ids, live.rest = True, self._usual_rest
        if live.tries_weights or self._may_pay(live, begins=begins):
            self._fresh[request_id] = None
        else:
            self._histogram[0] += 1
            if self._depths is not None:
                self._rest(request_id, live)

    def _may_pay(self, live: _Live, *, begins: bool) -> bool:
        """Whether to look for drafts. Who was woken is looked at, as its rest was long enough."""
        if live.rest > FIRST_REST:
            return not begins
        return self._worth.tries(live.match_len)

    def committed(self, busy_s: float = 0.0, *, is_typical: bool = True) -> None:
        """The oldest step in flight is over, and all that it gave was told. `busy_s`: seconds
        in all steps so far."""
        carried, accepted, self._num_accepted = self._flights.popleft(), self._num_accepted, 0
        if self._depths is not None:
            self._depths.learn()
        found = accepted if carried or self._is_awake else None
        self._hearing.over(self._num_rows, busy_s, found, is_typical=is_typical)

    def drafted(self, request_id: int) -> tuple[int, int]:
        """Of a live request: tokens drafted so far, and how many of them were accepted."""
        live = self._live[request_id]
        return live.num_draft, live.num_accepted

    def forget_ended(self) -> None:
        """Tokens of requests that were removed; what was learnt of drafts stays."""
        for drafter in self._drafters:
            drafter.forget_ended()

    def stats(self) -> SpeculationStats:
        """Counts since the start."""
        depths = list(self._histogram)
        depths[0] += self._hearing.num_unseen
        return SpeculationStats([counts.stats() for counts in self._counts], depths)

    def _find(self, request_id: int, live: _Live) -> None:
        """What may come next, and whose draft to take: all of it, and as deep as can be."""
        live.found.clear()
        live.draft, live.num_propose = [], self._max_propose if live.tries_weights else 0
        # Ids that are on their way are guessed first. They are no part of the draft: the row
        # carries the real ones instead of them.
        skip = live.in_flight
        if live.has_ids:
            for number, drafter in enumerate(self._drafters):
                proposal = drafter.propose(request_id, self._depth + skip)
                if len(proposal.ids) > skip:
                    found = Proposal(proposal.ids[skip:], proposal.match_len)
                    live.found.append((number, found if skip else proposal))
                    break
        if live.proposed and not skip:
            ids = list(live.proposed[: self._depth])
            live.found.append((len(self._drafters), Proposal(ids)))
        if live.found:
            live.drafter, proposal = self._best(request_id, live)
            live.draft = proposal.ids

    def _best(self, request_id: int, live: _Live) -> tuple[int, Proposal]:
        """Of what was found; where tokens alone are enough, weights need not propose."""
        first, weights = live.found[0], len(self._drafters)
        if first[0] == weights or not live.tries_weights:
            return first
        if self._depths is None or self._depths.better(
            request_id, (first[0], first[1].match_len), (weights, 0)
        ):
            live.num_propose = 0
            return first
        return live.found[-1]

    def _shorten(self, ready: list[tuple[int, _Live]], depths: Depths) -> None:
        """Drafts and proposals as deep as they pay."""
        weights = len(self._drafters)
        offers, takers = Offers(), []
        for request_id, live in ready:
            rival = NO_RIVAL
            if live.found and live.found[0][0] != weights:
                drafter, proposal = live.found[0]
                rival = drafter, proposal.match_len, len(proposal.ids)
            if live.draft:
                match_len = 0 if live.drafter == weights else rival[1]
                offers.have(request_id, live.drafter, match_len, len(live.draft))
                takers.append((live, False))
            if live.num_propose:
                offers.propose(request_id, weights, live.num_propose, rival)
                takers.append((live, True))
        if not takers:
            return
        latest = [plan for plan in self._latest if plan is not None]
        num_rows = sum(int((plan.flags & ROW_SAMPLE != 0).sum()) for plan in latest)
        num_context = sum(int(plan.starts.sum()) for plan in latest)
        chosen = depths.choose(offers, num_rows, num_context)
        for (live, proposes), rival, depth in zip(takers, offers.rivals, chosen, strict=True):
            if proposes:
                live.num_propose = depth
                worth = TIMES_WORTH if depth else -(rival == NO_RIVAL)
                self._tiredness = min(max(self._tiredness - worth, 0), TIRED)
            else:
                live.draft = live.draft[:depth]
                if live.drafter != weights:
                    self._worth.found(live.match_len, is_taken=depth > 0)

    def _compare(self, request_id: int, live: _Live, ids: Sequence[int], depths: Depths) -> None:
        """All that was found with what came, whether a step carried it or not."""
        for drafter, proposal in live.found:
            hits = num_accepted(proposal.ids, ids)
            depths.findings.add(request_id, drafter, proposal.match_len, hits)
            depths.findings.missed.append(hits < min(len(ids), len(proposal.ids)))

    def _rest(self, request_id: int, live: _Live) -> None:
        """After a choice: if nothing was worth while once more, the request rests."""
        if live.draft or live.num_propose or not live.has_ids:
            live.num_idle = 0
            return
        live.num_idle += 1
        if live.num_idle < PATIENCE and live.rest == FIRST_REST:
            return
        self._hearing.rest(request_id, live.match_len, live.rest)
        live.found.clear()  # what comes next is not compared with it
        live.num_idle, live.rest = 0, min(2 * live.rest, LONGEST_REST)
        self._usual_rest = max(self._usual_rest, live.rest // 2)

    def _bind(self, owners: dict[int, int], plan: PlanView) -> None:
        for slot, request_id in zip(
            plan.binds[:, 0].tolist(), plan.bound_request_ids(), strict=True
        ):
            owners[slot] = request_id
            live = self._live[request_id]
            live.is_busy, live.in_flight = False, 0  # what was in flight then was lost
