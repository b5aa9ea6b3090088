# SPDX-License-Identifier: MIT
"""`Schedulers`: one for each attention data-parallel index, and who gets which request.

Each has its own pages and slots. A request goes where most of its prompt is cached, unless load
says otherwise (`engine/routing.py`), and stays there. Knows ids and plans, no tensors.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenspeed._policy import Pacing
from tokenspeed._scheduler import Scheduler, Updates
from tokenspeed.engine.routing import Load, pick
from tokenspeed.execution.plan_view import PlanView, Words


def user_key(user: str) -> int:
    """64 bits that stand for a user; 0 for nobody in particular."""
    if not user:
        return 0
    digest = hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


@dataclass(slots=True)
class _Place:
    """Where a request is, and what of its prompt nobody has computed yet."""

    index: int
    waiting_tokens: int


class Schedulers:
    """The same calls as one `Scheduler`, with a plan for each index."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self._all = list(schedulers)
        self._places: dict[int, _Place] = {}
        self._waiting = [0] * len(self._all)
        self._open = [0] * len(self._all)
        self._last = -1

    def pace(self, pacing: Pacing) -> None:
        """Steps keep streams at their floors from now on. `ValueError`: there are several
        schedulers, or there was a request already."""
        if len(self._all) > 1:
            raise ValueError("pacing is for one scheduler")
        self._all[0].pace(pacing)

    def submit(
        self, request_id: int, prompt: NDArray[np.int32], salt: bytes, **options: Any
    ) -> None:
        """Queues a request with one of them. `ValueError` as the scheduler says it."""
        if request_id in self._places:
            raise ValueError(f"there is a request {request_id} already")
        index, waiting = self._choose(prompt, salt)
        self._all[index].submit(request_id, prompt, salt=salt, **options)
        self._places[request_id] = _Place(index, waiting)
        self._waiting[index] += waiting
        self._open[index] += 1
        self._last = index

    def _choose(self, prompt: NDArray[np.int32], salt: bytes) -> tuple[int, int]:
        if len(self._all) == 1:
            return 0, 0
        matched = [scheduler.match_prefix(prompt, salt) for scheduler in self._all]
        loads = [Load(*load) for load in zip(self._waiting, self._open, strict=True)]
        index = pick(matched, loads, self._last)
        if index is None:
            raise RuntimeError("no scheduler takes requests")
        return index, len(prompt) - matched[index]

    def abort(self, request_id: int) -> None:
        """Ends a request in any state."""
        self._all[self._places[request_id].index].abort(request_id)
        self.forget(request_id)

    def started(self, request_id: int) -> None:
        """The request has its first token: nothing of its prompt waits any more."""
        place = self._places[request_id]
        self._waiting[place.index] -= place.waiting_tokens
        place.waiting_tokens = 0

    def forget(self, request_id: int) -> None:
        """The request is over."""
        self.started(request_id)
        self._open[self._places.pop(request_id).index] -= 1

    def speculate(self, request_id: int, draft: NDArray[np.int32], num_propose: int = 0) -> bool:
        """What the request's next step verifies and proposes; False if it is over. `ValueError` for
        a negative id or number."""
        place = self._places.get(request_id)
        return place is not None and self._all[place.index].speculate(
            request_id, draft, num_propose
        )

    def next_plans(self) -> list[PlanView | None] | None:
        """A plan for each index that can run; None if none can."""
        found = [scheduler.next_plan() for scheduler in self._all]
        plans = [None if words is None else PlanView(words) for words in found]
        return plans if any(plans) else None

    def commit(self, index: int, words: Words) -> Updates:
        """Takes the result of the oldest plan in flight of one index."""
        return self._all[index].commit(words)

    def advance(self, now_s: float) -> None:
        """Tells the time (`time.monotonic`): retention counts from the last time told."""
        for scheduler in self._all:
            scheduler.advance(now_s)

    def retain(
        self, tokens: NDArray[np.int32], salt: bytes, *, retention_s: float, pinned: bool
    ) -> int:
        """Puts the cached pages of these tokens under retention, on each index; returns how many
        there are. `ValueError` for a negative time."""
        return sum(
            scheduler.retain(tokens, salt, retention_s=retention_s, pinned=pinned)
            for scheduler in self._all
        )

    def release(self, tokens: NDArray[np.int32], salt: bytes) -> int:
        """Drops the cached pages of these tokens that nobody uses and no other branch builds on, on
        each index; returns how many."""
        return sum(scheduler.release(tokens, salt) for scheduler in self._all)

    def stats(self) -> dict[str, Any]:
        """Counts over all of them; `kv_cache_usage` is the share of all their pages."""
        each = [scheduler.stats() for scheduler in self._all]
        names = (
            *("num_running", "num_waiting", "num_preemptions", "prefix_queries", "prefix_hits"),
            *("num_retained_pages", "num_pinned_pages", "num_cached_pages"),
        )
        used = sum(s.num_pages - s.num_free_pages - s.num_cached_pages for s in each)
        sums = {name: sum(getattr(s, name) for s in each) for name in names}
        return {**sums, "kv_cache_usage": used / sum(s.num_pages for s in each)}

    def has_work(self) -> bool:
        """Whether any request is waiting, running, or draining."""
        return any(scheduler.has_work() for scheduler in self._all)

    def check_invariants(self) -> None:
        """Raises `RuntimeError` naming the first broken invariant. O(everything); for tests."""
        for scheduler in self._all:
            scheduler.check_invariants()

    def flush_cache(self) -> int:
        """Forgets every cached page that no request uses; returns how many."""
        return sum(scheduler.flush_cache() for scheduler in self._all)
