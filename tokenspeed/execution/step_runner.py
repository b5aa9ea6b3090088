# SPDX-License-Identifier: MIT
"""`StepRunner`: one rank's share of a step. Knows no request's lifecycle and no other rank.

All ranks run every step, with an empty batch where their dp index has no plan. Those of the last
stage have logits; one of each dp index samples and says what came out. A drafter runs on all of
them, once the ids are known, and proposes the same on each.
"""

from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tokenspeed import _cpu
from tokenspeed.execution.batch import Batcher
from tokenspeed.execution.kv_cache import KVCache
from tokenspeed.execution.logprobs import LogprobsReader
from tokenspeed.execution.plan_view import ROW_PREFILL, ROW_PROMPT_LOGPROBS, ROW_SAMPLE, PlanView
from tokenspeed.execution.sampler import Sampled, Sampler
from tokenspeed.execution.sampling_params import TokenLogprobs
from tokenspeed.execution.speculation.drafter import DraftWork, ModelDrafter
from tokenspeed.execution.step import Begun, PromptLogprobs, Results, Step, StepOutput, num_kept
from tokenspeed.execution.step_graphs import StepGraphs
from tokenspeed.execution.step_tensors import StepBatch
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.spmd.group import Group

LOGITS_BLOCK = 64  # rows of vocabulary-wide logits held at a time for prompt logprobs

Caches = list[tuple[torch.Tensor, ...]]


class Model(Protocol):
    """What execution asks of a model.

    `aux_hidden`: [T, D] each, what the last `forward` left for a drafter that asked for it.
    """

    aux_hidden: list[torch.Tensor]

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


