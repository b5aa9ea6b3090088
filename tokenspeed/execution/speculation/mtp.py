# SPDX-License-Identifier: MIT
"""The drafter of models with MTP modules. Knows one module; chaining is `model_drafter.py`'s.

The module is fed the model's normalised hidden states, and then those that it gives itself: one
module is served as if there were several (arXiv:2412.19437, section 2.2).
"""

import torch
from torch import Tensor

from tokenspeed.errors import ModelLoadError
from tokenspeed.execution.speculation.drafter import DraftWork
from tokenspeed.execution.speculation.feeder import Caches
from tokenspeed.execution.speculation.model_drafter import ChainDrafter
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.models.causal_lm import CausalLM


class MtpNet:
    """A `DraftNet` of the model's own weights. `ModelLoadError`: it was loaded without `mtp`."""

    def __init__(self, model: CausalLM) -> None:
        if model.mtp is None:
            raise ModelLoadError("the model was loaded without the layers that predict further")
        self._model, self.module = model, model.mtp
        self.width = model.config.hidden_size
        self.dtype, self.device = model.target.dtype, model.target.device

    def begin(self, num_tokens: int) -> None:
        self._model.spmd.begin_step([num_tokens])

    def beside(self, work: DraftWork) -> Tensor:
        return work.hidden

    def forward(self, beside: Tensor, batch: ForwardBatch, caches: Caches) -> Tensor:
        return self.module.forward(beside, batch, caches[0])

    def logits(self, left: Tensor) -> Tensor:
        return self._model.logits(left)


def mtp_drafter(model: CausalLM, dtype: torch.dtype | None, max_depth: int) -> ChainDrafter:
    """`dtype` of its keys and values; None: the model's."""
    net = MtpNet(model)
    spec = net.module.cache_spec(dtype or model.target.dtype)
    return ChainDrafter("mtp", net, [spec], shift=1, max_depth=max_depth)
