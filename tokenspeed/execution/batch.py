# SPDX-License-Identifier: MIT
"""Plan -> `StepBatch`: the page table kept on the device, fed by deltas. Knows no sampling.

    sequence of a slot:  | page_table[slot, 0] | page_table[slot, 1] | ...
    token at position p: page_table[slot, p // page_size] * page_size + p % page_size

A page table entry is written only when a delta names it; nothing here is rebuilt per step, and all
work on tokens is vectorised. Steps in which every row decodes one token share their memory, so that
captured steps find it where it was, and so do steps of rows that verify drafts. Rows that only fill
a step up to a captured size belong to a slot of their own, whose one page is the scratch page: they
write there and nowhere else.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed.execution.plan_view import TOKEN_FROM_DEVICE, PlanView
from tokenspeed.execution.step_tensors import NO_SLOT, StepBatch, StepTensors

MAX_VERIFY_TOKENS: Final = 1024  # of a step of verifying rows in memory that stays,
MAX_VERIFY_ROW: Final = 64  # and of each of its rows


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
        self._max_kv_len = max_pages * page_size
        num_slots = max_num_seqs + (scratch_page is not None)
        self._host_table = np.zeros((num_slots, max_pages), np.int32)
        self._host_table[max_num_seqs:] = scratch_page or 0
        # On the CPU the tensor is the host's table itself.
        self._table = torch.from_numpy(self._host_table).to(device)
        self.last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._decode = StepTensors(max_num_seqs, max_num_seqs, max_num_seqs, device)
        self._decode.arrays.q_start[:] = np.arange(max_num_seqs + 1)
        self._decode.arrays.logits_start[:] = self._decode.arrays.q_start
        self._decode.arrays.logits_index[:] = np.arange(max_num_seqs)
        self._decode_batches: dict[int, StepBatch] = {}
        self._verify: StepTensors | None = None  # once a step needs it

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
        num_tokens, num_logits = len(plan.tokens), len(plan.sample_index)
        tensors = StepTensors(num_tokens, plan.num_rows, num_logits, self.device)
        kv_len = plan.starts + plan.num_tokens
        return self._build(
            plan,
            tensors,
            max_q_len=int(plan.num_tokens.max(initial=0)),
            max_kv_len=int(kv_len.max(initial=0)),
        )

    def keeps_verify(self, plan: PlanView) -> bool:
        """Whether `build_verify` has room for a step of these rows."""
        largest = int(plan.num_tokens.max(initial=0))
        return len(plan.tokens) <= MAX_VERIFY_TOKENS and largest <= MAX_VERIFY_ROW

    def build_verify(self, plan: PlanView) -> StepBatch:
        """A step in which every row samples after each of its tokens, in memory that stays.

        Lasts until the next step of this kind. Of its lengths it says no more than holds for all of
        them, as another step may be a replay of it.
        """
        if self._verify is None:
            sizes = MAX_VERIFY_TOKENS, self.max_num_seqs, MAX_VERIFY_TOKENS
            self._verify = StepTensors(*sizes, self.device)
        lengths = {"max_q_len": MAX_VERIFY_ROW, "max_kv_len": self._max_kv_len}
        return self._build(plan, self._verify, **lengths)

    def _build(
        self, plan: PlanView, tensors: StepTensors, *, max_q_len: int, max_kv_len: int
    ) -> StepBatch:
        arrays, index = tensors.arrays, plan.sample_index
        num_rows, num_tokens, num_logits = plan.num_rows, len(plan.tokens), len(index)
        ends = np.cumsum(plan.num_tokens)
        row_of = np.repeat(np.arange(num_rows), plan.num_tokens)
        positions = np.arange(num_tokens) - (ends - plan.num_tokens - plan.starts)[row_of]
        arrays.q_start[1 : num_rows + 1] = ends
        np.cumsum(plan.num_places, out=arrays.logits_start[1 : num_rows + 1])
        np.add(plan.starts, plan.num_tokens, out=arrays.kv_len[:num_rows])
        arrays.slots[:num_rows] = plan.slots
        arrays.logits_index[:num_logits] = index
        arrays.places[:num_logits] = positions[index] + 1
        self._fill_tokens(tensors, plan, plan.slots[row_of], positions)
        tensors.upload()
        batch = tensors.batch(
            num_tokens,
            num_rows,
            num_logits,
            self._table,
            max_q_len=max_q_len,
            max_kv_len=max_kv_len,
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
        return self.decoding(num_rows)

    def decoding(self, num_rows: int) -> StepBatch:
        """The first rows of the last step in which every row samples after its one token."""
        batch = self._decode_batches.get(num_rows)
        if batch is None:
            sizes = num_rows, num_rows, num_rows
            batch = self._decode.batch(
                *sizes, self._table, max_q_len=1, max_kv_len=self._max_kv_len
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
        none = StepTensors(0, 0, 0, self.device)
        return none.batch(0, 0, 0, self._table, max_q_len=0, max_kv_len=0)

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
