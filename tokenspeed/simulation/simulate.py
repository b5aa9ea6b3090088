# SPDX-License-Identifier: MIT
"""A workload on a device that is only a profile: what each request would have met.

Joins clients and machine by one queue of events in virtual time. Knows no files and prints nothing.
"""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from tokenspeed._scheduler import Scheduler
from tokenspeed.engine.pacing import NO_ROOM, Pacing
from tokenspeed.engine.schedulers import Schedulers, user_key
from tokenspeed.engine.step_times import StepTimes
from tokenspeed.simulation.clients import Clients, Sending
from tokenspeed.simulation.device_profile import DeviceProfile, LinearProfile
from tokenspeed.simulation.drafts import Drafts
from tokenspeed.simulation.idle_cache import IdleCache
from tokenspeed.simulation.machine import Live, Machine
from tokenspeed.simulation.options import SimulationOptions
from tokenspeed.simulation.sessions import Session, Workload

HASH_KEY = bytes(16)  # of prefixes: nobody can attack a simulation, and runs are alike
OK, INVALID, OVERLOADED = 200, 400, 503  # as the gateway answers
FULL_WAIT_S = 1.0  # told to who finds the queue full
PACING_STATS = ("num_late", "floor_misses_for_progress", "num_unmeetable", "num_refused")


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are virtual seconds from the run's start."""

    session: Session
    number: int
    sent_s: float
    end_s: float
    status: str  # "ok", "refused", "error" or "cancelled"
    http_status: int
    error: str | None
    cached_tokens: int
    token_times_s: "array[float]"
    retry_after_s: float | None = None  # told with a refusal


