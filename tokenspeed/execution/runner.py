# SPDX-License-Identifier: MIT
"""`Runner`: launches one plan on the model and says what came out. Knows no request's lifecycle.

`launch` returns at once with a future when steps overlap (a thread of its own runs them in order);
otherwise the step is over when it returns. Everything that a running step reads belongs to that
thread: the page table, the sampler's slots, the last sampled ids. What it needs of the requests is
taken in `launch`, on the caller's thread.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed.execution.batch import Batcher
from tokenspeed.execution.kv_cache import KVCache
from tokenspeed.execution.logprobs import LogprobsReader
from tokenspeed.execution.plan_view import ROW_PROMPT_LOGPROBS, ROW_SAMPLE, PlanView, Words
from tokenspeed.execution.sampler import Sampler, Sequence
from tokenspeed.execution.sampling_params import TokenLogprobs
from tokenspeed.layers.batch import ForwardBatch

LOGITS_BLOCK = 64  # rows of vocabulary-wide logits held at a time for prompt logprobs

Caches = list[tuple[torch.Tensor, ...]]
PromptLogprobs = dict[int, TokenLogprobs]  # prompt position -> its token


class Model(Protocol):
    """What execution asks of a model."""

    def forward(self, batch: ForwardBatch, caches: Caches) -> torch.Tensor:
        """Hidden states [T, D] of every token; writes their keys and values."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[L, D] -> float32 [L, vocab_size]."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The StepResult for the scheduler, and what only the request's owner wants to know."""

    words: Words
    logprobs: dict[int, TokenLogprobs]  # request id -> of the id sampled in this step
    prompt_logprobs: dict[int, PromptLogprobs]  # request id -> what this step read of its prompt


InFlight = Future[StepOutput]


@dataclass(frozen=True, slots=True)
class _Bind:
    slot: int
    sequence: Sequence
    output_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Step:
    plan: PlanView
    binds: list[_Bind]
    owners: list[int]  # [num_rows] request ids
    sequences: list[Sequence]  # [num_rows]


class Runner:
    """Runs plans in order. `add` a request before its first plan, `remove` it after its last."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        batcher: Batcher,
        sampler: Sampler,
        *,
        max_num_seqs: int,
        overlap_depth: int,
    ) -> None:
        self._model, self._cache = model, cache
        self._logprobs = LogprobsReader(batcher.device)
        self._batcher, self._sampler = batcher, sampler
        self._sequences: dict[int, Sequence] = {}
        self._owners: list[tuple[int, Sequence] | None] = [None] * max_num_seqs
        self._thread = ThreadPoolExecutor(1, "step") if overlap_depth else None

    def add(self, request_id: int, sequence: Sequence) -> None:
        self._sequences[request_id] = sequence

    def remove(self, request_id: int) -> None:
        self._sequences.pop(request_id, None)

    def launch(self, words: Words) -> InFlight:
        """Starts the plan's step; `words` must not change until it is over."""
        step = self._prepare(PlanView(words))
        if self._thread is not None:
            return self._thread.submit(self._run_threaded, step)
        done: InFlight = Future()
        done.set_result(self._run_threaded(step))
        return done

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def _prepare(self, plan: PlanView) -> _Step:
        binds = []
        slots, known = plan.binds[:, 0].tolist(), plan.binds[:, 3].tolist()
        for slot, request_id, count in zip(slots, plan.bound_request_ids(), known, strict=True):
            sequence = self._sequences[request_id]
            if sequence.started_s is None:
                sequence.started_s = time.monotonic()
            self._owners[slot] = (request_id, sequence)
            outputs = sequence.output_ids[: count - sequence.prompt_len]
            binds.append(_Bind(slot, sequence, outputs))
        owners = [owner for slot in plan.slots.tolist() if (owner := self._owners[slot])]
        return _Step(plan, binds, [o[0] for o in owners], [o[1] for o in owners])

    def _run_threaded(self, step: _Step) -> StepOutput:
        """Torch's threads rest during a step on the CPU: the kernels have threads of their own."""
        if self._batcher.device.type != "cpu":
            return self._run(step)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._run(step)
        finally:
            torch.set_num_threads(num_threads)

    @torch.inference_mode()
    def _run(self, step: _Step) -> StepOutput:
        plan = step.plan
        for bind in step.binds:
            self._sampler.bind(bind.slot, bind.sequence, bind.output_ids)
        if len(plan.copies):
            self._copy_pages(plan.copies)
        self._batcher.apply_deltas(plan.deltas)
        batch = self._batcher.build(plan)
        hidden = self._model.forward(batch, self._cache.layers)

        ids = np.full(plan.num_rows, -1, np.int64)
        failed = _not_finite(hidden, plan)
        logprobs: dict[int, TokenLogprobs] = {}
        rows = np.flatnonzero(plan.flags & ROW_SAMPLE)
        if len(rows):
            logits = self._model.logits(hidden[batch.logits_index])
            slots, positions = plan.slots[rows], (plan.starts + plan.num_tokens)[rows]
            sampled, chosen = self._sampler.sample(logits, slots, positions)
            # A failed row's -1 must never be looked up as a token by a step planned already.
            self._batcher.last_ids[torch.from_numpy(slots.astype(np.int64))] = sampled.clamp(min=0)
            ids[rows] = sampled.cpu().numpy()
            failed[rows] |= ids[rows] < 0
            logprobs = {step.owners[rows[at]]: entry for at, entry in chosen.items()}
        return StepOutput(plan.result(ids, failed), logprobs, self._prompt_logprobs(step, hidden))

    def _copy_pages(self, copies: NDArray[np.int32]) -> None:
        if copies[:, 0].any() or copies[:, 2].any():
            raise ValueError("the plan copies pages of a tier that this runner does not have")
        sources, targets = (torch.from_numpy(copies[:, i].astype(np.int64)) for i in (1, 3))
        self._cache.copy_pages(sources, targets)

    def _prompt_logprobs(self, step: _Step, hidden: torch.Tensor) -> dict[int, PromptLogprobs]:
        """The logits at position p say how likely the prompt's token at p + 1 was."""
        plan = step.plan
        found: dict[int, PromptLogprobs] = {}
        for row in np.flatnonzero(plan.flags & ROW_PROMPT_LOGPROBS).tolist():
            sequence, count = step.sequences[row], int(plan.num_tokens[row])
            begin, first = int(plan.num_tokens[:row].sum()), int(plan.starts[row]) + 1
            entries: list[TokenLogprobs] = []
            targets = torch.from_numpy(sequence.prompt_ids[first : first + count].astype(np.int64))
            for at in range(0, len(targets), LOGITS_BLOCK):
                ids = targets[at : at + LOGITS_BLOCK].to(hidden.device)
                logits = self._model.logits(hidden[begin + at : begin + at + len(ids)])
                num_top = [sequence.params.prompt_logprobs or 0] * len(ids)
                entries += self._logprobs.read(logits, ids, num_top)
            found[step.owners[row]] = dict(enumerate(entries, first))
        return found


def _not_finite(hidden: torch.Tensor, plan: PlanView) -> NDArray[np.bool_]:
    """[num_rows] whether any of the row's hidden states holds NaN or infinity."""
    bad = ~torch.isfinite(hidden.sum(dim=-1)).cpu().numpy()
    firsts = np.cumsum(plan.num_tokens) - plan.num_tokens
    return np.logical_or.reduceat(bad, firsts) if len(bad) else bad
