# SPDX-License-Identifier: MIT
"""`StepTensors`: all that a step's kernels and sampler read of its plan, in one piece of memory.

The host writes arrays; on a CPU the tensors are the same memory, elsewhere `upload` copies it in
one go. Knows a layout, no plans.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed.layers.batch import ForwardBatch

NO_SLOT = -1  # the token's id is in token_ids


@dataclass(frozen=True)
class StepArrays:
    """What the host writes; see `ForwardBatch` for what is not described here."""

    token_ids: NDArray[np.int64]  # [T]
    token_slots: NDArray[np.int64]  # [T] whose last sampled id the token is, or NO_SLOT
    cache_index: NDArray[np.int64]  # [T]
    logits_index: NDArray[np.int64]  # [L]
    places: NDArray[np.int64]  # [L]: positions of the tokens to be sampled
    positions: NDArray[np.int32]  # [T]
    kv_len: NDArray[np.int32]  # [R]
    slots: NDArray[np.int32]  # [R]
    q_start: NDArray[np.int32]  # [R + 1]
    logits_start: NDArray[np.int32]  # [R + 1]: where a row's part of logits_index begins


class StepTensors:
    """Memory for up to `num_tokens` tokens in `num_rows` rows, `num_logits` of which have logits.

    On a CPU a batch of it lasts until the arrays are written again, elsewhere until `upload`.
    """

    def __init__(
        self, num_tokens: int, num_rows: int, num_logits: int, device: torch.device
    ) -> None:
        wide, narrow = torch.int64, torch.int32
        layout = [(num_tokens, wide)] * 3 + [(num_logits, wide)] * 2 + [(num_tokens, narrow)]
        layout += [(num_rows, narrow)] * 2 + [(num_rows + 1, narrow)] * 2
        self._on_host = device.type == "cpu"
        self._host = torch.zeros(sum(n * k.itemsize for n, k in layout), dtype=torch.uint8)
        self._device = self._host if self._on_host else torch.empty_like(self._host, device=device)
        fields, at = [], 0
        for count, kind in layout:
            end = at + count * kind.itemsize
            fields.append((at, end, kind))
            at = end
        self.arrays = StepArrays(*(self._host[a:b].view(kind).numpy() for a, b, kind in fields))
        self._tensors = [self._device[a:b].view(kind) for a, b, kind in fields]

    def upload(self) -> None:
        """Brings the arrays to the device, without waiting for it."""
        if not self._on_host:
            # The allocator of pinned memory keeps this copy's source until the device has read it.
            self._device.copy_(self._host.pin_memory(), non_blocking=True)

    def batch(
        self,
        num_tokens: int,
        num_rows: int,
        num_logits: int,
        page_table: torch.Tensor,
        *,
        max_q_len: int,
        max_kv_len: int,
    ) -> "StepBatch":
        """The first tokens and rows."""
        ids, slots_of, index, wanted, places, positions, *of_rows = self._tensors
        kv_len, slots, q_start, logits_start = of_rows
        return StepBatch(
            ForwardBatch(
                token_ids=ids[:num_tokens],
                positions=positions[:num_tokens],
                cache_index=index[:num_tokens],
                q_start=q_start[: num_rows + 1],
                kv_len=kv_len[:num_rows],
                slots=slots[:num_rows],
                page_table=page_table,
                logits_index=wanted[:num_logits],
                max_q_len=max_q_len,
                max_kv_len=max_kv_len,
            ),
            slots_of[:num_tokens],
            places[:num_logits],
            logits_start[: num_rows + 1],
        )


@dataclass(frozen=True)
class StepBatch:
    """A step on the device: what the model reads, and what only execution does."""

    forward: ForwardBatch
    token_slots: torch.Tensor  # [T] int64
    places: torch.Tensor  # [L] int64
    logits_start: torch.Tensor  # [R + 1] int32