class Simulation:
    """One run; `outcomes` plays it, once."""

    def __init__(
        self,
        workload: Workload,
        profile: DeviceProfile,
        options: SimulationOptions,
        *,
        num_dp: int = 1,
        times: StepTimes | None = None,
    ) -> None:
        """`num_dp`: groups of devices with requests of their own, each with `num_pages`. `times`:
        what pacing foretells steps by, if it has learnt before; nothing is in flight there.

        `ValueError`: options that are impossible together, or no `num_pages` or `max_model_len`.
        """
        if options.num_pages is None or options.max_model_len is None:
            raise ValueError("num_pages and max_model_len: a run needs both")
        if options.pacing.is_on and num_dp > 1:
            raise ValueError("tps_floor and max_queue_wait_s: pacing is for one group (dp 1)")
        self.workload, self.profile, self.options = workload, profile, options
        self._sessions = workload.sessions
        self._clients = Clients(
            workload.sessions,
            concurrency=options.concurrency,
            time_scale=options.time_scale,
            duration_s=math.inf if options.duration_s is None else options.duration_s,
            request_s=profile.request_s,
            retries=options.retries,
            most_tokens=options.max_model_len,
            forced=options.forced,
        )
        self._schedulers = Schedulers(
            [_scheduler(options, options.num_pages, options.max_model_len) for _ in range(num_dp)]
        )
        if isinstance(profile, LinearProfile) and options.acceptance is not None:
            profile.check_drafts()
        times = (times or StepTimes(profile.experts)) if options.pacing.is_on else None
        self._times = times
        self._pacing, self._drafts = _pacing(options, times), _drafts(options)
        self.machine = Machine(
            self._schedulers,
            profile,
            overlap_depth=options.overlap_depth,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=options.max_model_len,
            noise=profile.noise if options.noise is None else options.noise,
            seed=options.noise_seed,
            stretches=options.stretches,
            drafts=self._drafts,
            pacing=self._pacing,
            times=times,
        )
        self._idle = None
        if options.idle_s is not None:
            self._idle = IdleCache(options.idle_s, self.machine.release)
        self._num_sent = 0

    def outcomes(self) -> Iterator[Outcome]:
        """Each request's, as they end."""
        machine, clients = self.machine, self._clients
        while machine.has_work() or clients.next_s is not None:
            if not machine.has_work():
                machine.now_s = max(machine.now_s, clients.next_s or 0.0)
            if self._idle is not None:
                self._idle.expire(machine.now_s)
            for sending in clients.due(machine.now_s):
                if (refused := self._submit(sending)) is not None:
                    yield refused
            if machine.has_work():
                yield from map(self._ended, machine.step(clients.next_s))

    def stats(self) -> dict[str, float]:
        """The engine's counts, and how the virtual time was spent."""
        machine = self.machine
        found = self._schedulers.stats() | {
            "now_s": machine.now_s,
            "num_steps": machine.num_steps,
            "num_calls": machine.num_calls,
        }
        if self._drafts is not None:
            given, accepted = self._drafts.num_given, self._drafts.num_accepted
            found |= {"num_drafts": given, "num_accepted_drafts": accepted}
        if self._pacing is not None:
            found |= {name: getattr(self._pacing.stats(), name) for name in PACING_STATS}
        if self._times is not None:
            found["step_time_error"] = self._times.stats().error
        return found

    def _submit(self, sending: Sending) -> Outcome | None:
        """What became of it at once, if it was refused."""
        session = self._sessions[sending.session]
        turn = session.turns[sending.number]
        if self.machine.num_waiting() >= self.options.max_queue_len:
            return self._refused(sending, "too many requests wait", FULL_WAIT_S)
        request_id, self._num_sent = self._num_sent, self._num_sent + 1
        try:
            wait_s = self.machine.submit(
                request_id,
                sending,
                turn.cancel_after,
                max_tokens=turn.output_tokens,
                user=user_key(session.user),
            )
        except ValueError as error:
            self._clients.over(sending.session, self.machine.now_s, answered=False)
            return self._unanswered(sending, "error", INVALID, str(error), None)
        if wait_s is not None:
            return self._refused(sending, NO_ROOM, wait_s)
        if self._idle is not None:
            self._idle.used(sending)
        return None

    def _refused(self, sending: Sending, why: str, wait_s: float) -> Outcome:
        told_s = max(1, math.ceil(wait_s))  # a header's seconds are whole
        self._clients.refused(sending.session, self.machine.now_s, told_s)
        return self._unanswered(sending, "refused", OVERLOADED, why, told_s)

    def _unanswered(
        self, sending: Sending, status: str, code: int, why: str, told_s: float | None
    ) -> Outcome:
        return Outcome(
            self._sessions[sending.session],
            sending.number,
            sending.sent_s,
            self.machine.now_s,
            status,
            code,
            why,
            0,
            array("d"),
            told_s,
        )

    def _ended(self, live: Live) -> Outcome:
        sending = live.sending
        if live.retry_after_s is not None:
            if self._idle is not None:
                self._idle.left(sending, 0, self.machine.now_s)
            return self._refused(sending, NO_ROOM, live.retry_after_s)
        end_s = live.times_s[-1]
        self._clients.over(sending.session, end_s)
        if self._idle is not None:
            self._idle.left(sending, len(live.times_s), end_s)
        return Outcome(
            self._sessions[sending.session],
            sending.number,
            sending.sent_s,
            end_s,
            "cancelled" if live.cancels else "ok",
            OK,
            None,
            live.cached_tokens,
            live.times_s,
        )


def _pacing(options: SimulationOptions, times: StepTimes | None) -> Pacing | None:
    if times is None:
        return None
    return Pacing(options.pacing, max_num_seqs=options.max_num_seqs, times=times)


def _drafts(options: SimulationOptions) -> Drafts | None:
    if options.acceptance is None or options.draft_depth is None:
        return None
    spread, seed = options.acceptance_spread, options.noise_seed
    return Drafts(options.acceptance, spread=spread, depth=options.draft_depth, seed=seed)


def _scheduler(options: SimulationOptions, num_pages: int, max_model_len: int) -> Scheduler:
    return Scheduler(
        num_pages=num_pages,
        page_size=options.page_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=max_model_len,
        max_num_partial_prefills=options.max_num_partial_prefills,
        overlap_depth=options.overlap_depth,
        enable_prefix_caching=options.enable_prefix_caching,
        hash_key=HASH_KEY,
    )
