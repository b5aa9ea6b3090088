# SPDX-License-Identifier: MIT
"""Feeds pieces of sequences to a model through shuffled pages; what no sequence owns is NaN."""

import torch
from torch import Tensor

from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.models.causal_lm import CausalLM


class PagedRun:
    """Slots and pages are handed out in shuffled order."""

    def __init__(self, model: CausalLM, num_slots: int = 5, page_size: int = 16) -> None:
        self.model, self.page_size = model, page_size
        num_pages, per_slot = 64, 12
        self.caches = [
            tuple(
                torch.full((num_pages, page_size, *s), torch.nan, dtype=spec.dtype)
                for s in spec.shapes
            )
            for spec in model.cache_specs()
        ]
        generator = torch.Generator().manual_seed(1)
        pages = torch.randperm(num_pages, generator=generator)[: num_slots * per_slot]
        self.page_table = pages.view(num_slots, per_slot).int()
        self.lengths = [0] * num_slots

    def adopt(self, slot: int, other: int, num_tokens: int) -> None:
        """A prefix hit: the slot's first pages are those of another one."""
        count = num_tokens // self.page_size
        self.page_table[slot, :count] = self.page_table[other, :count]
        self.lengths[slot] = num_tokens

    def step(self, pieces: dict[int, list[int]]) -> Tensor:
        """Appends each slot's ids; returns the logits of all new tokens, in order."""
        batch = self.batch(pieces)
        return self.model.logits(self.model.forward(batch, self.caches))

    def batch(self, pieces: dict[int, list[int]]) -> ForwardBatch:
        """The step's tensors; no pieces are an empty batch."""
        positions = [
            torch.arange(self.lengths[s], self.lengths[s] + len(ids)) for s, ids in pieces.items()
        ]
        places = [
            self.page_table[s].long()[p // self.page_size] * self.page_size + p % self.page_size
            for s, p in zip(pieces, positions, strict=True)
        ]
        for slot, ids in pieces.items():
            self.lengths[slot] += len(ids)
        lengths = [len(ids) for ids in pieces.values()]
        kv_len = [self.lengths[s] for s in pieces]
        none = torch.zeros(0, dtype=torch.int64)
        return ForwardBatch(
            token_ids=torch.tensor([t for ids in pieces.values() for t in ids]).long(),
            positions=torch.cat([none, *positions]).int(),
            cache_index=torch.cat([none, *places]),
            q_start=torch.tensor([0, *lengths]).cumsum(0).int(),
            kv_len=torch.tensor(kv_len).int(),
            slots=torch.tensor(list(pieces)).int(),
            page_table=self.page_table,
            logits_index=torch.arange(sum(lengths)),
            max_q_len=max(lengths, default=0),
            max_kv_len=max(kv_len, default=0),
        )
