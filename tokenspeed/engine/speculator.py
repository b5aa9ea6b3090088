# SPDX-License-Identifier: MIT
"""`Speculator`: asks drafters what may come next, tells the scheduler, and learns what came of it.

    add -> [prepare -> next_plans -> launched -> extend each -> committed] ... -> remove

Nothing here can change an output: a draft is verified by the step that it is part of. Knows ids and
slots; refuses to know how drafts are found and verified, and how depths are learnt.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenspeed.engine.depths import Depths, Features, Offers
from tokenspeed.engine.draft_counts import DraftCounts, num_accepted
from tokenspeed.engine.messages import SpeculationStats
from tokenspeed.execution.plan_view import ROW_SAMPLE, PlanView, Words
from tokenspeed.execution.speculation.drafter import Proposal, TokenDrafter

NONE = np.empty(0, np.int32)


class Drafts(Protocol):
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

    num_tokens: int  # known
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


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step in flight. `carried`: of each busy request, how many draft tokens its row has."""

    carried: dict[int, int]
    features: Features | None
    launched_s: float


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
        ahead: bool = False,
    ) -> None:
        """`depth`: most tokens of a draft. `ahead`: steps are planned before the last ids came."""
        self._drafters, self._weighted = list(drafters), weighted
        self._depth, self._depths, self._ahead = depth, depths, ahead
        names = [drafter.name for drafter in drafters]
        names += [] if weighted is None else [weighted.name]
        self._max_propose = 0 if weighted is None else min(depth, weighted.max_depth)
        self._counts = [DraftCounts(name) for name in names]
        self._histogram = [0] * (depth + 1)
        self._live: dict[int, _Live] = {}
        self._fresh: list[int] = []  # requests that are new, or have new ids, since the last plans
        self._num_rows = self._num_context = 0  # of all that decode
        self._flights: deque[_Flight] = deque()
        self._committed_s = 0.0
        self._owners: list[dict[int, int]] = [{} for _ in range(num_dp)]  # slot -> request

    def add(self, request_id: int, prompt_ids: NDArray[np.int32], salt: bytes) -> None:
        """A request that the scheduler has taken."""
        for drafter in self._drafters:
            drafter.add(request_id, prompt_ids, salt)
        self._live[request_id] = _Live(len(prompt_ids))
        if self._weighted is not None:  # the last piece of the prompt can bring proposals already
            self._fresh.append(request_id)

    def remove(self, request_id: int) -> None:
        """The request is over, whichever way."""
        live = self._live.pop(request_id)
        self._num_rows -= live.has_ids
        self._num_context -= live.num_tokens if live.has_ids else 0
        for drafter in self._drafters:
            drafter.remove(request_id)
        if self._depths is not None:
            self._depths.forget(request_id)

    def prepare(self, schedulers: Drafts) -> None:
        """Gives the scheduler drafts for requests whose ids changed. Call it before planning."""
        fresh, self._fresh = self._fresh, []
        ready: list[tuple[int, _Live]] = []
        for request_id in fresh:
            live = self._live.get(request_id)
            if live is not None and not live.is_busy:
                was_set = bool(live.draft)
                self._find(request_id, live)
                if live.found or live.num_propose or was_set:
                    ready.append((request_id, live))
                else:
                    self._histogram[0] += live.has_ids
        if ready and self._depths is not None:
            self._shorten(ready, self._depths)
        for request_id, live in ready:
            self._histogram[len(live.draft)] += live.has_ids
            draft = np.array(live.draft, np.int32) if live.draft else NONE
            schedulers.speculate(request_id, draft, live.num_propose)

    def launched(self, plans: Sequence[Words | None], now_s: float) -> None:
        """These plans run now: notes which drafts they verify, as the planner shortened them."""
        carried: dict[int, int] = {}
        views = []
        for owners, words in zip(self._owners, plans, strict=True):
            if words is None:
                continue
            plan = PlanView(words)
            views.append(plan)
            if len(plan.binds):
                self._bind(owners, plan)
            if self._ahead:
                for slot in plan.slots[plan.flags & ROW_SAMPLE != 0].tolist():
                    self._live[owners[slot]].in_flight += 1
            rows = (plan.num_draft + plan.num_propose).nonzero()[0]
            if len(rows):
                busy = [owners[slot] for slot in plan.slots[rows].tolist()]
                carried.update(zip(busy, plan.num_draft[rows].tolist(), strict=True))
        for request_id in carried:
            self._live[request_id].is_busy = True
        features = None if self._depths is None else self._depths.features(views)
        self._flights.append(_Flight(carried, features, now_s))

    def extend(self, request_id: int, ids: list[int], proposed: Sequence[int] = ()) -> None:
        """The oldest step in flight gave these ids; the model drafter proposes what may follow."""
        live = self._live[request_id]
        carried = self._flights[0].carried.get(request_id)
        if carried is not None:
            live.is_busy = False
            if carried:
                accepted = num_accepted(live.draft[:carried], ids)
                live.num_draft += carried
                live.num_accepted += accepted
                self._counts[live.drafter].record(carried, accepted)
        if self._depths is not None and live.found and (carried or not self._ahead):
            self._compare(request_id, live, ids, self._depths)
        if carried is not None or not self._ahead:
            live.draft = []
            live.found.clear()
        live.proposed = proposed
        live.in_flight -= self._ahead and live.in_flight > 0
        for drafter in self._drafters:
            drafter.extend(request_id, ids)
        self._grow(live, len(ids))
        self._fresh.append(request_id)

    def committed(self, now_s: float) -> None:
        """The oldest step in flight is over, and all that it gave was told."""
        flight = self._flights.popleft()
        if self._depths is not None:
            if flight.features is not None:
                began_s = max(flight.launched_s, self._committed_s)
                self._depths.observe(flight.features, now_s - began_s)
            self._depths.learn()
        self._committed_s = now_s

    def drafted(self, request_id: int) -> tuple[int, int]:
        """Of a live request: tokens drafted so far, and how many of them were accepted."""
        live = self._live[request_id]
        return live.num_draft, live.num_accepted

    def stats(self) -> SpeculationStats:
        """Counts since the start."""
        drafters, depths = [counts.stats() for counts in self._counts], self._depths
        if depths is None:
            return SpeculationStats(drafters, list(self._histogram))
        times = (depths.num_steps, depths.predicted_s, depths.measured_s, depths.error)
        return SpeculationStats(drafters, list(self._histogram), *times)

    def _find(self, request_id: int, live: _Live) -> None:
        """What may come next, and whose draft to take: all of it, and as deep as can be."""
        live.found.clear()
        live.draft, live.num_propose = [], self._max_propose
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
        if first[0] == weights or not self._max_propose:
            return first
        if self._depths is None or self._depths.better(
            request_id, (first[0], first[1].match_len), (weights, 0)
        ):
            live.num_propose = 0
            return first
        return live.found[-1]

    def _shorten(self, ready: list[tuple[int, _Live]], depths: Depths) -> None:
        """Drafts and proposals as deep as they pay. What weights have proposed is paid for."""
        weights, num_verify = len(self._drafters), 0
        offers, takers = Offers(), []
        for request_id, live in ready:
            if live.draft and live.drafter != weights:
                match_len = live.found[0][1].match_len
                offers.add(request_id, live.drafter, match_len, len(live.draft))
                takers.append((live, False))
            else:
                num_verify += len(live.draft)
            if live.num_propose:
                offers.add(request_id, weights, 0, live.num_propose)
                takers.append((live, True))
        if not takers:
            return
        chosen = depths.choose(offers, self._num_rows, num_verify, self._num_context)
        for (live, proposes), depth in zip(takers, chosen, strict=True):
            if proposes:
                live.num_propose = depth
            else:
                live.draft = live.draft[:depth]

    def _compare(self, request_id: int, live: _Live, ids: list[int], depths: Depths) -> None:
        """All that was found with what came, whether a step carried it or not."""
        for drafter, proposal in live.found:
            hits = num_accepted(proposal.ids, ids)
            depths.findings.add(request_id, drafter, proposal.match_len, hits)
            depths.findings.missed.append(hits < min(len(ids), len(proposal.ids)))

    def _grow(self, live: _Live, num_ids: int) -> None:
        if not live.has_ids and num_ids:
            live.has_ids = True
            self._num_rows += 1
            self._num_context += live.num_tokens
        live.num_tokens += num_ids
        self._num_context += num_ids

    def _bind(self, owners: dict[int, int], plan: PlanView) -> None:
        for slot, request_id in zip(
            plan.binds[:, 0].tolist(), plan.bound_request_ids(), strict=True
        ):
            owners[slot] = request_id
            live = self._live[request_id]
            live.is_busy, live.in_flight = False, 0  # what was in flight then was lost
