# SPDX-License-Identifier: MIT
"""Plan -> `StepBatch`: the page table kept on the device, fed by deltas. Knows no sampling.

    sequence of a slot:  | page_table[slot, 0] | page_table[slot, 1] | ...
    token at position p: page_table[slot, p // page_size] * page_size + p % page_size

A page table entry is written only when a delta names it; nothing here is rebuilt per step, and all
work on tokens is vectorised. Steps in which every row decodes one token share their memory, so that
captured steps find it where it was. Rows that only fill such a step up to a captured size belong to
a slot of their own, whose one page is the scratch page: they write there and nowhere else.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed.execution.plan_view import ROW_SAMPLE, TOKEN_FROM_DEVICE, PlanView
from tokenspeed.execution.step_tensors import NO_SLOT, StepBatch, StepTensors


class Batcher:
    """Owns the page table and each slot's last sampled id.

    `scratch_page` is a page that the scheduler does not know, for rows that fill up; None where
    none do.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        page_size: int,
        device: torch.device,
        scratch_page: int | None = None,
    ) -> None:
        self._page_size, self._scratch_page = page_size, scratch_page
        self.device = device
        self.max_num_seqs = max_num_seqs
        max_pages = -(-max_model_len // page_size)
        num_slots = max_num_seqs + (scratch_page is not None)
        self._host_table = np.zeros((num_slots, max_pages), np.int32)
        self._host_table[max_num_seqs:] = scratch_page or 0
        # On the CPU the tensor is the host's table itself.
        self._table = torch.from_numpy(self._host_table).to(device)
        self.last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._decode = StepTensors(max_num_seqs, max_num_seqs, device)
        self._decode.arrays.q_start[:] = np.arange(max_num_seqs + 1)
        self._decode.arrays.logits_index[:] = np.arange(max_num_seqs)
        self._decode_batches: dict[int, StepBatch] = {}

    def apply_deltas(self, deltas: NDArray[np.int32]) -> None:
        """Page table entries [n, 4]: group, slot, index, page."""
        if not len(deltas):
            return
        _, slots, index, pages = deltas.T
        self._host_table[slots, index] = pages
        if self.device.type != "cpu":
            flat = torch.from_numpy(np.stack([slots, index, pages]).astype(np.int64))
            flat = flat.pin_memory().to(self.device, non_blocking=True)
            self._table.index_put_((flat[0], flat[1]), flat[2].int())

    def build(self, plan: PlanView) -> StepBatch:
        """The tensors of this step."""
        counts = plan.num_tokens
        ends = np.cumsum(counts)
        row_of = np.repeat(np.arange(plan.num_rows), counts)
        positions = np.arange(len(plan.tokens)) - (ends - counts - plan.starts)[row_of]
        tensors = StepTensors(len(plan.tokens), plan.num_rows, self.device)
        arrays, sampled = tensors.arrays, sample_index(plan)
        arrays.q_start[1:] = ends
        arrays.kv_len[:] = kv_len = plan.starts + counts
        arrays.slots[:] = plan.slots
        arrays.logits_index[: len(sampled)] = sampled
        arrays.places[: len(sampled)] = positions[sampled] + 1
        self._fill_tokens(tensors, plan, plan.slots[row_of], positions)
        tensors.upload()
        batch = tensors.batch(
            plan.num_rows,
            len(sampled),
            self._table,
            max_q_len=int(counts.max(initial=0)),
            max_kv_len=int(kv_len.max(initial=0)),
        )
        return self._with_ids(batch, plan)

    def build_decode(self, plan: PlanView, num_rows: int) -> StepBatch:
        """A step in which every row samples after its one token, filled up to `num_rows` rows.

        Lasts until the next step of this kind.
        """
        arrays, count = self._decode.arrays, plan.num_rows
        np.add(plan.starts, 1, out=arrays.kv_len[:count])
        arrays.places[:count] = arrays.kv_len[:count]
        arrays.slots[:count] = plan.slots
        self._fill_tokens(self._decode, plan, plan.slots, plan.starts)
        return self._with_ids(self._filled_up(count, num_rows), plan)

    def fillers(self, num_rows: int) -> StepBatch:
        """A step of `num_rows` rows that only fill up, to capture one of that size."""
        return self._filled_up(0, num_rows)

    def _filled_up(self, count: int, num_rows: int) -> StepBatch:
        """The decode step whose first `count` rows are in their arrays."""
        if num_rows > count:
            self._fill_up(slice(count, num_rows))
        self._decode.upload()
        batch = self._decode_batches.get(num_rows)
        if batch is None:
            longest = self._table.shape[1] * self._page_size
            batch = self._decode.batch(
                num_rows, num_rows, self._table, max_q_len=1, max_kv_len=longest
            )
            self._decode_batches[num_rows] = batch
        return batch

    def keep_last_ids(self, slots: NDArray[np.int32], ids: torch.Tensor) -> None:
        """Ids [n] that these slots sampled, for steps planned before the host knows them."""
        # A failed row's -1 must never be looked up as a token by a step planned already.
        at = torch.from_numpy(slots.astype(np.int64))
        if self.device.type != "cpu":
            at = at.pin_memory().to(self.device, non_blocking=True)
        self.last_ids[at] = ids.clamp(min=0)

    def idle(self) -> StepBatch:
        """A step without tokens."""
        none = StepTensors(0, 0, self.device)
        return none.batch(0, 0, self._table, max_q_len=0, max_kv_len=0)

    def _fill_tokens(
        self,
        tensors: StepTensors,
        plan: PlanView,
        slot_of: NDArray[np.int32],
        positions: NDArray[np.integer],
    ) -> None:
        arrays, count = tensors.arrays, len(plan.tokens)
        index, offset = np.divmod(positions, self._page_size)
        places = arrays.cache_index[:count]
        np.multiply(self._host_table[slot_of, index], self._page_size, out=places, dtype=np.int64)
        places += offset
        arrays.positions[:count] = positions
        arrays.token_ids[:count] = plan.tokens
        arrays.token_slots[:count] = np.where(plan.tokens == TOKEN_FROM_DEVICE, slot_of, NO_SLOT)

    def _fill_up(self, rows: slice) -> None:
        if self._scratch_page is None:
            raise RuntimeError("a step is filled up, but there is no scratch page")
        arrays = self._decode.arrays
        arrays.token_ids[rows] = arrays.positions[rows] = 0
        arrays.token_slots[rows] = NO_SLOT
        arrays.cache_index[rows] = self._scratch_page * self._page_size
        arrays.kv_len[rows] = arrays.places[rows] = 1
        arrays.slots[rows] = self.max_num_seqs

    def _with_ids(self, batch: StepBatch, plan: PlanView) -> StepBatch:
        """Looks up the ids that only the device knows."""
        if (plan.tokens == TOKEN_FROM_DEVICE).any():
            ids, slots = batch.forward.token_ids, batch.token_slots
            torch.where(slots >= 0, self.last_ids[slots.clamp(min=0)], ids, out=ids)
        return batch


def sample_index(plan: PlanView) -> NDArray[np.int64]:
    """[num_sampled] the last token of each row that samples."""
    ends: NDArray[np.int64] = np.cumsum(plan.num_tokens, dtype=np.int64)
    last: NDArray[np.int64] = ends[(plan.flags & ROW_SAMPLE) != 0] - 1
    return last
