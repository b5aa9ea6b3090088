# SPDX-License-Identifier: MIT
"""A step in execution: `Step` before it runs, `Begun` on its way, `StepOutput` afterwards.

`Seats` say whose slot is whose where steps are prepared. Knows no model and no kernels.
"""

from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed.execution.grammars import News
from tokenspeed.execution.plan_view import PlanView, Words
from tokenspeed.execution.sampler import Sampled, Sequence
from tokenspeed.execution.sampling_params import TokenLogprobs

PromptLogprobs = dict[int, TokenLogprobs]  # prompt position -> its token


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The StepResult for the scheduler, and what only the request's owner wants to know."""

    words: Words
    logprobs: dict[int, list[TokenLogprobs]]  # request id -> of the ids it keeps of this step
    prompt_logprobs: dict[int, PromptLogprobs]  # request id -> what this step read of its prompt
    drafts: dict[int, list[int]] = field(default_factory=dict)  # request id -> ids proposed
    is_typical: bool = True  # took as long as others like it will: nothing was captured on the way


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


@dataclass(frozen=True, slots=True)
class Found:
    """What the host must see of a step of R rows, T tokens and L places that sampled."""

    ids: NDArray[np.int64]  # [L]
    counts: NDArray[np.int32] | None  # [R], as `Sampled` has them
    sums: NDArray[np.float32] | None  # [T] of hidden states: not finite where one of them is not
    drafts: NDArray[np.int64] | None  # [R, n] ids proposed, -1 where none


class Results:
    """What the host must see of a step. From a GPU it travels while the host goes on."""

    def __init__(
        self,
        sampled: Sampled,
        sums: torch.Tensor | None = None,
        drafts: torch.Tensor | None = None,
    ) -> None:
        self._arrived: torch.cuda.Event | None = None
        sums = None if sums is None else sums.float()
        self._ids, self._others = sampled.ids, [sampled.counts, sums, drafts]
        if sampled.ids.is_cuda:
            self._ids = _to_host(self._ids)
            self._others = [None if t is None else _to_host(t) for t in self._others]
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> Found:
        """All of it, once it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return Found(self._ids.numpy(), *(None if t is None else t.numpy() for t in self._others))


@dataclass(frozen=True, slots=True)
class Begun:
    """A step on its way."""

    step: Step
    plan: PlanView
    results: Results
    logprobs: dict[int, list[TokenLogprobs]]  # by row
    prompt_logprobs: dict[int, PromptLogprobs]  # by request id
    is_typical: bool = True

    def finish(self) -> StepOutput:
        """Waits for the step. Any thread may; others may begin meanwhile."""
        plan, found = self.plan, self.results.wait()
        places = plan.num_places
        counts = _num_kept(plan, found.counts, found.ids)
        failed = (counts == 0) & (places > 0)
        if found.sums is not None and not np.isfinite(found.sums).all():
            counts, failed = _of_finite(plan, counts, ~np.isfinite(found.sums))
        same = np.array_equal(counts, places)
        kept = found.ids if same else found.ids[_leading(counts, places)]
        owners = self.step.owners
        logprobs = {owners[row]: entries[: counts[row]] for row, entries in self.logprobs.items()}
        drafts = {} if found.drafts is None else _proposed(found.drafts, counts, owners)
        words = plan.result(kept, counts, failed)
        return StepOutput(words, logprobs, self.prompt_logprobs, drafts, self.is_typical)


def num_kept(plan: PlanView, sampled: Sampled) -> NDArray[np.int32]:
    """[R] ids that each row keeps, on the host: waits for the device."""
    counts = None if sampled.counts is None else sampled.counts.cpu().numpy()
    return _num_kept(plan, counts, sampled.ids.cpu().numpy())


def _num_kept(
    plan: PlanView, counts: NDArray[np.int32] | None, ids: NDArray[np.int64]
) -> NDArray[np.int32]:
    if counts is not None:
        return counts
    counts = plan.num_places.copy()  # at most one each
    counts[counts > 0] = ids >= 0
    return counts


def _of_finite(
    plan: PlanView, counts: NDArray[np.int32], bad: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Of `counts`, those from hidden states that are finite, and which rows failed for want of any.

    bad: [T]. A row that verifies ends where its first bad token stands, any other row fails.
    """
    ends = np.cumsum(plan.num_tokens)
    counts, failed = counts.copy(), np.zeros(plan.num_rows, np.bool_)
    for row, (begin, end) in enumerate(zip(ends - plan.num_tokens, ends, strict=True)):
        leading = int(bad[begin:end].argmax()) if bad[begin:end].any() else end - begin
        if not plan.num_draft[row] and leading < end - begin:
            leading = 0
        counts[row] = min(counts[row], leading)
        failed[row] = not leading or (counts[row] == 0 and plan.num_places[row])
    return counts, failed


def _leading(counts: NDArray[np.int32], places: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[L] the first `counts[r]` of each row's places."""
    first = np.cumsum(places) - places
    kept: NDArray[np.bool_] = np.arange(places.sum()) < np.repeat(first + counts, places)
    return kept


def _proposed(
    drafts: NDArray[np.int64], counts: NDArray[np.int32], owners: list[int]
) -> dict[int, list[int]]:
    """By request id, for rows that kept an id."""
    found = {
        owner: list(takewhile(lambda token: token >= 0, ids))
        for owner, ids, count in zip(owners, drafts.tolist(), counts.tolist(), strict=True)
        if count
    }
    return {owner: ids for owner, ids in found.items() if ids}


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
