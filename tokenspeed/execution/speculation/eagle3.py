# SPDX-License-Identifier: MIT
"""The drafter with an EAGLE-3 head. Knows one head; chaining is `model_drafter.py`'s.

The head is fed what the target's layers left, fused, and then the hidden states that it gives
itself, as its last layer left them (arXiv:2503.01840, section 3.1).
"""

import torch
from torch import Tensor

from tokenspeed.execution.speculation.drafter import DraftWork
from tokenspeed.execution.speculation.feeder import Caches
from tokenspeed.execution.speculation.model_drafter import ChainDrafter
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.models.eagle3 import Eagle3


class Eagle3Net:
    """A `DraftNet` of a head whose target tells it the residual streams: see `load_eagle3`."""

    def __init__(self, head: Eagle3) -> None:
        self._head = head
        self.width = head.config.decoder.hidden_size
        self.dtype, self.device = head.target.dtype, head.target.device

    def begin(self, num_tokens: int) -> None:
        self._head.spmd.begin_step([num_tokens])

    def beside(self, work: DraftWork) -> Tensor:
        return self._head.fuse(work.aux_hidden)

    def forward(self, beside: Tensor, batch: ForwardBatch, caches: Caches) -> Tensor:
        return self._head.forward(batch.token_ids, beside, batch, caches[0])

    def logits(self, left: Tensor) -> Tensor:
        return self._head.logits(left)


def eagle3_drafter(head: Eagle3, dtype: torch.dtype | None, max_depth: int) -> ChainDrafter:
    """`dtype` of its keys and values; None: the target's."""
    spec = head.cache_spec(dtype or head.target.dtype)
    return ChainDrafter("eagle3", Eagle3Net(head), [spec], shift=1, max_depth=max_depth)