class StepRunner:
    """Runs steps one after the other, on whatever thread calls it; that thread owns all it reads.

    `logits` says whether this rank is on the last stage, `sampler` is None where it does not
    sample. `ahead`: steps are planned before the ids of the one before are known, and find them on
    the device; `peers` have the same tokens and get the sampled ids at once. `graphs` serve decode
    and verify steps, over the same model and cache; they give hidden states, logits and what is in
    `aux_hidden`.
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
        drafter: ModelDrafter | None = None,
    ) -> None:
        self.device = batcher.device
        self._model, self.cache = model, cache
        self._batcher, self._sampler = batcher, sampler
        self._logprobs = LogprobsReader(batcher.device)
        self._spmd, self._has_logits = spmd, logits
        self._ahead, self._peers = ahead, peers
        self._balancer, self._graphs, self._drafter = balancer, graphs, drafter
        if self.device.type == "cpu":
            _cpu.keep_freed_memory()  # weights are loaded: a step takes what the last one freed

    def run(self, step: Step) -> StepOutput | None:
        """The output, on the rank that samples."""
        begun = self.begin(step)
        return None if begun is None else begun.finish()

    @torch.inference_mode()
    def capture(self, sizes: SequenceOf[int]) -> None:
        """Captures decode steps of these numbers of rows, with a bar on the terminal."""
        with tqdm(sorted(sizes, reverse=True), desc="Capturing", disable=None) as bar:
            for size in bar:  # the largest first: the others use its memory
                if self._graphs is not None and self._graphs.size_for(size, size) is not None:
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

    @torch.inference_mode()
    def _begin(self, step: Step) -> Begun | None:
        if self._spmd is not None:
            self._spmd.begin_step(step.counts)
        if self._sampler is not None:
            self._sampler.grammars.store.take(step.grammars)
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
        if self._drafter is not None and len(plan.binds):
            self._drafter.bind(plan.binds[:, 0])
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
        aux = [] if self._drafter is None else self._model.aux_hidden
        logits = self._logits(hidden, batch.forward.logits_index)
        sampled = self._sample(plan, batch, logits)
        prompts = self._prompt_logprobs(step, plan, hidden)
        drafts, is_typical = self._draft(plan, batch, hidden, aux, sampled)
        if self._sampler is None:
            return None
        results = Results(sampled, hidden.sum(dim=-1), drafts)
        return Begun(step, plan, results, sampled.logprobs, prompts, is_typical)

    def _captured_size(self, plan: PlanView) -> int | None:
        """Rows of the captured step that serves this plan; None: it is run as it is."""
        num_tokens = len(plan.tokens)
        if self._graphs is None:
            return None
        if plan.only_decodes:
            return self._graphs.size_for(num_tokens, num_tokens)
        if num_tokens != len(plan.sample_index):
            return None
        if any(flags & ~ROW_PREFILL != ROW_SAMPLE for flags in plan.flags.tolist()):
            return None
        if num_tokens > plan.num_rows and not self._batcher.keeps_verify(plan):
            return None
        return self._graphs.size_for(plan.num_rows, num_tokens)

    def _begin_captured(self, step: Step, plan: PlanView, size: int) -> Begun | None:
        """Every row samples after each of its tokens; rows that fill up come last."""
        graphs = self._graphs
        if graphs is None:
            raise RuntimeError("there are no graphs")
        count, num_tokens = plan.num_rows, len(plan.tokens)
        if num_tokens > count:
            batch = self._batcher.build_verify(plan)
        else:
            batch = self._batcher.build_decode(plan, size)
        num_slow = graphs.num_slow
        outputs = graphs.run(batch.forward)
        if size > count:
            outputs = tuple(output[:num_tokens] for output in outputs)
            batch = self._batcher.decoding(count)
        hidden, logits, *aux = outputs
        sampled = self._sample(plan, batch, logits)
        drafts, is_typical = self._draft(plan, batch, hidden, aux, sampled)
        is_typical = is_typical and num_slow == graphs.num_slow
        # What is not finite in a hidden state is not finite in its logits, and no id comes of them.
        results = Results(sampled, None, drafts)
        return Begun(step, plan, results, sampled.logprobs, {}, is_typical)

    def _logits(self, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor | None:
        """Of the tokens at `index`, which rises; None without any."""
        if not len(index):
            return None
        return self._model.logits(hidden if len(index) == len(hidden) else hidden[index])

    def _sample(self, plan: PlanView, batch: StepBatch, logits: torch.Tensor | None) -> Sampled:
        """What comes of the logits; on a rank that does not sample it is told, if it must know."""
        if logits is None:
            return Sampled(batch.places[:0], None, {})
        sampled = self._sampled(plan, batch, logits)
        if self._peers is not None and (self._ahead or self._drafter is not None):
            sampled = _spread(sampled, self._peers)
        if self._ahead:
            if sampled.counts is None:
                self._batcher.keep_last_ids(plan.slots[plan.num_places > 0], sampled.ids)
            else:
                last = (batch.logits_start[:-1] + sampled.counts - 1).clamp(min=0).long()
                self._batcher.keep_last_ids(plan.slots, sampled.ids[last])
        return sampled

    def _sampled(self, plan: PlanView, batch: StepBatch, logits: torch.Tensor) -> Sampled:
        forward, places = batch.forward, batch.places
        verifies = bool(plan.num_draft.any())
        if self._sampler is None:  # the rank that samples will say
            counts = torch.empty_like(forward.slots) if verifies else None
            return Sampled(torch.empty_like(places), counts, {})
        if verifies:
            tokens = forward.token_ids
            if len(places) < len(tokens):
                tokens = tokens[forward.logits_index]
            starts = batch.logits_start
            return self._sampler.verify(logits, plan.slots, plan.num_places, starts, tokens, places)
        rows = np.flatnonzero(plan.num_places)
        ids, entries = self._sampler.sample(logits, plan.slots[rows], places)
        return Sampled(ids, None, {int(rows[at]): [entry] for at, entry in entries.items()})

    def _draft(
        self,
        plan: PlanView,
        batch: StepBatch,
        hidden: torch.Tensor,
        aux_hidden: list[torch.Tensor],
        sampled: Sampled,
    ) -> tuple[torch.Tensor | None, bool]:
        """What the drafter proposes, [num_rows, n], or None where nobody asked; and whether that
        took as long as it will."""
        if self._drafter is None:
            return None, True
        asked = not plan.only_decodes and bool(plan.num_propose.any())
        if self._drafter.skips(asked=asked):
            return None, True
        num_slow = self._drafter.num_slow
        forward, ids = batch.forward, sampled.ids
        if len(ids) < len(forward.token_ids):
            ids = torch.full_like(forward.token_ids, -1)
            ids[forward.logits_index] = sampled.ids
        work = DraftWork(
            batch=batch,
            hidden=hidden,
            aux_hidden=aux_hidden,
            row_sample=plan.num_places > 0,
            accepted=num_kept(plan, sampled),
            ids=ids,
            num_propose=plan.num_propose,
            sample=self._draw,
        )
        proposed = self._drafter.draft(work)
        return proposed if proposed.shape[1] else None, num_slow == self._drafter.num_slow

    def _draw(
        self, logits: torch.Tensor, slots: NDArray[np.int32], places: torch.Tensor
    ) -> torch.Tensor:
        """Ids of a drafter's logits, with the sampler's noise, the same on all ranks; 0 where none
        comes of them."""
        if self._sampler is None:
            ids = torch.empty_like(places)
        else:
            ids = self._sampler.draw(logits, slots, places).clamp(min=0)
        return ids if self._peers is None else self._peers.broadcast(ids, 0)

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


def _spread(sampled: Sampled, peers: Group) -> Sampled:
    """What the first of these ranks sampled, on all of them."""
    ids, counts = sampled.ids, sampled.counts
    if counts is None:
        return Sampled(peers.broadcast(ids, 0), None, sampled.logprobs)
    told = peers.broadcast(torch.cat([ids, counts.long()]), 0)
    return Sampled(told[: len(ids)], told[len(ids) :].int(), sampled.logprobs)
