# SPDX-License-Identifier: MIT
"""A workload on a device that is only a profile: what each request would have met.

Joins clients and machine by one queue of events in virtual time. Knows no files and prints nothing.
"""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from tokenspeed._scheduler import Scheduler
from tokenspeed.engine.schedulers import Schedulers, user_key
from tokenspeed.simulation.clients import Clients, Sending
from tokenspeed.simulation.device_profile import DeviceProfile
from tokenspeed.simulation.idle_cache import IdleCache
from tokenspeed.simulation.machine import Live, Machine
from tokenspeed.simulation.options import SimulationOptions
from tokenspeed.simulation.sessions import Session, Workload

HASH_KEY = bytes(16)  # of prefixes: nobody can attack a simulation, and runs are alike
OK, INVALID, OVERLOADED = 200, 400, 503  # as the gateway answers


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


class Simulation:
    """One run; `outcomes` plays it, once."""

    def __init__(
        self,
        workload: Workload,
        profile: DeviceProfile,
        options: SimulationOptions,
        *,
        num_dp: int = 1,
    ) -> None:
        """`num_dp`: groups of devices with requests of their own, each with `num_pages`.

        `ValueError`: options that are impossible together, or no `num_pages` or `max_model_len`.
        """
        if options.num_pages is None or options.max_model_len is None:
            raise ValueError("num_pages and max_model_len: a run needs both")
        self.workload, self.profile, self.options = workload, profile, options
        self._sessions = workload.sessions
        self._clients = Clients(
            workload.sessions,
            concurrency=options.concurrency,
            time_scale=options.time_scale,
            duration_s=math.inf if options.duration_s is None else options.duration_s,
            request_s=profile.request_s,
            forced=options.forced,
        )
        self._schedulers = Schedulers(
            [_scheduler(options, options.num_pages, options.max_model_len) for _ in range(num_dp)]
        )
        self.machine = Machine(
            self._schedulers,
            profile,
            overlap_depth=options.overlap_depth,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=options.max_model_len,
            noise=profile.noise if options.noise is None else options.noise,
            seed=options.noise_seed,
            stretches=options.stretches,
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
        return self._schedulers.stats() | {
            "now_s": machine.now_s,
            "num_steps": machine.num_steps,
            "num_calls": machine.num_calls,
        }

    def _submit(self, sending: Sending) -> Outcome | None:
        """What became of it at once, if it was refused."""
        session = self._sessions[sending.session]
        turn = session.turns[sending.number]
        if self.machine.num_waiting() >= self.options.max_queue_len:
            return self._refused(sending, "refused", OVERLOADED, "too many requests wait")
        request_id, self._num_sent = self._num_sent, self._num_sent + 1
        try:
            self.machine.submit(
                request_id,
                sending,
                turn.cancel_after,
                max_tokens=turn.output_tokens,
                user=user_key(session.user),
            )
        except ValueError as error:
            return self._refused(sending, "error", INVALID, str(error))
        if self._idle is not None:
            self._idle.used(sending)
        return None

    def _refused(self, sending: Sending, status: str, code: int, why: str) -> Outcome:
        now_s = self.machine.now_s
        self._clients.over(sending.session, now_s, answered=False)
        return Outcome(
            self._sessions[sending.session],
            sending.number,
            sending.sent_s,
            now_s,
            status,
            code,
            why,
            0,
            array("d"),
        )

    def _ended(self, live: Live) -> Outcome:
        sending, end_s = live.sending, live.times_s[-1]
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
