# SPDX-License-Identifier: MIT
"""`DraftRows`: what a step means to a model drafter, row by row, on the host. Knows no tensors'
contents but lengths.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.execution.speculation.backlog import Ints
from tokenspeed.execution.speculation.drafter import DraftWork


@dataclass(frozen=True)
class DraftRows:
    """Rows of a step in which something settled, in order; arrays are [R] int64 or bool.

    Positions [starts, ends) are settled by it; its first token is the step's token `tokens`.
    """

    rows: Ints  # in the step
    slots: Ints
    tokens: Ints
    starts: Ints
    ends: Ints
    limits: Ints  # positions before these stand in pages that the sequence has
    samples: NDArray[np.bool_]  # the token at `ends` is known
    prefills: NDArray[np.bool_]  # some of its tokens have no logits
    wanted: Ints  # drafts

    @classmethod
    def of(cls, work: DraftWork, max_depth: int, max_model_len: int) -> "DraftRows":
        """Waits for the device, which has told `accepted` already."""
        count, accepted = len(work.accepted), work.accepted.astype(np.int64)
        forward, samples = work.batch.forward, work.row_sample
        q_start = on_host(forward.q_start)[: count + 1].astype(np.int64)
        num_logits = np.diff(on_host(work.batch.logits_start)[: count + 1])
        lengths = np.diff(q_start)
        kv_len = on_host(forward.kv_len)[:count].astype(np.int64)
        starts = kv_len - lengths
        ends = starts + lengths - num_logits + accepted
        wanted = np.minimum(np.minimum(work.num_propose, max_depth), max_model_len - ends)
        wanted = np.where(accepted > 0, np.maximum(wanted, 0), 0)
        every = cls(
            np.arange(count),
            on_host(forward.slots)[:count].astype(np.int64),
            q_start[:-1],
            starts,
            ends,
            kv_len,
            samples,
            lengths > num_logits,
            wanted,
        )
        failed = samples & (accepted == 0)
        return every.some(~failed) if failed.any() else every

    def some(self, chosen: NDArray[np.bool_] | Ints) -> "DraftRows":
        """These rows, in this order."""
        return DraftRows(
            self.rows[chosen],
            self.slots[chosen],
            self.tokens[chosen],
            self.starts[chosen],
            self.ends[chosen],
            self.limits[chosen],
            self.samples[chosen],
            self.prefills[chosen],
            self.wanted[chosen],
        )


@dataclass(frozen=True)
class PassedStep:
    """A step with logits at all its T tokens, of which nobody wanted drafts.

    Nothing is looked at until it is needed, if ever; tensors are copies.
    """

    slots: NDArray[np.int32]
    q_start: NDArray[np.int32]
    kv_len: NDArray[np.int32]
    accepted: NDArray[np.int32]
    token_ids: Tensor  # [T]
    ids: Tensor  # [T] sampled behind each
    beside: Tensor  # [T, W] what the model left

    @classmethod
    def of(cls, work: DraftWork, beside: Tensor) -> "PassedStep":
        """`beside` [T, W] is what the model left."""
        forward, count, num_tokens = work.batch.forward, len(work.accepted), len(work.ids)
        return cls(
            on_host(forward.slots)[:count].copy(),
            on_host(forward.q_start)[: count + 1].copy(),
            on_host(forward.kv_len)[:count].copy(),
            work.accepted,
            forward.token_ids[:num_tokens].clone(),
            work.ids.clone(),
            beside[:num_tokens].clone(),
        )

    def rows(self) -> DraftRows:
        """Those that did not fail."""
        tokens, accepted = self.q_start[:-1].astype(np.int64), self.accepted.astype(np.int64)
        starts = self.kv_len.astype(np.int64) - np.diff(self.q_start)
        ends, at = starts + accepted, np.arange(len(accepted))
        yes, none = np.ones(len(at), np.bool_), np.zeros_like(at)
        slots = self.slots.astype(np.int64)
        every = DraftRows(at, slots, tokens, starts, ends, ends, yes, ~yes, none)
        return every if accepted.all() else every.some(accepted > 0)


def ragged(first: Ints, counts: Ints) -> Ints:
    """[sum(counts)] first[0], first[0] + 1, ... for each row, one row after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(first - ends + counts, counts)


def on_host(tensor: Tensor) -> NDArray[np.int32]:
    """On a CPU without a copy."""
    array: NDArray[np.int32] = tensor.cpu().numpy()
    return array
