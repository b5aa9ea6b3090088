# SPDX-License-Identifier: MIT
"""The real scheduler in front of a device that only takes time. Knows no clients and no wall clock.

The loop is the engine's: plan, launch, commit the oldest when enough are in flight. Where nothing
can change for some steps (all rows decode, nobody comes, nobody ends), these are one call: every
row gets a draft as long as the stretch, and all of it comes true. The scheduler goes through the
same states at the stretch's ends as it does step by step (a test compares both); each token has the
time of the step that would have made it. Who paces, and drafts that may be wrong, want each step.
"""

from array import array
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tokenspeed._scheduler import FINISH_NONE, Updates
from tokenspeed.engine.pacing import Pacing
from tokenspeed.engine.schedulers import Schedulers
from tokenspeed.engine.step_times import StepTimes
from tokenspeed.execution.plan_view import PlanView
from tokenspeed.simulation.clients import ANSWER_ID, Sending
from tokenspeed.simulation.device_profile import NOTHING, DeviceProfile, StepShape, shape_of
from tokenspeed.simulation.drafts import Drafts

LONGEST_STRETCH = 4096  # steps
NOISE_STEPS = 1 << 16  # the noise repeats after so many


@dataclass(slots=True)
class Live:
    """A request between its submission and its end."""

    request_id: int
    sending: Sending
    left: int  # tokens until it ends or its client hangs up
    cancels: bool
    chance: float = 0.0  # of its drafts
    cached_tokens: int = 0
    times_s: "array[float]" = field(default_factory=lambda: array("d"))  # of each token
    retry_after_s: float | None = None  # it has waited too long, and will not run


@dataclass(frozen=True, slots=True)
class _Step:
    """In flight: what was planned, and when each of the steps that it stands for ends."""

    views: list[PlanView | None]
    ends_s: NDArray[np.float64]
    only_decodes: bool


