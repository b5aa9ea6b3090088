# SPDX-License-Identifier: MIT
"""Plan -> `ForwardBatch`: the page table kept on the device, fed by deltas. Knows no sampling.

    sequence of a slot:  | page_table[slot, 0] | page_table[slot, 1] | ...
    token at position p: page_table[slot, p // page_size] * page_size + p % page_size

A page table entry is written only when a delta names it; nothing here is rebuilt per step, and all
work on tokens is vectorised.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed.execution.plan_view import ROW_SAMPLE, TOKEN_FROM_DEVICE, PlanView
from tokenspeed.layers.batch import ForwardBatch


class Batcher:
    """Owns the page table and each slot's last sampled id."""

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, page_size: int, device: torch.device
    ) -> None:
        self._page_size = page_size
        self.device = device
        max_pages = -(-max_model_len // page_size)
        self._host_table = np.zeros((max_num_seqs, max_pages), np.int32)
        # On the CPU the tensor is the host's table itself.
        self._table = torch.from_numpy(self._host_table).to(device)
        self.last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def apply_deltas(self, deltas: NDArray[np.int32]) -> None:
        """Page table entries [n, 4]: group, slot, index, page."""
        if not len(deltas):
            return
        _, slots, index, pages = deltas.T
        self._host_table[slots, index] = pages
        if self.device.type != "cpu":
            at = (self._tensor(slots).long(), self._tensor(index).long())
            self._table[at] = self._tensor(pages)

    def build(self, plan: PlanView) -> ForwardBatch:
        """The tensors of this step."""
        counts = plan.num_tokens
        if len(plan.tokens) == plan.num_rows:  # one token a row
            ends = np.arange(1, plan.num_rows + 1)
            slot_of, positions = plan.slots, plan.starts
        else:
            ends = np.cumsum(counts)
            row_of = np.repeat(np.arange(plan.num_rows), counts)
            slot_of = plan.slots[row_of]
            positions = np.arange(len(plan.tokens)) - (ends - counts - plan.starts)[row_of]
        index, offset = np.divmod(positions, self._page_size)
        pages = self._host_table[slot_of, index].astype(np.int64)
        kv_len = plan.starts + counts
        return ForwardBatch(
            token_ids=self._token_ids(plan.tokens, slot_of),
            positions=self._tensor(positions.astype(np.int32, copy=False)),
            cache_index=self._tensor(pages * self._page_size + offset),
            q_start=self._tensor(np.concatenate([[0], ends]).astype(np.int32)),
            kv_len=self._tensor(kv_len),
            slots=self._tensor(plan.slots),
            page_table=self._table,
            logits_index=self._tensor(sample_index(plan)),
            max_q_len=int(counts.max(initial=0)),
            max_kv_len=int(kv_len.max(initial=0)),
        )

    def idle(self) -> ForwardBatch:
        """A step without tokens."""
        none = np.empty(0, np.int32)
        return ForwardBatch(
            token_ids=self._tensor(none.astype(np.int64)),
            positions=self._tensor(none),
            cache_index=self._tensor(none.astype(np.int64)),
            q_start=self._tensor(np.zeros(1, np.int32)),
            kv_len=self._tensor(none),
            slots=self._tensor(none),
            page_table=self._table,
            logits_index=self._tensor(none.astype(np.int64)),
            max_q_len=0,
            max_kv_len=0,
        )

    def _token_ids(self, tokens: NDArray[np.int32], slot_of: NDArray[np.int32]) -> torch.Tensor:
        ids = self._tensor(tokens.astype(np.int64))
        on_device = tokens == TOKEN_FROM_DEVICE
        if on_device.any():
            where = self._tensor(np.flatnonzero(on_device))
            ids[where] = self.last_ids[self._tensor(slot_of[on_device].astype(np.int64))]
        return ids

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def sample_index(plan: PlanView) -> NDArray[np.int64]:
    """[num_sampled] the last token of each row that samples."""
    ends: NDArray[np.int64] = np.cumsum(plan.num_tokens, dtype=np.int64)
    last: NDArray[np.int64] = ends[(plan.flags & ROW_SAMPLE) != 0] - 1
    return last
