# SPDX-License-Identifier: MIT
"""`Runner`: launches one step on all ranks and says what came out. Knows no request's lifecycle.

`launch` takes one plan for each dp index, None where there is none, and gives a future. What a step
needs of the requests is taken in `launch`, on the caller's thread; everything that a running step
reads belongs to the thread that runs it. Steps overlap where the runner has threads:

    launch   | prepare 1, send |            | prepare 2, send |
    step     |                 | own part 1 |                 | own part 2 |
    results  |                              | others' part 1  | ...
"""

import dataclasses
import time
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from tokenspeed.errors import RankDiedError
from tokenspeed.execution.grammars import News
from tokenspeed.execution.plan_view import Plans, PlanView
from tokenspeed.execution.sampler import Sequence
from tokenspeed.execution.step import Begun, Bind, Seats, Step, StepOutput
from tokenspeed.execution.step_message import encode_step
from tokenspeed.execution.step_runner import StepRunner

Outputs = list[StepOutput | None]


class InFlight(Protocol):
    """A step that was launched."""

    def result(self) -> Outputs:
        """Waits for it; raises what it raised."""


@dataclass(frozen=True, slots=True)
class Done:
    """A step that is over."""

    outputs: Outputs

    def result(self) -> Outputs:
        return self.outputs


class Crew(Protocol):
    """The other ranks, as this one sees them (see `engine/ranks/crew.py`)."""

    def send_step(self, message: bytes) -> None:
        """Hands a step to all other ranks."""

    def results(self, wanted: list[int]) -> dict[int, StepOutput]:
        """What the other ranks sampled for these dp indices in their oldest step that still has
        results to give. `RankDiedError`: it will not come."""

    def find_cause(self) -> None:
        """After a collective failed: `RankDiedError` of the rank that died first, if one did."""

    def close(self) -> None:
        """Ends the other ranks."""


class Runner:
    """Runs plans in order. `add` a request before its first plan, `remove` it after its last.

    `remote` are the dp indices whose tokens another rank samples. `threaded`: steps overlap.
    """

    def __init__(
        self,
        part: StepRunner,
        *,
        max_num_seqs: int,
        num_dp: int = 1,
        crew: Crew | None = None,
        remote: SequenceOf[int] = (),
        threaded: bool = False,
    ) -> None:
        self._part, self._crew, self._remote = part, crew, frozenset(remote)
        self._sequences: dict[int, Sequence] = {}
        self._grammars: list[News] = []  # that no step has taken yet
        self._seats = [Seats(max_num_seqs) for _ in range(num_dp)]
        self._steps = ThreadPoolExecutor(1, "step") if threaded else None
        waits = bool(remote) or part.device.type != "cpu"  # for what comes from elsewhere
        self._results = ThreadPoolExecutor(1, "results") if threaded and waits else None

    def add(self, request_id: int, sequence: Sequence) -> None:
        self._sequences[request_id] = sequence

    def remove(self, request_id: int) -> None:
        self._sequences.pop(request_id, None)

    def tell_grammars(self, news: News) -> None:
        """Every rank that samples takes it in with the next step."""
        self._grammars.append(news)

    def launch(self, plans: Plans) -> InFlight:
        """Starts a step; the plans' words must not change until it is over."""
        steps = self._prepare(plans)
        news, self._grammars = self._grammars, []
        steps[0] = dataclasses.replace(steps[0], grammars=news) if news else steps[0]
        if self._crew is not None:
            binds = {dp: step.binds for dp, step in enumerate(steps) if dp in self._remote}
            self._crew.send_step(encode_step(plans, binds, news if self._remote else ()))
        if self._steps is None:
            return Done(self._finish(self._begin(steps[0]), steps))
        begun = self._steps.submit(self._begin, steps[0])
        thread = self._steps if self._results is None else self._results
        return thread.submit(lambda: self._finish(begun.result(), steps))

    def close(self) -> None:
        for thread in (self._steps, self._results):
            if thread is not None:
                thread.shutdown()
        if self._crew is not None:
            self._crew.close()

    def _begin(self, step: Step) -> Begun | None:
        try:
            return self._part.begin(step)
        except RankDiedError:
            if self._crew is not None:
                self._crew.find_cause()
            raise

    def _prepare(self, plans: Plans) -> list[Step]:
        counts = [0 if plan is None else len(plan.tokens) for plan in plans]
        return [
            Step(counts) if plan is None else seats.step(counts, plan, self._binds(plan))
            for seats, plan in zip(self._seats, plans, strict=True)
        ]

    def _binds(self, plan: PlanView) -> list[Bind]:
        binds = []
        slots, known = plan.binds[:, 0].tolist(), plan.binds[:, 3].tolist()
        for slot, request_id, count in zip(slots, plan.bound_request_ids(), known, strict=True):
            sequence = self._sequences[request_id]
            if sequence.started_s is None:
                sequence.started_s = time.monotonic()
            outputs = sequence.output_ids[: count - sequence.prompt_len]
            binds.append(Bind(slot, request_id, sequence, outputs))
        return binds

    def _finish(self, own: Begun | None, steps: list[Step]) -> Outputs:
        outputs: Outputs = [None] * len(steps)
        outputs[0] = None if own is None else own.finish()
        wanted = [dp for dp in sorted(self._remote) if steps[dp].plan is not None]
        if wanted and self._crew is not None:
            for dp, output in self._crew.results(wanted).items():
                outputs[dp] = output
        return outputs
