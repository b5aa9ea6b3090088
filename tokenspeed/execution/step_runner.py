# SPDX-License-Identifier: MIT
"""`StepRunner`: one rank's share of a step. Knows no request's lifecycle and no other rank.

All ranks run every step, with an empty batch where their dp index has no plan. Those of the last
stage have logits; one of each dp index samples and says what came out.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tokenspeed.execution.batch import Batcher
from tokenspeed.execution.kv_cache import KVCache
from tokenspeed.execution.logprobs import LogprobsReader
from tokenspeed.execution.plan_view import (
    ROW_PREFILL,
    ROW_PROMPT_LOGPROBS,
    ROW_SAMPLE,
    PlanView,
    Words,
)
from tokenspeed.execution.sampler import Sampler, Sequence
from tokenspeed.execution.sampling_params import TokenLogprobs
from tokenspeed.execution.step_graphs import StepGraphs
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.spmd.group import Group

LOGITS_BLOCK = 64  # rows of vocabulary-wide logits held at a time for prompt logprobs

Caches = list[tuple[torch.Tensor, ...]]
PromptLogprobs = dict[int, TokenLogprobs]  # prompt position -> its token


class Model(Protocol):
    """What execution asks of a model."""

    def forward(self, batch: ForwardBatch, caches: Caches) -> torch.Tensor:
        """Hidden states [T, D] of every token; writes their keys and values."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[L, D] -> float32 [L, vocab_size]."""


class Spmd(Protocol):
    """What execution asks of the ranks (see `spmd/localise.py`)."""

    def begin_step(self, tokens_per_dp: list[int]) -> None: ...


class Balancer(Protocol):
    """What execution asks of expert-load balancing (see `execution/expert_balancer.py`)."""

    def end_step(self) -> None: ...


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


