# SPDX-License-Identifier: MIT
"""Steps of a target and a model drafter over shuffled pages, without scheduler and engine.

A row is a piece of a prompt, or the newest token with the drafts that were proposed for it; drafts
are accepted as the engine accepts them. What nobody wrote is NaN, in the drafter's cache too.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.paged_run import PagedRun
from tokenspeed.execution.recorders import Recorder
from tokenspeed.execution.speculation.drafter import DraftWork
from tokenspeed.execution.speculation.model_drafter import ChainDrafter, Room
from tokenspeed.execution.step_tensors import StepBatch
from tokenspeed.kernels.sample import sample
from tokenspeed.models.causal_lm import CausalLM


class Drafting:
    """`temperatures` by slot, 0 by default; each slot has a seed of its own.

    `proposed` and `accepted` count drafts.
    """

    def __init__(
        self,
        target: CausalLM,
        drafter: ChainDrafter,
        temperatures: Mapping[int, float] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.run, self.drafter = PagedRun(target), drafter
        self.temperatures = temperatures or {}
        room = Room(max_num_seqs=5, max_model_len=192, page_size=16)
        num_pages = 64 + drafter.num_own_pages(room)
        caches = [
            tuple(torch.full((num_pages, 16, *s), torch.nan, dtype=spec.dtype) for s in spec.shapes)
            for spec in drafter.cache_specs
        ]
        self.caches = caches
        drafter.attach(caches, room, 64, recorder)
        self.ids: dict[int, list[int]] = {}  # by slot: the prompt, what came after it
        self.drafts: dict[int, list[int]] = {}
        self.proposed = self.accepted = 0

    def begin(self, slot: int, prompt: list[int], hit: tuple[int, int] | None = None) -> None:
        """A request takes the slot; `hit`: the slot whose first so many tokens it shares."""
        self.ids[slot], self.drafts[slot] = list(prompt), []
        self.run.lengths[slot] = 0
        if hit is not None:
            self.run.adopt(slot, *hit)
        self.drafter.bind(np.array([slot], np.int32))

    def step(self, slots: Mapping[int, int], propose: int | Mapping[int, int] = 0) -> None:
        """One step of these slots, each with at most so many tokens of its prompt."""
        pieces, num_draft, samples = {}, {}, {}
        for slot, limit in slots.items():
            waiting = self.ids[slot][self.run.lengths[slot] :]
            drafts = self.drafts[slot] if len(waiting) == 1 else []
            pieces[slot] = waiting[:limit] + drafts
            num_draft[slot], samples[slot] = len(drafts), limit >= len(waiting)
        before = dict(enumerate(self.run.lengths))
        batch, order = self.run.batch(pieces), list(slots)
        ends = batch.q_start[1:].tolist()
        num_logits = [num_draft[slot] + 1 if samples[slot] else 0 for slot in order]
        starts = [0, *itertools.accumulate(num_logits)]
        at = [
            place
            for end, count in zip(ends, num_logits, strict=True)
            for place in range(end - count, end)
        ]
        batch = dataclasses.replace(batch, logits_index=torch.tensor(at).long())
        self.run.model.spmd.begin_step([len(batch.token_ids)])
        hidden = self.run.model.forward(batch, self.run.caches)
        ids = torch.zeros_like(batch.token_ids)
        owners = batch.slots.repeat_interleave(batch.q_start.diff())[at]
        places = batch.positions[at].long() + 1
        logits = self.run.model.logits(hidden[at])
        ids[at] = self.sample(logits, owners.numpy(), places)
        taken: list[int] = []
        for end, slot in zip(ends, order, strict=True):
            if not samples[slot]:
                taken.append(0)
                continue
            first = end - 1 - num_draft[slot]
            count = 1
            for place in range(first, end - 1):
                if int(ids[place]) != pieces[slot][place + 1 - end]:
                    break
                count += 1
            taken.append(count)
            if num_draft[slot]:
                self.run.lengths[slot] = before[slot] + count
            self.ids[slot] += ids[first : first + count].tolist()
            self.accepted += count - 1
        wants = [propose.get(s, 0) if isinstance(propose, Mapping) else propose for s in order]
        work = DraftWork(
            StepBatch(batch, torch.full_like(ids, -1), places, torch.tensor(starts).int()),
            hidden,
            list(self.run.model.aux_hidden),
            np.array([samples[s] for s in order]),
            np.array(taken, np.int32),
            ids,
            np.array(wants, np.int32),
            self.sample,
        )
        skips = self.drafter.skips(asked=bool(work.num_propose.any()))
        found = torch.empty((len(order), 0)) if skips else self.drafter.draft(work)
        for slot, row in zip(order, found.tolist(), strict=True):
            self.drafts[slot] = [token for token in row if token >= 0]
            self.proposed += len(self.drafts[slot])

    def sample(self, logits: Tensor, slots: NDArray[np.int32], places: Tensor) -> Tensor:
        """As the engine's sampler: the noise depends on a slot's seed and the place alone."""
        count = len(slots)
        return sample(
            logits.float(),
            torch.tensor([self.temperatures.get(int(s), 0.0) for s in slots]),
            torch.zeros(count, dtype=torch.int32),
            torch.ones(count),
            torch.zeros(count),
            torch.tensor([1000 + int(s) for s in slots]).long(),
            places,
        )
