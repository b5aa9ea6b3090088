# SPDX-License-Identifier: MIT
"""Qwen3, dense: grouped-query attention with a norm over each head's q and k. arXiv:2505.09388."""

from typing import ClassVar

from tokenspeed.layers.attention_gqa import GqaAttention, GqaShape
from tokenspeed.models.decoder_config import read_heads
from tokenspeed.models.decoder_model import Build, DecoderModel


class Qwen3ForCausalLM(DecoderModel):
    """Every layer the same: grouped-query attention and a gated feed-forward."""

    default_head_dim: ClassVar[int | None] = 128

    @classmethod
    def attention(cls, build: Build) -> GqaAttention:
        bias = build.config.boolean("attention_bias", False)
        shape = GqaShape(
            build.decoder.hidden_size,
            *read_heads(build.config, default_head_dim=cls.default_head_dim),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm="head",
            norm_eps=build.decoder.norm_eps,
        )
        return GqaAttention(build.target, shape, build.cos_sin)
