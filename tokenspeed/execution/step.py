# SPDX-License-Identifier: MIT
"""A step in execution: `Step` before it runs, `Begun` on its way, `StepOutput` afterwards.

`Seats` say whose slot is whose where steps are prepared. Knows no model and no kernels.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed.execution.grammars import News
from tokenspeed.execution.plan_view import PlanView, Words
from tokenspeed.execution.sampler import Sequence
from tokenspeed.execution.sampling_params import TokenLogprobs

PromptLogprobs = dict[int, TokenLogprobs]  # prompt position -> its token


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The StepResult for the scheduler, and what only the request's owner wants to know."""

    words: Words
    logprobs: dict[int, TokenLogprobs]  # request id -> of the id sampled in this step
    prompt_logprobs: dict[int, PromptLogprobs]  # request id -> what this step read of its prompt


@dataclass(frozen=True, slots=True)
class Bind:
    """A slot gets a request, which has produced `output_ids` so far."""

    slot: int
    request_id: int
    sequence: Sequence
    output_ids: list[int]


@dataclass(frozen=True, slots=True)
class Step:
    """One dp index's part of a step. Without a plan its ranks only keep the others company."""

    counts: list[int]  # tokens of each dp index
    plan: PlanView | None = None
    binds: list[Bind] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # [num_rows] request ids
    sequences: list[Sequence] = field(default_factory=list)  # [num_rows]
    grammars: list[News] = field(default_factory=list)  # to take in first


class Results:
    """What the host must see of a step: sampled ids, and the sums of hidden states to look for NaN.

    From a GPU both travel while the host goes on.
    """

    def __init__(self, sampled: torch.Tensor, sums: torch.Tensor | None = None) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = [sampled] if sums is None else [sampled, sums.float()]
        if sampled.is_cuda:
            self._tensors = [_to_host(tensor) for tensor in self._tensors]
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """Both once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        arrays = [tensor.numpy() for tensor in self._tensors]
        return arrays[0], arrays[1] if len(arrays) == 2 else None


@dataclass(frozen=True, slots=True)
class Begun:
    """A step on its way. `rows` are those that sample; None: all."""

    step: Step
    plan: PlanView
    rows: NDArray[np.int64] | None
    results: Results
    logprobs: dict[int, TokenLogprobs]  # by place in `rows`
    prompt_logprobs: dict[int, PromptLogprobs]  # by request id

    def finish(self) -> StepOutput:
        """Waits for the step. Any thread may; others may begin meanwhile."""
        plan, rows = self.plan, self.rows
        sampled, sums = self.results.wait()
        failed = np.zeros(plan.num_rows, np.bool_) if sums is None else _not_finite(sums, plan)
        if rows is None:
            ids, failed = sampled, sampled < 0
        else:
            ids = np.full(plan.num_rows, -1, np.int64)
            ids[rows] = sampled
            failed[rows] |= sampled < 0
        logprobs = {
            self.step.owners[at if rows is None else rows[at]]: entry
            for at, entry in self.logprobs.items()
        }
        accepts = (ids >= 0) & ~failed
        words = plan.result(ids[accepts], accepts.astype(np.int32), failed)
        return StepOutput(words, logprobs, self.prompt_logprobs)


class Seats:
    """Whose slot is whose, where steps are prepared."""

    def __init__(self, max_num_seqs: int) -> None:
        self._owners: list[tuple[int, Sequence] | None] = [None] * max_num_seqs

    def step(self, counts: list[int], plan: PlanView, binds: list[Bind]) -> Step:
        """Seats the bound requests; the step with the owner of each row."""
        for bind in binds:
            self._owners[bind.slot] = (bind.request_id, bind.sequence)
        owners = [owner for slot in plan.slots.tolist() if (owner := self._owners[slot])]
        return Step(counts, plan, binds, [o[0] for o in owners], [o[1] for o in owners])


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _not_finite(sums: NDArray[np.float32], plan: PlanView) -> NDArray[np.bool_]:
    """[num_rows] whether any of the row's hidden states, of which these are sums, is not finite."""
    bad = ~np.isfinite(sums)
    if not bad.any():
        return np.zeros(plan.num_rows, np.bool_)
    return np.logical_or.reduceat(bad, np.cumsum(plan.num_tokens) - plan.num_tokens)