class Machine:
    """Submits, steps, and says who has ended. `now_s` goes from step to step.

    `pacing` comes with the `times` that it foretells steps by.
    """

    def __init__(
        self,
        schedulers: Schedulers,
        profile: DeviceProfile,
        *,
        overlap_depth: int = 0,
        max_num_batched_tokens: int,
        max_model_len: int,
        noise: float = 0.0,
        seed: int = 0,
        stretches: bool = True,
        drafts: Drafts | None = None,
        pacing: Pacing | None = None,
        times: StepTimes | None = None,
    ) -> None:
        self.now_s = 0.0
        self.num_steps = 0  # of the device
        self.num_calls = 0  # of `step` that planned anything
        self._schedulers, self._profile = schedulers, profile
        self._drafts, self._pacing, self._times = drafts, pacing, times
        if pacing is not None:
            schedulers.pace(pacing.policy)
        each = overlap_depth > 0 or drafts is not None or pacing is not None
        self._depth, self._stretches = overlap_depth, stretches and not each
        self._budget, self._max_model_len = max_num_batched_tokens, max_model_len
        self._live: dict[int, Live] = {}
        self._slots: dict[tuple[int, int], int] = {}  # (scheduler, slot) -> request
        self._in_flight: deque[_Step] = deque()
        self._free_s = 0.0  # when the device has done all that it was given
        self._calm = False  # the next plan will be like the last one
        self._next_shapes: list[StepShape] = []  # if it is
        draws = np.random.default_rng(seed).standard_normal(NOISE_STEPS if noise else 1)
        self._noise = np.exp(noise * draws)

    def has_work(self) -> bool:
        return bool(self._live or self._in_flight)

    def num_waiting(self) -> int:
        """Requests that are not admitted yet."""
        waiting: int = self._schedulers.stats()["num_waiting"]
        return waiting

    def submit(
        self, request_id: int, sending: Sending, cancel_after: int | None, **of: int
    ) -> float | None:
        """`of`: `max_tokens` and `user`. None: it will run; or after how many seconds it may come
        again. `ValueError` as the scheduler says it."""
        if self._pacing is not None:
            self._schedulers.advance(self.now_s)
        self._schedulers.submit(request_id, sending.prompt, b"", **of)
        if self._pacing is not None and (refusal := self._pacing.refusal(request_id)):
            self._schedulers.abort(request_id)
            return refusal.retry_after_s
        left = min(of["max_tokens"], self._max_model_len - len(sending.prompt))
        cancels = cancel_after is not None and cancel_after < left
        self._live[request_id] = Live(
            request_id, sending, cancel_after if cancels and cancel_after else left, cancels
        )
        if self._drafts is not None:
            self._live[request_id].chance = self._drafts.chance(request_id)
        self._calm = False
        return None

    def release(self, tokens: NDArray[np.int32]) -> int:
        """Drops the cached pages of these tokens, as far as nothing else needs them."""
        return self._schedulers.release(tokens, b"")

    def step(self, next_s: float | None) -> list[Live]:
        """Plans, and commits what is due; returns who ended. `next_s`: when somebody comes next."""
        self._schedulers.advance(self.now_s)
        wanted = self._offer_stretch(next_s) if self._calm and self._stretches else 1
        plans = self._schedulers.next_plans()
        if plans is not None:
            if self._times is not None:
                self._times.launched(plans, self.now_s)
            self._launch(plans, wanted)
        ended = [] if self._pacing is None else self._overdue(self._pacing)
        if len(self._in_flight) > (self._depth if plans is not None else 0):
            ended += self._commit(self._in_flight.popleft())
        elif plans is None and not ended:
            raise RuntimeError("requests wait, and nothing can run")
        return ended

    def _overdue(self, pacing: Pacing) -> list[Live]:
        """Ends who has waited for a first step longer than they may."""
        ended = []
        for answer in pacing.overdue():
            live = self._live.pop(answer.request_id)
            live.retry_after_s = answer.retry_after_s
            self._schedulers.abort(answer.request_id)
            ended.append(live)
        return ended

    def _offer_stretch(self, next_s: float | None) -> int:
        """Gives every request that decodes a draft; returns how many steps that would be."""
        decoding = [live for live in self._live.values() if live.times_s]
        share = (self._budget - len(decoding)) // max(len(decoding), 1)
        if len(decoding) < len(self._live):
            share //= 2  # drafts leave half of the budget to those that wait
        steps = min([share + 1, LONGEST_STRETCH, *(live.left for live in decoding)])
        if next_s is not None and steps > 1:
            ends_s = self._ends_s(self._next_shapes, steps)
            steps = min(steps, int(np.searchsorted(ends_s, next_s)) + 1)
        if steps <= 1:
            return 1
        for live in decoding:
            self._schedulers.speculate(live.request_id, self._answer(live, steps - 1))
        return steps

    def _launch(self, views: list[PlanView | None], wanted: int) -> None:
        real = self._drafts is not None
        shapes = [NOTHING if view is None else shape_of(view, verifies=real) for view in views]
        offered = [int(view.num_draft.min()) + 1 for view in views if view is not None]
        ends_s = self._ends_s(shapes, min([wanted, *offered]))
        self._free_s = float(ends_s[-1])
        self.num_steps += len(ends_s)
        self.num_calls += 1
        only_decodes = all(shape.only_decodes for shape in shapes)
        self._in_flight.append(_Step(views, ends_s, only_decodes))
        self._next_shapes = [shape.later(len(ends_s)) for shape in shapes]
        self.now_s += self._profile.host_s if self._depth else 0.0

    def _ends_s(self, shapes: list[StepShape], steps: int) -> NDArray[np.float64]:
        """When each of so many steps ends, if the next begins now. `ValueError`: one takes none."""
        first_s, host_s = self._profile.step_s(shapes), self._profile.host_s
        if not first_s > 0:
            raise ValueError(f"profile {self._profile.name}: a step takes {first_s} s")
        ends_s = np.full(steps + 1, first_s)
        if steps > 1:
            ends_s[1:] += self._profile.growth_s(shapes) * np.arange(steps)
        if len(self._noise) > 1:
            ends_s[1:] *= self._noise[(self.num_steps + np.arange(steps)) % len(self._noise)]
        if self._depth == 0:
            ends_s[2:] += host_s
        ends_s[0] = max(self.now_s + host_s, self._free_s)
        return np.cumsum(ends_s)[1:]

    def _commit(self, step: _Step) -> list[Live]:
        self.now_s = max(self.now_s, float(step.ends_s[-1]))
        if self._pacing is not None:
            self._schedulers.advance(self.now_s)
        ended: list[Live] = []
        for index, view in enumerate(step.views):
            if view is not None:
                updates = self._schedulers.commit(index, self._result(index, view, step))
                ended += self._take(updates, step.ends_s)
        self._calm = step.only_decodes and not ended
        if self._times is not None:
            self._times.committed(self.now_s)
        if self._pacing is not None:
            self._pacing.committed()
        return ended

    def _result(self, index: int, view: PlanView, step: _Step) -> NDArray[np.int32]:
        """Every row that samples accepts one id for each step that this one stands for, or one more
        than there are drafts that come true."""
        for slot, request_id in zip(
            view.binds[:, 0].tolist(), view.bound_request_ids(), strict=True
        ):
            self._slots[index, slot] = request_id
        if self._drafts is None:
            counts = np.minimum(view.num_places, len(step.ends_s))
        else:
            counts = self._num_right(index, view, self._drafts)
        ids = np.full(int(counts.sum()), ANSWER_ID, np.int32)
        at = 0
        for slot, count in zip(view.slots.tolist(), counts.tolist(), strict=True):
            live = self._live.get(self._slots[index, slot])
            if live is not None and live.sending.answer is not None:
                ids[at : at + count] = self._answer(live, count)
            at += count
        return view.result(ids, counts, np.zeros(view.num_rows, np.bool_))

    def _num_right(self, index: int, view: PlanView, drafts: Drafts) -> NDArray[np.int32]:
        lives = (self._live.get(self._slots[index, slot]) for slot in view.slots.tolist())
        chances = np.array([0.0 if live is None else live.chance for live in lives])
        right = 1 + drafts.accepted(chances, view.num_draft)
        return np.where(view.num_places > 0, right, 0).astype(np.int32)

    def _answer(self, live: Live, count: int) -> NDArray[np.int32]:
        """What the request says next."""
        if live.sending.answer is None:
            return np.full(count, ANSWER_ID, np.int32)
        said = len(live.times_s)
        return live.sending.answer[said : said + count]

    def _take(self, updates: Updates, ends_s: NDArray[np.float64]) -> list[Live]:
        ended = []
        for request_id, num_ids, finish, num_cached in zip(
            updates.request_ids.tolist(),
            updates.num_ids.tolist(),
            updates.finish.tolist(),
            updates.num_cached.tolist(),
            strict=True,
        ):
            live = self._live[request_id]
            if not live.times_s:
                self._schedulers.started(request_id)
                live.cached_tokens = num_cached
            times_s = ends_s[:num_ids] if len(ends_s) > 1 else np.repeat(ends_s, num_ids)
            live.times_s.frombytes(times_s.tobytes())
            live.left -= num_ids
            if finish != FINISH_NONE:
                self._schedulers.forget(request_id)
            elif live.left <= 0:
                self._schedulers.abort(request_id)
            else:
                if self._drafts is not None:
                    self._schedulers.speculate(request_id, self._answer(live, self._drafts.depth))
                continue
            del self._live[request_id]
            ended.append(live)
        return ended
