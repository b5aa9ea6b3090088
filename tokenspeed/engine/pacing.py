# SPDX-License-Identifier: MIT
"""`Pacing`: the floor of tokens per second, as the engine keeps it: learns how long steps take, and
says whom to refuse for lack of room. What a step may have is decided in csrc/policy/pacing.h.

Knows requests' numbers and times that it is told; no tokens, no sockets.
"""

import logging
import math

from tokenspeed import _policy
from tokenspeed.config import MAX_PRIORITY, MAX_TPS_FLOOR, PacingOptions
from tokenspeed.engine.messages import GenerateRequest, PacingStats, TokenOutput
from tokenspeed.engine.step_times import StepTimes
from tokenspeed.errors import RequestError

OVERLOADED = "overloaded"
NO_ROOM = "no room: the request would wait longer than it may"
MAX_TOLD = 16  # floors: clients may name any

_log = logging.getLogger(__name__)


def check_terms(request: GenerateRequest, *, paced: bool) -> None:
    """What a request asks of time. `RequestError` names the field that cannot be served."""
    floor, wait = request.tps_floor, request.max_wait_s
    if floor is not None and not 0 <= floor <= MAX_TPS_FLOOR:  # no NaN either
        _refuse("tps_floor", f"must be in (0, {MAX_TPS_FLOOR}], or 0 for none: {floor}")
    if wait is not None and not 0 <= wait < math.inf:
        _refuse("max_wait_s", f"must be finite and >= 0: {wait}")
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        _refuse("priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]: {request.priority}")
    if not paced and (floor or wait is not None):
        field = "tps_floor" if floor else "max_wait_s"
        _refuse(field, "no pacing here: the server needs --tps-floor or --max-queue-wait-s")


def _refuse(field: str, why: str) -> None:
    raise RequestError(f"{field}: {why}", field=field)


class Pacing:
    """One per engine, for its one scheduler, on its thread.

    refusal -> committed ..., and overdue before a step
    """

    def __init__(self, options: PacingOptions, *, max_num_seqs: int, times: StepTimes) -> None:
        self._times = times
        self.policy = _policy.Pacing(
            times.model,
            tps_floor=options.tps_floor,
            max_wait_s=options.max_queue_wait_s,
            max_num_seqs=max_num_seqs,
            num_experts=times.experts.count,
            experts_per_token=times.experts.per_token,
        )
        self._num_refused = 0
        self._num_unmeetable = 0
        self._told: set[float] = set()  # floors that cannot be met

    def refusal(self, request_id: int) -> TokenOutput | None:
        """Of a request that the scheduler has just taken: its answer, if it would wait too long."""
        return self._answer(request_id) if self.policy.hopeless(request_id) else None

    def overdue(self) -> list[TokenOutput]:
        """Answers to requests that have waited too long for their first step."""
        return [self._answer(request_id) for request_id in self.policy.overdue()]

    def committed(self) -> None:
        """A step is over. A floor that nobody can be held at is told once."""
        if self.policy.num_unmeetable == self._num_unmeetable:
            return
        self._num_unmeetable = self.policy.num_unmeetable
        floor = self.policy.last_unmeetable
        if floor not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(floor)
            _log.warning(
                "a floor of %g tokens per second cannot be met even alone: who has it is served as"
                " fast as can be",
                floor,
            )

    def stats(self) -> PacingStats:
        """Counts since the start."""
        return PacingStats(
            floor_misses_for_progress=self.policy.num_forced,
            num_late=self.policy.num_late,
            num_refused=self._num_refused,
            num_unmeetable=self.policy.num_unmeetable,
        )

    def _answer(self, request_id: int) -> TokenOutput:
        self._num_refused += 1
        return TokenOutput(
            request_id,
            [],
            finish_reason="error",
            error=NO_ROOM,
            code=OVERLOADED,
            retry_after_s=self.policy.retry_after_s(request_id),
        )
