# SPDX-License-Identifier: MIT
"""Llama 2 and 3, and models of the same shape. arXiv:2407.21783."""

from typing import Any, Self

import torch

from tokenspeed.layers.attention_gqa import GqaAttention, GqaShape
from tokenspeed.layers.layer import Target
from tokenspeed.layers.mlp import MLP
from tokenspeed.layers.rope import rope_table
from tokenspeed.models.causal_lm import CausalLM, DecoderLayer
from tokenspeed.models.decoder_config import read_decoder, read_heads
from tokenspeed.models.hf_config import HfConfig


class LlamaForCausalLM(CausalLM):
    """Every layer the same: grouped-query attention and a gated feed-forward."""

    @classmethod
    def from_config(
        cls,
        hf_config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int | None = None,
    ) -> Self:
        config, target = HfConfig(hf_config), Target(device, dtype)
        heads, kv_heads, head_dim = read_heads(config)
        decoder = read_decoder(config, rope_dim=head_dim, max_model_len=max_model_len)
        attention_bias = config.boolean("attention_bias", False)
        shape = GqaShape(decoder.hidden_size, heads, kv_heads, head_dim, bias=attention_bias)
        inner, bias = config.integer("intermediate_size"), config.boolean("mlp_bias", False)
        cos_sin = rope_table(decoder.rope, decoder.max_position, device)
        layers = [
            DecoderLayer(
                target,
                decoder,
                GqaAttention(target, shape, cos_sin),
                MLP(target, decoder.hidden_size, inner, bias=bias),
            )
            for _ in range(decoder.num_layers)
        ]
        return cls(target, decoder, layers)