class StepRunner:
    """Runs steps one after the other, on whatever thread calls it; that thread owns all it reads.

    `logits` says whether this rank is on the last stage, `sampler` is None where it does not
    sample. `ahead`: steps are planned before the ids of the one before are known, and find them on
    the device; `peers` have the same tokens and get the sampled ids at once. `graphs` serve decode
    steps, over the same model and cache.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        batcher: Batcher,
        sampler: Sampler | None,
        *,
        spmd: Spmd | None = None,
        logits: bool = True,
        ahead: bool = False,
        peers: Group | None = None,
        balancer: Balancer | None = None,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.device = batcher.device
        self._model, self.cache = model, cache
        self._batcher, self._sampler = batcher, sampler
        self._logprobs = LogprobsReader(batcher.device)
        self._spmd, self._has_logits = spmd, logits
        self._ahead, self._peers = ahead, peers
        self._balancer, self._graphs = balancer, graphs

    def run(self, step: Step) -> StepOutput | None:
        """The output, on the rank that samples."""
        begun = self.begin(step)
        return None if begun is None else self.finish(begun)

    @torch.inference_mode()
    def capture(self, sizes: SequenceOf[int]) -> None:
        """Captures decode steps of these numbers of rows, with a bar on the terminal."""
        with tqdm(sorted(sizes, reverse=True), desc="Capturing", disable=None) as bar:
            for size in bar:  # the largest first: the others use its memory
                if self._graphs is not None and self._graphs.size_for(size) is not None:
                    self._graphs.run(self._batcher.fillers(size).forward)

    def begin(self, step: Step) -> Begun | None:
        """Starts a step; on a GPU nothing waits for it unless a request's parameters want to.

        Torch's threads rest during a step on the CPU: the kernels have threads of their own.
        """
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # a thread of its own begins with the first GPU
                return self._begin(step)
        if torch.get_num_threads() == 1:
            return self._begin(step)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._begin(step)
        finally:
            torch.set_num_threads(num_threads)

    def finish(self, begun: Begun) -> StepOutput:
        """Waits for a step that was begun. Any thread may; others may begin meanwhile."""
        plan, rows, step = begun.plan, begun.rows, begun.step
        sampled, sums = begun.results.wait()
        failed = np.zeros(plan.num_rows, np.bool_) if sums is None else _not_finite(sums, plan)
        if rows is None:
            ids, failed = sampled, sampled < 0
        else:
            ids = np.full(plan.num_rows, -1, np.int64)
            ids[rows] = sampled
            failed[rows] |= sampled < 0
        logprobs = {
            step.owners[at if rows is None else rows[at]]: entry
            for at, entry in begun.logprobs.items()
        }
        return StepOutput(plan.result(ids, failed), logprobs, begun.prompt_logprobs)

    @torch.inference_mode()
    def _begin(self, step: Step) -> Begun | None:
        if self._spmd is not None:
            self._spmd.begin_step(step.counts)
        begun = None
        if step.plan is not None:
            begun = self._begin_plan(step, step.plan)
        else:
            self._model.forward(self._batcher.idle().forward, self.cache.layers)
        if self._balancer is not None:
            self._balancer.end_step()
        return begun

    def _begin_plan(self, step: Step, plan: PlanView) -> Begun | None:
        if self._sampler is not None:
            for bind in step.binds:
                self._sampler.bind(bind.slot, bind.sequence, bind.output_ids)
        if len(plan.copies):
            self._copy_pages(plan.copies)
        self._batcher.apply_deltas(plan.deltas)
        size = self._captured_size(plan)
        if size is not None:
            return self._begin_captured(step, plan, size)
        batch = self._batcher.build(plan)
        hidden = self._model.forward(batch.forward, self.cache.layers)
        if not self._has_logits:
            return None
        rows = np.flatnonzero(plan.flags & ROW_SAMPLE)
        logits = self._logits(hidden, batch.forward.logits_index)
        sampled, chosen = self._sample(logits, plan.slots[rows], batch.places)
        prompts = self._prompt_logprobs(step, plan, hidden)
        if self._sampler is None:
            return None
        results = Results(sampled, hidden.sum(dim=-1))
        return Begun(step, plan, rows, results, chosen, prompts)

    def _captured_size(self, plan: PlanView) -> int | None:
        """Rows of the captured step that serves this plan; None: it is run as it is."""
        if self._graphs is None or len(plan.tokens) != plan.num_rows:
            return None
        size = self._graphs.size_for(plan.num_rows)
        if size is None or any(flags & ~ROW_PREFILL != ROW_SAMPLE for flags in plan.flags.tolist()):
            return None
        return size

    def _begin_captured(self, step: Step, plan: PlanView, size: int) -> Begun | None:
        """Every row samples after its one token; rows that fill up come last."""
        if self._graphs is None:
            raise RuntimeError("there are no graphs")
        count, batch = plan.num_rows, self._batcher.build_decode(plan, size)
        _, logits = self._graphs.run(batch.forward)
        places = batch.places
        if size > count:
            logits, places = logits[:count], places[:count]
        sampled, chosen = self._sample(logits, plan.slots, places)
        # What is not finite in a hidden state is not finite in its logits, and no id comes of them.
        return Begun(step, plan, None, Results(sampled), chosen, {})

    def _logits(self, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor | None:
        """Of the tokens at `index`, which rises; None without any."""
        if not len(index):
            return None
        return self._model.logits(hidden if len(index) == len(hidden) else hidden[index])

    def _sample(
        self, logits: torch.Tensor | None, slots: NDArray[np.int32], places: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, TokenLogprobs]]:
        """Ids of the rows with logits (-1: none came of them) and log-probabilities of some."""
        chosen: dict[int, TokenLogprobs] = {}
        if logits is None:
            return places[:0], chosen
        if self._sampler is not None:
            sampled, chosen = self._sampler.sample(logits, slots, places)
        else:
            sampled = torch.empty_like(places)  # as the rank that samples will say
        if not self._ahead:
            return sampled, chosen
        if self._peers is not None:
            sampled = self._peers.broadcast(sampled, 0)
        self._batcher.keep_last_ids(slots, sampled)
        return sampled, chosen

    def _copy_pages(self, copies: NDArray[np.int32]) -> None:
        if copies[:, 0].any() or copies[:, 2].any():
            raise ValueError("the plan copies pages of a tier that this runner does not have")
        sources, targets = (torch.from_numpy(copies[:, i].astype(np.int64)) for i in (1, 3))
        self.cache.copy_pages(sources, targets)

    def _prompt_logprobs(
        self, step: Step, plan: PlanView, hidden: torch.Tensor
    ) -> dict[int, PromptLogprobs]:
        """The logits at position p say how likely the prompt's token at p + 1 was.

        All ranks with logits compute the same blocks of rows, whoever reads them.
        """
        found: dict[int, PromptLogprobs] = {}
        for row in np.flatnonzero(plan.flags & ROW_PROMPT_LOGPROBS).tolist():
            count = int(plan.num_tokens[row])
            begin, first = int(plan.num_tokens[:row].sum()), int(plan.starts[row]) + 1
            entries: list[TokenLogprobs] = []
            for at in range(0, count, LOGITS_BLOCK):
                end = min(at + LOGITS_BLOCK, count)
                logits = self._model.logits(hidden[begin + at : begin + end])
                if self._sampler is not None:
                    sequence = step.sequences[row]
                    prompt = sequence.prompt_ids[first + at : first + end].astype(np.int64)
                    ids = torch.from_numpy(prompt).to(hidden.device)
                    num_top = [sequence.params.prompt_logprobs or 0] * len(ids)
                    if len(ids):
                        entries += self._logprobs.read(logits[: len(ids)], ids, num_top)
            if self._sampler is not None:
                found[step.owners[row]] = dict(enumerate(entries, first))
        return found


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _not_finite(sums: NDArray[np.float32], plan: PlanView) -> NDArray[np.bool_]:
    """[num_rows] whether any of the row's hidden states, of which these are sums, is not finite."""
    bad = ~np.isfinite(sums)
    if not bad.any():
        return np.zeros(plan.num_rows, np.bool_)
    return np.logical_or.reduceat(bad, np.cumsum(plan.num_tokens) - plan.num_tokens)
