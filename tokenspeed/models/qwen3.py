# SPDX-License-Identifier: MIT
"""Qwen3, dense: grouped-query attention with a norm over each head's q and k. arXiv:2505.09388."""

from typing import Any, Self

import torch

from tokenspeed.layers.attention_gqa import GqaAttention, GqaShape
from tokenspeed.layers.layer import Layer, Target
from tokenspeed.layers.mlp import MLP
from tokenspeed.layers.rope import rope_table
from tokenspeed.models.causal_lm import CausalLM, DecoderLayer
from tokenspeed.models.decoder_config import DecoderConfig, read_decoder, read_heads
from tokenspeed.models.hf_config import HfConfig


class Qwen3ForCausalLM(CausalLM):
    """Dense; `feed_forward` is what the mixture of experts replaces."""

    default_head_dim: int | None = 128

    @classmethod
    def from_config(
        cls,
        hf_config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int | None = None,
    ) -> Self:
        config, target = HfConfig(hf_config), Target(device, dtype)
        heads, kv_heads, head_dim = read_heads(config, default_head_dim=cls.default_head_dim)
        decoder = read_decoder(config, rope_dim=head_dim, max_model_len=max_model_len)
        shape = GqaShape(
            decoder.hidden_size,
            heads,
            kv_heads,
            head_dim,
            bias=config.boolean("attention_bias", False),
            qk_norm_eps=decoder.norm_eps,
        )
        cos_sin = rope_table(decoder.rope, decoder.max_position, device)
        layers = [
            DecoderLayer(
                target,
                decoder,
                GqaAttention(target, shape, cos_sin),
                cls.feed_forward(target, config, decoder, index),
            )
            for index in range(decoder.num_layers)
        ]
        return cls(target, decoder, layers)

    @classmethod
    def feed_forward(
        cls, target: Target, config: HfConfig, decoder: DecoderConfig, index: int
    ) -> Layer:
        """The block after layer `index`'s attention."""
        return MLP(target, decoder.hidden_size, config.integer("intermediate_size"))
