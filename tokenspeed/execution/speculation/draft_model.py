# SPDX-License-Identifier: MIT
"""A whole model as a drafter: it reads what the target reads, and writes on by itself.

It needs tokens and nothing that the target computes, so nothing stands beside them. Knows no
target; chaining is `model_drafter.py`'s.
"""

import dataclasses

from torch import Tensor

from tokenspeed.execution.speculation.drafter import DraftWork
from tokenspeed.execution.speculation.feeder import Caches
from tokenspeed.execution.speculation.model_drafter import ChainDrafter
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.models.causal_lm import CausalLM


class DraftModelNet:
    """A `DraftNet` of another model with the target's vocabulary: see `load_draft_model`."""

    width = 0

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.dtype, self.device = model.target.dtype, model.target.device

    def begin(self, num_tokens: int) -> None:
        self._model.spmd.begin_step([num_tokens])

    def beside(self, work: DraftWork) -> Tensor:
        return work.hidden.new_empty((len(work.ids), 0), dtype=self.dtype)

    def forward(self, beside: Tensor, batch: ForwardBatch, caches: Caches) -> Tensor:
        """Where the target's contexts are longer, drafts at the far end are poor and no fault."""
        last = self._model.max_position - 1
        if batch.max_kv_len > last + 1:
            positions = batch.positions.clamp(max=last)
            batch = dataclasses.replace(batch, positions=positions)
        return self._model.forward(batch, caches)

    def logits(self, left: Tensor) -> Tensor:
        return self._model.logits(left)


def draft_model_drafter(model: CausalLM, max_depth: int) -> ChainDrafter:
    """Its keys and values are of its own dtype, whatever the target's are."""
    net, specs = DraftModelNet(model), model.cache_specs()
    return ChainDrafter("draft_model", net, specs, shift=0, max_depth=max_depth, complete=True)
