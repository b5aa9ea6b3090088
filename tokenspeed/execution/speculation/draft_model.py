# SPDX-License-Identifier: MIT
"""A whole model as a drafter: it reads what the target reads, and writes on by itself.

    ... fed: its keys and values are there | waiting | newest | drafts ...
                                            settled ^

Tokens are all that it needs, so those it has not been fed yet wait in a table: prefill chunks are
fed at once, other rows when a draft is wanted or a page of theirs is full, since a full page may
become somebody else's prefix. Drafts are written where the target has pages and no further. Knows
no request, and nothing of how depths are chosen.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.execution.speculation.drafter import DraftWork
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.models.causal_lm import CausalLM

Caches = list[tuple[Tensor, ...]]
Ints = NDArray[np.int64]
NOT_BEGUN = -1


@dataclass(frozen=True)
class Rows:
    """A step's rows as a drafter sees them; arrays [R] on the host, `newest` on the device.

    Positions below `settled` hold tokens that are known for good. Where `sampled`, the token at
    `settled` is known too: `newest`, which the target has not read yet.
    """

    slots: Ints
    starts: Ints
    ends: Ints  # drafts that were rejected included
    settled: Ints
    sampled: NDArray[np.bool_]
    prefill: NDArray[np.bool_]  # rows of known tokens: there is more than the token sampled last
    newest: Tensor  # int64; anything where nothing was sampled

    @classmethod
    def of(cls, work: DraftWork) -> "Rows":
        forward = work.batch.forward
        q_start = forward.q_start.cpu().numpy().astype(np.int64)
        slots, ends = (t.cpu().numpy().astype(np.int64) for t in (forward.slots, forward.kv_len))
        # A row has logits at its last token and at each of its drafts.
        num_logits = np.diff(work.batch.logits_start.cpu().numpy())
        num_draft = np.maximum(num_logits - 1, 0)
        starts, accepted = ends - np.diff(q_start), work.accepted.astype(np.int64)
        sampled = accepted > 0
        settled = np.where(sampled, ends - num_draft + accepted - 1, ends)
        settled = np.where(work.row_sample & ~sampled, starts, settled)  # it failed
        places = np.maximum(q_start[:-1] + settled - starts - 1, 0)
        newest = work.ids[torch.from_numpy(places).to(work.ids.device)]
        prefill = ends - starts > 1 + num_draft
        return cls(slots, starts, ends, settled, sampled, prefill, newest)


class DraftModelDrafter:
    """See `ModelDrafter`. `caches` are its layers' of the pages that the target's table names."""

    name = "draft_model"

    def __init__(
        self, model: CausalLM, *, max_depth: int, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.model, self.max_depth = model, max_depth
        self.cache_specs = model.cache_specs()
        self.caches: Caches = []
        shape, device = (max_num_seqs, max_model_len), model.target.device
        self._tokens = torch.zeros(shape, dtype=torch.int32, device=device)
        self._fed = np.full(max_num_seqs, NOT_BEGUN, np.int64)
        self._room = np.zeros(max_num_seqs, np.int64)  # positions that have pages
        self._last = min(max_model_len, model.max_position)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.caches[0][0].shape[1]

    def bind(self, slots: NDArray[np.int32]) -> None:
        self._fed[slots], self._room[slots] = NOT_BEGUN, 0

    def draft(self, work: DraftWork) -> Tensor:
        """int64 [R, max num_propose]: proposed ids, -1 where none."""
        rows, table = Rows.of(work), work.batch.forward.page_table
        found = work.ids.new_full((len(rows.slots), int(work.num_propose.max(initial=0))), -1)
        self._take(work, rows)
        begins, room = self._fed[rows.slots], np.minimum(self._room[rows.slots], self._last)
        depths = np.minimum(work.num_propose, self.max_depth) * rows.sampled
        depths = np.minimum(depths, np.maximum(room - rows.settled, 0))
        ends = self._ends(rows, depths > 0)
        fed = np.flatnonzero(ends > begins)
        if not len(fed):
            return found
        self._fed[rows.slots[fed]] = ends[fed]
        ids = self._known(rows.slots[fed], begins[fed], ends[fed])
        batch = pieces(table, self.page_size, ids, rows.slots[fed], begins[fed], ends[fed])
        hidden = self._forward(batch)
        asking = depths[fed] > 0
        if asking.any():
            hidden = hidden[batch.logits_index[torch.from_numpy(asking).to(hidden.device)]]
            at = fed[asking]
            self._go_on(work, rows.slots[at], rows.settled[at], depths[at], hidden, found, at)
        return found

    def _take(self, work: DraftWork, rows: Rows) -> None:
        """Writes the step's tokens down, and the newest ones over what was rejected."""
        forward = work.batch.forward
        slots, size = forward.slots.long(), self.page_size
        of_token = slots.repeat_interleave(forward.q_start.diff())
        self._tokens[of_token, forward.positions.long()] = forward.token_ids.int()
        known = np.flatnonzero(rows.sampled & (rows.settled < self._tokens.shape[1]))
        at = torch.from_numpy(known).to(slots.device)
        where = torch.from_numpy(rows.settled[known]).to(slots.device)
        self._tokens[slots[at], where] = rows.newest[at].int()
        fed = self._fed[rows.slots]
        self._fed[rows.slots] = np.where(fed == NOT_BEGUN, rows.starts, fed)
        pages = -(-rows.ends // size)
        self._room[rows.slots] = np.maximum(self._room[rows.slots], pages * size)

    def _ends(self, rows: Rows, wanted: NDArray[np.bool_]) -> Ints:
        """Up to where each row is fed in this step."""
        full = rows.settled // self.page_size * self.page_size
        ends = np.where(rows.prefill, rows.settled, full)
        ends = np.where(wanted, rows.settled + 1, ends)
        return np.minimum(ends, self._last)

    def _known(self, slots: Ints, begins: Ints, ends: Ints) -> Tensor:
        """The tokens of these pieces, one after the other."""
        device = self._tokens.device
        at = np.concatenate([np.arange(b, e) for b, e in zip(begins, ends, strict=True)])
        of = np.repeat(slots, ends - begins)
        index = (torch.from_numpy(of).to(device), torch.from_numpy(at).to(device))
        return self._tokens[index].long()

    def _forward(self, batch: ForwardBatch) -> Tensor:
        self.model.spmd.begin_step([len(batch.token_ids)])
        return self.model.forward(batch, self.caches)

    def _go_on(
        self,
        work: DraftWork,
        slots: Ints,
        settled: Ints,
        depths: Ints,
        hidden: Tensor,
        found: Tensor,
        at: Ints,
    ) -> None:
        """Drafts after each row's newest token, whose hidden states are given, into `found`."""
        ids: Tensor | None = None
        for step in itertools.count():
            places = settled + 1 + step
            logits = self.model.logits(hidden)
            where = torch.from_numpy(places).to(hidden.device)
            sampled = work.sample(logits, slots.astype(np.int32), where)
            # Nothing follows a draft that is none.
            ids = sampled if ids is None else torch.where(ids < 0, ids, sampled)
            found[torch.from_numpy(at).to(found.device), step] = ids
            more = np.flatnonzero(depths > step + 1)
            if not len(more):
                return
            slots, settled, depths, at = slots[more], settled[more], depths[more], at[more]
            ids = ids[torch.from_numpy(more).to(ids.device)]
            begins = settled + 1 + step
            table = work.batch.forward.page_table
            batch = pieces(table, self.page_size, ids.clamp(min=0), slots, begins, begins + 1)
            hidden = self._forward(batch)


def pieces(
    table: Tensor, page_size: int, ids: Tensor, slots: Ints, begins: Ints, ends: Ints
) -> ForwardBatch:
    """Positions [begins, ends) of the sequences of `slots` as a batch; `ids` [T] are their tokens.

    `logits_index` is the last token of each piece.
    """
    device, counts = table.device, ends - begins
    q_start = np.concatenate([[0], np.cumsum(counts)])
    of = np.repeat(np.arange(len(slots)), counts)
    at = torch.from_numpy(np.arange(len(of)) - (q_start[:-1] - begins)[of]).to(device)
    pages = table[torch.from_numpy(slots[of]).to(device), at // page_size].long()

    def ints(array: Ints) -> Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    return ForwardBatch(
        token_ids=ids,
        positions=at.int(),
        cache_index=pages * page_size + at % page_size,
        q_start=ints(q_start),
        kv_len=ints(ends),
        slots=ints(slots),
        page_table=table,
        logits_index=torch.from_numpy(q_start[1:] - 1).to(device),
        max_q_len=int(counts.max(initial=0)),
        max_kv_len=int(ends.max(initial=0)),
    )
