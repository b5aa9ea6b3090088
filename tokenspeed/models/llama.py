# SPDX-License-Identifier: MIT
"""Llama 2 and 3, and models of the same shape. arXiv:2407.21783."""

from tokenspeed.layers.attention_gqa import GqaAttention, GqaShape
from tokenspeed.models.decoder_config import read_heads
from tokenspeed.models.decoder_model import Build, DecoderModel


class LlamaForCausalLM(DecoderModel):
    """Every layer the same: grouped-query attention and a gated feed-forward."""

    @classmethod
    def attention(cls, build: Build) -> GqaAttention:
        bias = build.config.boolean("attention_bias", False)
        heads = read_heads(build.config)
        shape = GqaShape(build.decoder.hidden_size, *heads, qkv_bias=bias, o_bias=bias)
        return GqaAttention(build.target, shape, build.cos_sin)
