# SPDX-License-Identifier: MIT
"""Runs requests through a `StepRunner` with hand-made plans, with any drafts, without a scheduler.

What a row keeps is committed as an engine would: ids one by one until the request ends, positions
up to the last id kept. Pages are shuffled, and NaN until they are written.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.unit.test_execution_batch import plan
from tokenspeed.execution import plan_view as pv
from tokenspeed.execution.batch import Batcher
from tokenspeed.execution.kv_cache import KVCache
from tokenspeed.execution.recorders import CpuRecorder, Outputs
from tokenspeed.execution.sampler import Sampler
from tokenspeed.execution.sampler import Sequence as Request
from tokenspeed.execution.sampling_params import SamplingParams, TokenLogprobs
from tokenspeed.execution.speculation.drafter import ModelDrafter
from tokenspeed.execution.step import Bind, PromptLogprobs, Seats, Step, StepOutput
from tokenspeed.execution.step_graphs import StepGraphs
from tokenspeed.execution.step_runner import StepRunner
from tokenspeed.layers.batch import ForwardBatch

CPU = torch.device("cpu")
PAGE, PAGES_PER_SLOT = 4, 24


@dataclass
class Row:
    """A request under way: the ids it has, those whose keys stand in the cache, its slot."""

    number: int
    request: Request
    slot: int | None = None
    computed: int = 0
    is_over: bool = False
    num_steps: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs = field(default_factory=dict)

    @property
    def max_tokens(self) -> int:
        assert self.request.params.max_tokens is not None
        return self.request.params.max_tokens

    @property
    def ids(self) -> list[int]:
        return [*self.request.prompt_ids.tolist(), *self.request.output_ids]


Draft = Callable[[Row], list[int]]
Answer = tuple[list[int], list[TokenLogprobs], PromptLogprobs]


def request(prompt: list[int], stop_ids: Sequence[int] = (), **params: Any) -> Request:
    settings = SamplingParams(**params)
    return Request(np.array(prompt, np.int32), settings, list(stop_ids), settings.seed or 0)


class DraftedRun:
    """As many slots as requests; a prompt is read in chunks."""

    def __init__(
        self,
        model: Any,
        requests: list[Request],
        *,
        graphs: bool = False,
        chunk: int = 5,
        drafter: ModelDrafter | None = None,
        news: Sequence[tuple[str, bytes | None]] = (),
    ) -> None:
        self.model, self.chunk = model, chunk
        self.rows = [Row(number, one) for number, one in enumerate(requests)]
        self.free = list(range(len(requests)))
        pages = len(requests) * PAGES_PER_SLOT
        self.cache = KVCache(model.cache_specs(), num_pages=pages, page_size=PAGE, device=CPU)
        for tensor in (tensor for tensors in self.cache.layers for tensor in tensors):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        batcher = Batcher(
            max_num_seqs=len(requests),
            max_model_len=PAGE * PAGES_PER_SLOT,
            page_size=PAGE,
            device=CPU,
        )
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(3)).numpy()
        slots, index = np.divmod(np.arange(pages), PAGES_PER_SLOT)
        batcher.apply_deltas(np.stack([slots * 0, slots, index, order], -1).astype(np.int32))
        sampler = Sampler(max_num_seqs=len(requests), vocab_size=model.vocab_size, device=CPU)
        sampler.grammars.store.take(news)
        self.graphs = (
            StepGraphs(self._compute, CpuRecorder(), max_rows=len(requests)) if graphs else None
        )
        self.runner = StepRunner(
            model, self.cache, batcher, sampler, ahead=True, graphs=self.graphs, drafter=drafter
        )
        self.batcher, self.seats = batcher, Seats(len(requests))
        self.steps: list[tuple[Step, StepOutput]] = []

    def _compute(self, batch: ForwardBatch) -> Outputs:
        hidden = self.model.forward(batch, self.cache.layers)
        return hidden, self.model.logits(hidden)

    def run(
        self, draft: Draft = lambda row: [], *, propose: int = 0, lose: random.Random | None = None
    ) -> list[Answer]:
        """Until all are over: their ids, and what they were told of them. `lose`: now and then a
        request loses its slot and its keys, and begins again."""
        while live := [row for row in self.rows if not row.is_over]:
            for row in live:
                if lose is not None and row.slot is not None and lose.random() < 0.06:
                    self.free.append(row.slot)
                    row.slot, row.computed = None, 0
            self._step(live, draft, propose)
        return [(row.request.output_ids, row.logprobs, row.prompt_logprobs) for row in self.rows]

    def _step(self, live: list[Row], draft: Draft, propose: int) -> None:
        rows: list[tuple[int, ...]] = []
        tokens: list[int] = []
        binds, words = [], []
        for row in live:
            ids = row.ids
            if row.slot is None:
                row.slot = self.free.pop(0)
                known = list(row.request.output_ids)
                binds.append(Bind(row.slot, row.number, row.request, known))
                words.append((row.slot, row.number, 0, len(ids)))
            piece = ids[row.computed : row.computed + self.chunk]
            flags, num_draft = pv.ROW_PREFILL, 0
            if row.computed + len(piece) == len(ids):
                flags |= pv.ROW_SAMPLE
            if row.request.params.prompt_logprobs is not None and not row.request.output_ids:
                flags |= pv.ROW_PROMPT_LOGPROBS
            if row.request.output_ids and row.computed + 1 == len(ids):
                room = row.max_tokens - len(row.request.output_ids) - 1
                drafts = draft(row)[: max(room, 0)]
                piece, flags, num_draft = piece + drafts, pv.ROW_SAMPLE, len(drafts)
            num_propose = propose if flags & pv.ROW_SAMPLE else 0
            rows.append((row.slot, flags, row.computed, len(piece), num_draft, num_propose))
            tokens += piece
        view = pv.PlanView(plan(rows, tokens, binds=words))
        step = self.seats.step([len(tokens)], view, binds)
        output = self.runner.run(step)
        assert output is not None
        self.steps.append((step, output))
        self._commit(live, view, output)

    def _commit(self, live: list[Row], view: pv.PlanView, output: StepOutput) -> None:
        end = pv.RESULT_HEADER_WORDS + 3 * len(live)
        found, at = output.words[pv.RESULT_HEADER_WORDS : end].reshape(-1, 3), end
        for row, (slot, status, count), num_tokens in zip(
            live, found.tolist(), view.num_tokens.tolist(), strict=True
        ):
            assert slot == row.slot
            row.num_steps += 1
            ids, at = output.words[at : at + count].tolist(), at + count
            assert not ids or int(self.batcher.last_ids[slot]) == ids[-1]
            row.prompt_logprobs |= output.prompt_logprobs.get(row.number, {})
            entries = output.logprobs.get(row.number, [])
            assert len(entries) == (count if row.request.params.logprobs is not None else 0)
            row.computed = len(row.ids) + count - 1 if count else row.computed + num_tokens
            row.is_over = status == pv.ROW_FAILED
            for i, token in enumerate(ids):
                if row.is_over:
                    break
                row.request.output_ids.append(token)
                row.logprobs += entries[i : i + 1]
                ended = len(row.request.output_ids) == row.max_tokens
                row.is_over = ended or token in row.request.stop_ids
            if row.is_over:
                self.free.append(slot)
        assert at == len(output.words)
