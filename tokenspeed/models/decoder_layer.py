# SPDX-License-Identifier: MIT
"""`DecoderLayer`: attention and feed-forward around the residual stream.

Refuses to know the kind of either; a model's file gives it finished layers.
"""

from typing import Protocol

import torch
from torch import Tensor

from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.norm import ResidualNorm
from tokenspeed.models.decoder_config import DecoderConfig
from tokenspeed.spmd.placement import ModuleSpec


class Attention(Protocol):
    """What a decoder layer asks of its attention, which is also a `Layer`."""

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: tuple[Tensor, ...]) -> Tensor: ...
    def cache_spec(self, dtype: torch.dtype) -> CacheSpec: ...


class DecoderLayer(Layer):
    """norm, attention, norm, feed-forward; the residual is added inside the norms.

    `hidden` is the last block's output, not yet added to `residual` (None in the first layer).
    Where `heard` is a list, the residual stream that enters is appended to it.
    """

    heard: list[Tensor] | None = None
    flows = (("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),)

    def __init__(self, target: Target, config: DecoderConfig, self_attn: Layer, mlp: Layer) -> None:
        super().__init__(target)
        self.spec = ModuleSpec(outputs=mlp.spec.outputs)
        size, eps = config.hidden_size, config.norm_eps
        self.input_layernorm = ResidualNorm(target, "input_layernorm", size, eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = ResidualNorm(target, "post_attention_layernorm", size, eps)
        self.mlp = mlp

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        cache: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm.add(hidden, residual)
        if self.heard is not None:
            self.heard.append(residual)
        hidden = self.self_attn(hidden, batch, cache)
        hidden, residual = self.post_attention_layernorm.add(hidden, residual)
        return self.mlp(hidden), residual
