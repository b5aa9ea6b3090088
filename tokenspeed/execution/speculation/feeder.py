# SPDX-License-Identifier: MIT
"""`Feeder`: runs a drafter's weights over some places of some sequences.

On a CPU the batches stand in memory that stays, and are captured and replayed as the model's steps
are. Knows shapes and the page table; refuses to know what is fed and why.
"""

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenspeed.execution.recorders import Outputs, Recorder
from tokenspeed.execution.speculation.backlog import Ints
from tokenspeed.execution.speculation.draft_rows import ragged
from tokenspeed.execution.speculation.drafter import DraftWork
from tokenspeed.execution.step_graphs import StepGraphs
from tokenspeed.execution.step_tensors import StepTensors
from tokenspeed.layers.batch import ForwardBatch

MAX_KEPT_TOKENS: Final = 1024  # of a batch in memory that stays,
MAX_KEPT_ROW: Final = 128  # and of each of its rows: shorter than what kernels take for long
MAX_KEPT_BATCHES: Final = 256
Caches = list[tuple[Tensor, ...]]


class DraftNet(Protocol):
    """A drafter's weights on this rank. W features stand beside each token that is fed; perhaps 0.

    All ranks call the same methods in the same order.
    """

    width: int
    dtype: torch.dtype
    device: torch.device

    def begin(self, num_tokens: int) -> None:
        """Before each `forward`: how many tokens it will have."""

    def beside(self, work: DraftWork) -> Tensor:
        """[T, W] what the model left at each token of its step."""

    def forward(self, beside: Tensor, batch: ForwardBatch, caches: Caches) -> Tensor:
        """[n, W], [n] tokens -> [n, W], which stands beside the token that follows. Writes KV."""

    def logits(self, left: Tensor) -> Tensor:
        """What `forward` gave, [n, W] -> float32 [n, V] over the model's vocabulary."""


@dataclass(frozen=True)
class Fed:
    """Places [starts, starts + counts) of each slot; all [R]."""

    slots: Ints
    starts: Ints
    counts: Ints


class Feeder:
    """`table` [slots, pages] is the page table that stays the model's and the drafter's.

    `recorder` captures batches; None: they run as they are.
    """

    def __init__(
        self,
        net: DraftNet,
        caches: Caches,
        *,
        max_num_seqs: int,
        page_size: int,
        recorder: Recorder | None,
    ) -> None:
        self._net, self._caches, self._page_size = net, caches, page_size
        self._device = net.device
        self._graphs: StepGraphs | None = None
        if recorder is not None:
            self._graphs = StepGraphs(self._compute, recorder, max_rows=max_num_seqs)
            self._kept = StepTensors(MAX_KEPT_TOKENS, max_num_seqs, 0, self._device)
            shape = (MAX_KEPT_TOKENS, net.width)
            self._beside = torch.zeros(shape, dtype=net.dtype, device=self._device)
            self._batches: dict[tuple[int, int], ForwardBatch] = {}

    @property
    def num_slow(self) -> int:
        """Batches that were captured or checked."""
        return 0 if self._graphs is None else self._graphs.num_slow

    def feed(self, ids: Tensor, beside: Tensor, fed: Fed, table: Tensor) -> Tensor:
        """ids [n], beside [n, W] -> [n, W], valid until the next call."""
        num_tokens, num_rows = len(ids), len(fed.slots)
        longest = 1 if num_tokens == num_rows else int(fed.counts.max())
        graphs = self._graphs_for(num_tokens, num_rows, longest)
        if graphs is None:
            tensors = StepTensors(num_tokens, num_rows, 0, self._device)
            self._fill(tensors, fed, num_tokens, table)
            lengths = {"max_q_len": longest, "max_kv_len": int((fed.starts + fed.counts).max())}
            batch = tensors.batch(num_tokens, num_rows, 0, table, **lengths).forward
        else:
            self._fill(self._kept, fed, num_tokens, table)
            batch = self._kept_batch(num_tokens, num_rows, table)
        batch.token_ids.copy_(ids)
        if self._device.type != "cpu":
            self._find_pages(batch, fed, table)
        self._net.begin(num_tokens)
        if graphs is None:
            return self._net.forward(beside, batch, self._caches)
        self._beside[:num_tokens].copy_(beside)
        return graphs.run(batch)[0]

    def _graphs_for(self, num_tokens: int, num_rows: int, longest: int) -> StepGraphs | None:
        """None where such a batch is not captured."""
        graphs = self._graphs
        if graphs is None or num_tokens > MAX_KEPT_TOKENS or longest > MAX_KEPT_ROW:
            return None
        return None if graphs.size_for(num_rows, num_tokens) is None else graphs

    def _compute(self, batch: ForwardBatch) -> Outputs:
        beside = self._beside[: len(batch.token_ids)]
        return (self._net.forward(beside, batch, self._caches),)

    def _kept_batch(self, num_tokens: int, num_rows: int, table: Tensor) -> ForwardBatch:
        """Of its lengths it says no more than holds for all batches of its kind."""
        found = self._batches.get((num_tokens, num_rows))
        if found is None:
            if len(self._batches) == MAX_KEPT_BATCHES:
                self._batches.clear()
            longest = 1 if num_tokens == num_rows else MAX_KEPT_ROW
            reach = table.shape[1] * self._page_size
            found = self._kept.batch(
                num_tokens, num_rows, 0, table, max_q_len=longest, max_kv_len=reach
            ).forward
            self._batches[num_tokens, num_rows] = found
        return found

    def _fill(self, tensors: StepTensors, fed: Fed, num_tokens: int, table: Tensor) -> None:
        arrays, num_rows = tensors.arrays, len(fed.slots)
        positions, of = fed.starts, fed.slots
        if num_tokens > num_rows:
            positions, of = ragged(fed.starts, fed.counts), np.repeat(fed.slots, fed.counts)
        arrays.positions[:num_tokens] = positions
        np.cumsum(fed.counts, out=arrays.q_start[1 : num_rows + 1])
        np.add(fed.starts, fed.counts, out=arrays.kv_len[:num_rows], casting="same_kind")
        arrays.slots[:num_rows] = fed.slots
        if self._device.type == "cpu":
            index, offset = np.divmod(positions, self._page_size)
            pages = table.numpy()[of, index]
            arrays.cache_index[:num_tokens] = pages * np.int64(self._page_size) + offset
        else:
            tensors.upload()

    def _find_pages(self, batch: ForwardBatch, fed: Fed, table: Tensor) -> None:
        """The page table is on the device alone."""
        of = torch.from_numpy(np.repeat(fed.slots, fed.counts)).to(self._device)
        positions = batch.positions.long()
        pages = table[of, positions // self._page_size].long()
        batch.cache_index.copy_(pages * self._page_size + positions % self._page_size)
